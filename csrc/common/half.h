// bfloat16 and float16 in memory, float in registers. Kernels are templates over the element type (float, bf16, f16) and
// read and write through load_as_float and store_float; sums are always in float.
#pragma once

#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

SPROMPT_INLINE float to_float(float x) { return x; }
SPROMPT_INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
SPROMPT_INLINE float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float y;
    if (rest >= 0x7c00u) {  // inf, NaN
        const uint32_t bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
        __builtin_memcpy(&y, &bits, 4);
        return y;
    }
    // The exponent biases differ by 112. The product with 2^112 corrects the exponent, for subnormals as well.
    const uint32_t bits = rest << 13;
    __builtin_memcpy(&y, &bits, 4);
    y *= 0x1p112f;
    return sign ? -y : y;
#endif
}

SPROMPT_INLINE void from_float(float x, float* out) { *out = x; }
SPROMPT_INLINE void from_float(float x, bf16* out) {  // round to nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out->bits =
        nan ? static_cast<uint16_t>((bits >> 16) | 0x40u) : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
SPROMPT_INLINE void from_float(float x, f16* out) {  // round to nearest, ties to even
#if defined(__F16C__)
    out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        out->bits = static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
    } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
        out->bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (rest < 0x38800000u) {  // subnormal: the addition of 0.5 rounds to a multiple of 2^-24
        float y;
        __builtin_memcpy(&y, &rest, 4);
        y += 0.5f;
        uint32_t rounded;
        __builtin_memcpy(&rounded, &y, 4);
        out->bits = static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    } else {
        out->bits = static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
    }
#endif
}

SPROMPT_INLINE vf load_as_float(const float* p) { return load(p); }
SPROMPT_INLINE vf load_as_float(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)((vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif defined(__AVX2__)
    return (vf)((vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
    uint16_t half __attribute__((vector_size(2 * W)));
    __builtin_memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vi) << 16);
#endif
}
SPROMPT_INLINE vf load_as_float(const f16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

SPROMPT_INLINE void store_float(float* p, vf v) { store(p, v); }
template <class T>
SPROMPT_INLINE void store_float(T* p, vf v) {
    float lane[W];
    store(lane, v);
    for (int i = 0; i < W; ++i) from_float(lane[i], p + i);
}
SPROMPT_INLINE void store_float(bf16* p, vf v) {  // as from_float, lane by lane
    typedef uint32_t bits_w __attribute__((vector_size(4 * W)));
    typedef uint16_t half_w __attribute__((vector_size(2 * W)));
    const bits_w bits = (bits_w)v, nan = (bits_w)(v != v);
    const bits_w rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    const half_w half = __builtin_convertvector((nan & quiet) | (~nan & rounded), half_w);
    __builtin_memcpy(p, &half, sizeof half);
}
#if defined(__AVX512F__)
SPROMPT_INLINE void store_float(f16* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
SPROMPT_INLINE void store_float(f16* p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Converts x[n], of any element type, to float y[n].
template <class T>
SPROMPT_INLINE void row_to_float(const T* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load_as_float(x + i));
    for (; i < n; ++i) y[i] = to_float(x[i]);
}
template <class T>
SPROMPT_INLINE void row_from_float(const float* x, int64_t n, T* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_float(y + i, load(x + i));
    for (; i < n; ++i) from_float(x[i], y + i);
}

// SPROMPT_FLOAT_TYPES(view.dtype, T, statement) runs the statement with T = float, bf16 or f16.
#define SPROMPT_FLOAT_TYPES(dtype_, T, ...) \
    switch (dtype_) {                       \
        case ::sprompt::DType::bf16: {      \
            using T = bf16;                 \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        case ::sprompt::DType::f16: {       \
            using T = f16;                  \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        default: {                          \
            using T = float;                \
            __VA_ARGS__;                    \
        }                                   \
    }

}  // namespace SPROMPT_ISA
}  // namespace sprompt
