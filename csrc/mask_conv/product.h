// Matrix products by register tiles of R x NR, R <= MR, and the layouts that they read. All inputs are cut into blocks of 64
// pixels. "Packed" is float [64 / NR][rows][NR]: contiguous slices of NR pixels. A slice of 256 channels stays in the L1 cache
// while all kernels are multiplied with it.
#pragma once

#include "common/half.h"

namespace sprompt {
namespace SPROMPT_ISA {

#if defined(__AVX512F__)
constexpr int MR = 14;  // 28 of the 32 registers hold sums
#elif defined(__AVX2__)
constexpr int MR = 6;  // 12 of 16
#else
constexpr int MR = 4;  // 8 of 16: without fma a product needs another register
#endif
constexpr int NR = 2 * W;
constexpr int64_t block = 64;     // pixels
constexpr int64_t panel = 8 * W;  // channels that pooling holds in registers
constexpr int64_t slices = block / NR;

SPROMPT_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
SPROMPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Cuts rows into `count` groups of nearly equal height <= MR, so that no group is too low to keep the multipliers busy.
struct Groups {
    int64_t rows, count;
    SPROMPT_INLINE explicit Groups(int64_t rows_) : rows(rows_), count((rows_ + MR - 1) / MR) {}
    SPROMPT_INLINE int64_t begin(int64_t group) const { return group * rows / count; }
};

// c (R, NR) = a (R, depth) b (depth, NR), plus c if `add`. Element (r, k) of a is a[r * AR + k * AK].
template <int R, int64_t AR, int64_t AK, bool add>
static void product_tile(const float* a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
    vf sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        sum[r][0] = add ? load(c + r * c_stride) : vf{};
        sum[r][1] = add ? load(c + r * c_stride + W) : vf{};
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        const vf b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vf x = broadcast(a[r * AR + k * AK]);
            sum[r][0] = fma(x, b0, sum[r][0]);
            sum[r][1] = fma(x, b1, sum[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(c + r * c_stride, sum[r][0]);
        store(c + r * c_stride + W, sum[r][1]);
    }
}

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

// Interleaves the lanes of a and b: a0 b0 a1 b1 ... The first half goes to low, the second to high.
SPROMPT_INLINE void zip(vf a, vf b, vf& low, vf& high) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = (vf)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
    high = (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
#elif defined(__AVX2__)
    const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    low = (vf)_mm256_permute2f128_ps(even, odd, 0x20);
    high = (vf)_mm256_permute2f128_ps(even, odd, 0x31);
#elif SPROMPT_X86
    low = (vf)_mm_unpacklo_ps((__m128)a, (__m128)b);
    high = (vf)_mm_unpackhi_ps((__m128)a, (__m128)b);
#else
    for (int i = 0; i < W / 2; ++i) {
        low[2 * i] = a[i];
        low[2 * i + 1] = b[i];
        high[2 * i] = a[W / 2 + i];
        high[2 * i + 1] = b[W / 2 + i];
    }
#endif
}

// Transposes W x W floats from rows at `in` to rows at `out`. Each round rotates the bits of the index (row, lane) by one.
// After log2(W) rounds row and lane are exchanged.
SPROMPT_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    vf v[W], u[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(in + i * in_stride);
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i) zip(v[i], v[i + W / 2], u[2 * i], u[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = u[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(out + i * out_stride, v[i]);
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
