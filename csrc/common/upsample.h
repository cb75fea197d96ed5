// Bilinear upsampling by a whole number u with half-pixel centres, like F.interpolate(scale_factor=u, mode="bilinear",
// align_corners=False), one row at a time, and its transpose. Output X = u x + k lies between two inputs:
//     out[X] = (1 - f) in[x - 1 + s] + f in[x + s],   c = (k + 1/2) / u - 1/2,   s = [c >= 0],   f = c + 1 - s,
// where indices are clamped to the map. A row of the upsampled map is made in two steps: two low-resolution rows are blended,
// and the blend is stretched to the full width. So an upsampled map is never stored.
#pragma once

#include "common/half.h"
#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

// The logit of padding lanes. Its probability, its product with a target of 0 and its loss are all 0.
constexpr float beyond_row = -1e4f;

// Output phase k in [0, u) lies between x - 1 + shift and x + shift, with weights 1 - fraction and fraction.
struct Phase {
    int shift;
    float fraction;
};
SPROMPT_INLINE Phase phase_of(int64_t k, int64_t u) {
    const bool up = 2 * k + 1 >= u;
    return {up, static_cast<float>(2 * k + 1 - u) / static_cast<float>(2 * u) + (up ? 0.0f : 1.0f)};
}

// Output row Y of a map of h rows is weight_a * row a + weight_b * row b; b is a or a + 1.
struct RowPair {
    int64_t a, b;
    float weight_a, weight_b;
};
SPROMPT_INLINE RowPair row_pair(int64_t Y, int64_t h, int64_t u) {
    if (u == 1) return {Y, Y, 1.0f, 0.0f};
    const Phase phase = phase_of(Y % u, u);
    const int64_t a = Y / u - 1 + phase.shift, b = a + 1;
    return {a < 0 ? 0 : a, b < h ? b : h - 1, 1.0f - phase.fraction, phase.fraction};
}

// v[-1 .. n] <- the blend of rows a and b of n elements. v[-1] and v[n] repeat the first and the last element.
template <class T>
SPROMPT_INLINE void blend_rows(const T* a, const T* b, float weight_a, float weight_b, int64_t n, float* v) {
    const vf wa = broadcast(weight_a), wb = broadcast(weight_b);
    int64_t x = 0;
    if (weight_b == 0.0f) {
        row_to_float(a, n, v);
    } else {
        for (; x + W <= n; x += W) store(v + x, fma(wb, load_as_float(b + x), wa * load_as_float(a + x)));
        for (; x < n; ++x) v[x] = weight_a * to_float(a[x]) + weight_b * to_float(b[x]);
    }
    v[-1] = v[0];
    v[n] = v[n - 1];
}

// v[-1 .. n] <- row Y, before stretching, of the map (h, n) at `map`, rows `stride` apart.
SPROMPT_INLINE void upsampled_low_row(DType dtype, const void* map, int64_t stride, int64_t h, int64_t n, int64_t u, int64_t Y,
                                      float* v) {
    const RowPair pair = row_pair(Y, h, u);
    SPROMPT_FLOAT_TYPES(dtype, T, {
        const T* rows = static_cast<const T*>(map);
        blend_rows(rows + pair.a * stride, rows + pair.b * stride, pair.weight_a, pair.weight_b, n, v);
    })
}

// first, second <- even[0] odd[0] even[1] odd[1] ...
SPROMPT_INLINE void interleave(vf even, vf odd, vf& first, vf& second) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    first = (vf)_mm512_permutex2var_ps((__m512)even, low, (__m512)odd);
    second = (vf)_mm512_permutex2var_ps((__m512)even, high, (__m512)odd);
#elif defined(__AVX2__)
    const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd), high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
    first = (vf)_mm256_permute2f128_ps(low, high, 0x20);
    second = (vf)_mm256_permute2f128_ps(low, high, 0x31);
#elif SPROMPT_X86
    first = (vf)_mm_unpacklo_ps((__m128)even, (__m128)odd);
    second = (vf)_mm_unpackhi_ps((__m128)even, (__m128)odd);
#else
    for (int i = 0; i < W; ++i) {
        (2 * i < W ? first : second)[2 * i % W] = even[i];
        (2 * i + 1 < W ? first : second)[(2 * i + 1) % W] = odd[i];
    }
