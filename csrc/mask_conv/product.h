// Products of blocks of pixels (common/product.h), and the layouts that they read. All inputs are cut into blocks of 64
// pixels. "Packed" is float [64 / NR][rows][NR]: contiguous slices of NR pixels. A slice of 256 channels stays in the L1 cache
// while all kernels are multiplied with it.
#pragma once

#include "common/half.h"
#include "common/product.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t block = 64;     // pixels
constexpr int64_t panel = 8 * W;  // channels that pooling holds in registers
constexpr int64_t slices = block / NR;

// c (rows, NR) = a b. a is a group of a packed operand, [k][rows]. b is a slice of a packed block, [k][NR].
template <int R = MR>
SPROMPT_INLINE void product_of_group(int64_t rows, const float* a, const float* b, int64_t depth, float* c) {
    if (rows == R) return product_tile<R, 1, R, false>(a, b, NR, depth, c, NR);
    if constexpr (R > 1) product_of_group<R - 1>(rows, a, b, depth, c);
}

// c (rows, NR) += a b. a is rows of 64 pixels. b is pixels of `panel` channels. depth <= 64.
template <int R = MR>
SPROMPT_INLINE void product_over_pixels(int64_t rows, const float* a, const float* b, int64_t depth, float* c,
                                        int64_t c_stride) {
    if (rows == R) return product_tile<R, block, 1, true>(a, b, panel, depth, c, c_stride);
    if constexpr (R > 1) product_over_pixels<R - 1>(rows, a, b, depth, c, c_stride);
}

// out: for each group of rows [k][rows] <- x (rows, depth).
template <class T>
static void pack_groups(const T* x, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, float* out) {
    const Groups groups(rows);
    for (int64_t g = 0; g < groups.count; ++g)
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t r = groups.begin(g); r < groups.begin(g + 1); ++r)
                *out++ = to_float(x[r * row_stride + k * depth_stride]);
}

// Writes t <= 64 pixels of one row as floats, and zeros behind them.
template <class T>
SPROMPT_INLINE void row_of_block(const T* x, int64_t t, float* out) {
    row_to_float(x, t, out);
    for (int64_t p = t; p < block; ++p) out[p] = 0.0f;
}

// packed <- t <= 64 pixels of x (rows, t). Rows [rows, padded_rows) are zeros.
template <class T>
static void pack_block(const T* x, int64_t row_stride, int64_t rows, int64_t padded_rows, int64_t t, float* packed) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* in = x + row * row_stride;
        float* out = packed + row * NR;
        if (t == block) {
            for (int64_t s = 0; s < slices; ++s)
                for (int i = 0; i < NR; i += W) store(out + s * padded_rows * NR + i, load_as_float(in + s * NR + i));
        } else {
            float copy[block];
            row_of_block(in, t, copy);
            for (int64_t s = 0; s < slices; ++s)
                for (int i = 0; i < NR; i += W) store(out + s * padded_rows * NR + i, load(copy + s * NR + i));
        }
    }
    for (int64_t s = 0; s < slices; ++s)
        for (int64_t i = rows * NR; i < padded_rows * NR; i += W) store(packed + s * padded_rows * NR + i, vf{});
}

// Products of bfloat16 pairs: one instruction adds two products to each float. Both operands hold the channels 2k (low
// half) and 2k + 1 (high half) in one 32-bit lane.
#if defined(__AVX512BF16__)
constexpr bool bf16_pairs = true;
#else
constexpr bool bf16_pairs = false;
#endif

SPROMPT_INLINE vf add_pairs(vf sum, vi a, vi b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    const vi high = broadcast(static_cast<int32_t>(0xffff0000u));
    sum = fma((vf)(a << 16), (vf)(b << 16), sum);
    return fma((vf)(a & high), (vf)(b & high), sum);
#endif
}

// Like product_tile, but of pairs: a [k][R], b [k][NR].
template <int R>
static void product_tile_of_pairs(const int32_t* a, const int32_t* b, int64_t depth, float* c) {
    vf sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        const vi b0 = load(b + k * NR), b1 = load(b + k * NR + W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vi x = broadcast(a[k * R + r]);
            sum[r][0] = add_pairs(sum[r][0], x, b0);
            sum[r][1] = add_pairs(sum[r][1], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(c + r * NR, sum[r][0]);
        store(c + r * NR + W, sum[r][1]);
    }
}
template <int R = MR>
SPROMPT_INLINE void product_of_pairs(int64_t rows, const int32_t* a, const int32_t* b, int64_t depth, float* c) {
    if (rows == R) return product_tile_of_pairs<R>(a, b, depth, c);
    if constexpr (R > 1) product_of_pairs<R - 1>(rows, a, b, depth, c);
}

// out: for each group of rows [k / 2][rows] pairs <- x (rows, depth).
static SPROMPT_INLINE void pack_groups_of_pairs(const bf16* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
                                                int64_t depth, int32_t* out) {
    const Groups groups(rows);
    for (int64_t g = 0; g < groups.count; ++g)
        for (int64_t k = 0; k < depth; k += 2)
            for (int64_t r = groups.begin(g); r < groups.begin(g + 1); ++r) {
                const bf16* in = x + r * row_stride + k * depth_stride;
                const uint32_t low = in[0].bits, high = k + 1 < depth ? in[depth_stride].bits : 0;
                *out++ = static_cast<int32_t>(low | high << 16);
            }
}

// pairs [slice][rows / 2][NR] <- packed [slice][rows][NR]. The floats hold bfloat16 values. `rows` is even.
static SPROMPT_INLINE void pair_rows(const float* packed, int64_t rows, int32_t* pairs) {
    for (int64_t row = 0; row < slices * rows; row += 2, packed += 2 * NR, pairs += NR)
        for (int i = 0; i < NR; i += W) {
            const vi low = bits_to_int(load(packed + i)) >> 16 & 0xffff;
            store(pairs + i, low | bits_to_int(load(packed + NR + i)));
        }
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
