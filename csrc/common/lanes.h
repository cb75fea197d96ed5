// Numbers of lanes, conditions as bits, sums of several vectors at a time, and loads and stores of the last lanes of a row.
#pragma once

#include "common/half.h"

namespace sprompt {
namespace SPROMPT_ISA {

SPROMPT_INLINE vi select_int(vi condition, vi yes, vi no) { return (condition & yes) | (~condition & no); }
SPROMPT_INLINE vi lanes() {
    vi v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
}
// Lane i is -1 where i < count.
SPROMPT_INLINE vi first_lanes(int64_t count) { return lanes() < static_cast<int32_t>(count < W ? count : W); }

// Bit i is set where lane i of a condition is -1.
SPROMPT_INLINE uint32_t bits_of(vi condition) { return bits_greater((vf)(condition & 0x3f800000), vf{}); }

typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef float v8f __attribute__((vector_size(32)));

// The sums below add W numbers in one fixed order: with 16 lanes first the two halves, then neighbours, then neighbours of
// these sums, and so on. sum_across sums over registers: lane i of the result is the sum of the lanes i of v[W].
SPROMPT_INLINE vf sum_across(vf* v) {
    if (W == 16)
        for (int i = 0; i < W / 2; ++i) v[i] += v[i + W / 2];
    for (int n = W == 16 ? W / 2 : W; n > 1; n /= 2)
        for (int i = 0; i < n / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    return v[0];
}
// sum_four and sum_eight sum within registers: lane i of the result is the sum of the lanes of v[i], for 4 or 8 vectors.
#if defined(__AVX2__)
SPROMPT_INLINE __m256 eight_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    return (__m256)v;
#endif
}
// Lanes 0-3 and 4-7 are the sums of the lower and of the upper halves of 4 vectors.
SPROMPT_INLINE __m256 sum_halves(const vf* v) {
    return _mm256_hadd_ps(_mm256_hadd_ps(eight_lanes(v[0]), eight_lanes(v[1])),
                          _mm256_hadd_ps(eight_lanes(v[2]), eight_lanes(v[3])));
}
#endif
SPROMPT_INLINE v4f sum_four(const vf* v) {
#if defined(__AVX2__)
    const __m256 x = sum_halves(v);
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
    v4f out;
    for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return out;
#endif
}
SPROMPT_INLINE v8f sum_eight(const vf* v) {
#if defined(__AVX2__)
    const __m256 x = sum_halves(v), y = sum_halves(v + 4);
    return (v8f)_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
#else
    v8f out;
    for (int i = 0; i < 8; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return out;
#endif
}

// The first k < W elements of a row, with zeros behind them. Reads only these k elements.
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