#endif
}
// The inverse: even, odd <- the lanes of even and odd index of first and second.
SPROMPT_INLINE void deinterleave(vf first, vf second, vf& even, vf& odd) {
#if defined(__AVX512F__)
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    even = (vf)_mm512_permutex2var_ps((__m512)first, evens, (__m512)second);
    odd = (vf)_mm512_permutex2var_ps((__m512)first, odds, (__m512)second);
#elif defined(__AVX2__)
    const __m256d evens = (__m256d)_mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
    const __m256d odds = (__m256d)_mm256_shuffle_ps((__m256)first, (__m256)second, 0xdd);
    even = (vf)_mm256_permute4x64_pd(evens, 0xd8);
    odd = (vf)_mm256_permute4x64_pd(odds, 0xd8);
#elif SPROMPT_X86
    even = (vf)_mm_shuffle_ps((__m128)first, (__m128)second, 0x88);
    odd = (vf)_mm_shuffle_ps((__m128)first, (__m128)second, 0xdd);
#else
    for (int i = 0; i < W; ++i) {
        even[i] = (2 * i < W ? first : second)[2 * i % W];
        odd[i] = (2 * i + 1 < W ? first : second)[(2 * i + 1) % W];
    }
#endif
}

SPROMPT_INLINE vi lane_index() {
    vi v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
}

// row[0 .. u n) <- v[-1 .. n], stretched.
SPROMPT_INLINE void stretch_row(const float* v, int64_t n, int64_t u, float* row) {
    for (int64_t k = 0; k < u; ++k) {
        const Phase phase = phase_of(k, u);
        const float* left = v - 1 + phase.shift;
        for (int64_t x = 0; x < n; ++x) row[u * x + k] = (1.0f - phase.fraction) * left[x] + phase.fraction * left[x + 1];
    }
}

// Calls f(X, z) for X = 0, W, 2 W, ... < u n. z holds the lanes X .. X + W of the stretched row of v[-1 .. n], and beyond_row
// in lanes behind u n. v is readable to v[n + W]. `row` is a buffer of u n + W floats, used where u > 2.
template <class F>
SPROMPT_INLINE void for_each_stretched(const float* v, int64_t n, int64_t u, float* row, const F& f) {
    const int64_t width = u * n;
    int64_t X = 0;
    const float* z = v;  // the lanes from `origin` on
    int64_t origin = 0;
    float rest[2 * W];
    if (u == 2) {
        const vf quarter = broadcast(0.25f), three_quarters = broadcast(0.75f);
        const auto stretch = [&](int64_t x, vf& first, vf& second) {
            const vf middle = three_quarters * load(v + x);
            interleave(fma(quarter, load(v + x - 1), middle), fma(quarter, load(v + x + 1), middle), first, second);
        };
        vf first, second;
        for (; X + 2 * W <= width; X += 2 * W) {
            stretch(X / 2, first, second);
            f(X, first);
            f(X + W, second);
        }
        if (X == width) return;
        stretch(X / 2, first, second);
        store(rest, first);
        store(rest + W, second);
        z = rest;
        origin = X;
    } else if (u > 2) {
        stretch_row(v, n, u, row);
        z = row;
    }
    const vi lanes = lane_index();
    for (; X < width; X += W)
        f(X,
          select(lanes < static_cast<int32_t>(width - X < W ? width - X : W), load(z + (X - origin)), broadcast(beyond_row)));
}

// The transpose of stretching: g[0 .. n) <- row[0 .. u n). `row` is writable at [-1] and [u n], and readable for W more floats.
SPROMPT_INLINE void collapse_row(float* row, int64_t n, int64_t u, float* g) {
    if (u == 2) {
        // The stretch clamps indices to the map. So in the transpose the two ends of the row count once more.
        row[-1] = row[0];
        row[2 * n] = row[2 * n - 1];
        const vf quarter = broadcast(0.25f), three_quarters = broadcast(0.75f);
        int64_t x = 0;
        for (; x + W <= n; x += W) {
            vf before, here, next, after;  // row[2 x - 1], row[2 x], row[2 x + 1], row[2 x + 2]
            deinterleave(load(row + 2 * x - 1), load(row + 2 * x - 1 + W), before, here);
            deinterleave(load(row + 2 * x + 1), load(row + 2 * x + 1 + W), next, after);
            store(g + x, fma(quarter, before + after, three_quarters * (here + next)));
        }
        for (; x < n; ++x) g[x] = 0.25f * (row[2 * x - 1] + row[2 * x + 2]) + 0.75f * (row[2 * x] + row[2 * x + 1]);
        return;
    }
    for (int64_t x = 0; x < n; ++x) g[x] = 0.0f;
    for (int64_t k = 0; k < u; ++k) {
        const Phase phase = phase_of(k, u);
        for (int64_t x = 0; x < n; ++x) {
            const int64_t a = x - 1 + phase.shift, b = a + 1;
            g[a < 0 ? 0 : a] += (1.0f - phase.fraction) * row[u * x + k];
            g[b < n ? b : n - 1] += phase.fraction * row[u * x + k];
        }
    }
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
