// Matrix products by register tiles of R x NR, R <= MR, and the transposition of tiles. Rows and columns are floats.
#pragma once

#include "common/vec.h"

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

}  // namespace SPROMPT_ISA
}  // namespace sprompt
