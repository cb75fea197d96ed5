// Vectors of W 32-bit lanes, where W is the level's register width. They use the compiler's vector extension, which provides +
// - * / & | ^ and comparisons (lanes of 0 and -1). This file adds loads, a true fused multiply-add, minimum and maximum, sums,
// and comparisons that return bits.
//
// The build sets -ffp-contract=off: a product and a sum are fused only by fma(). So a kernel can agree with its reference to
// the bit.
#pragma once

#if !defined(SPROMPT_ISA)
#error "vec.h is for kernel files, which are compiled once per level"
#endif

#include <cstdint>

#include "common/isa.h"

#if SPROMPT_X86
#include <immintrin.h>
#endif

namespace sprompt {
namespace SPROMPT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

SPROMPT_INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SPROMPT_INLINE vi load(const int32_t* p) {
    vi v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SPROMPT_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
SPROMPT_INLINE void store(int32_t* p, vi v) { __builtin_memcpy(p, &v, sizeof v); }
SPROMPT_INLINE vf broadcast(float x) { return x - vf{}; }
SPROMPT_INLINE vi broadcast(int32_t x) { return x - vi{}; }
SPROMPT_INLINE vf bits_to_float(vi v) { return (vf)v; }
SPROMPT_INLINE vi bits_to_int(vf v) { return (vi)v; }
SPROMPT_INLINE vf select(vi condition, vf yes, vf no) { return (vf)((condition & (vi)yes) | (~condition & (vi)no)); }

// a * b + c, rounded once where the level has the instruction, and twice on portable.
SPROMPT_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Like the SSE instruction: if either operand is NaN, the second operand is returned.
SPROMPT_INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
SPROMPT_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }
SPROMPT_INLINE vf absolute(vf a) { return (vf)((vi)a & 0x7fffffff); }

// The sum of the lanes. It adds halves first, in the same order at every call.
SPROMPT_INLINE float sum(vf v) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

// Bit i is set where lane i of a is greater than lane i of b (false for NaN).
SPROMPT_INLINE uint32_t bits_greater(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#elif SPROMPT_X86
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)(vf)(a > b)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
    return bits;
#endif
}
// Bit i is set where lane i of a is at least lane i of b (false for NaN).
SPROMPT_INLINE uint32_t bits_at_least(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#elif SPROMPT_X86
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)(vf)(a >= b)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
    return bits;
#endif
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
