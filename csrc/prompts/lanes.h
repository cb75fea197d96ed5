// Eight sums at a time, and the last lanes of a row.
#pragma once

#include "common/half.h"

namespace sprompt {
namespace SPROMPT_ISA {

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));

// The sum of W numbers in one fixed order: on 16 lanes first the halves, then neighbours, and neighbours of these, ...
// Across registers: lane i is the sum of the lanes i of v[W].
SPROMPT_INLINE vf sum_across(vf* v) {
    if (W == 16)
        for (int i = 0; i < W / 2; ++i) v[i] += v[i + W / 2];
    for (int n = W == 16 ? W / 2 : W; n > 1; n /= 2)
        for (int i = 0; i < n / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    return v[0];
}
// Within registers: lane i is the sum of the lanes of v[i], for 8 of them.
SPROMPT_INLINE v8f sum_each(const vf* v) {
#if defined(__AVX2__)
    __m256 x[8];
    for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
        const __m512 wide = (__m512)v[i];
        x[i] = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
        x[i] = (__m256)v[i];
#endif
    }
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return (v8f)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    v8f out;
    for (int i = 0; i < 8; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return out;
#endif
}

// The first k < W elements of a row, zeros behind; reads no more than them.
template <class T>
SPROMPT_INLINE vf load_some(const T* p, int64_t k) {
    float lane[W] = {};
    for (int64_t i = 0; i < k; ++i) lane[i] = to_float(p[i]);
    return load(lane);
}
template <class T>
SPROMPT_INLINE void store_some(T* p, vf v, int64_t k) {
    float lane[W];
    store(lane, v);
    for (int64_t i = 0; i < k; ++i) from_float(lane[i], p + i);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
