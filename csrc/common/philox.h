// Philox4x32-10, a counter-based generator (Salmon et al. 2011; Random123): four random words are a function of a counter of
// four words and a key of two words. Every backend draws the same numbers, in any order. sprompt/ops/points/philox.py is the
// same function in Python.
//
// Words are the low 32 bits of 64-bit lanes. The upper 32 bits may hold anything. A lane type is uint64_t, also in CUDA C++, or
// in a kernel file for CPUs `v64`, W / 2 lanes.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if defined(__CUDACC__)
#define SPROMPT_PHILOX __host__ __device__ __forceinline__
#else
#define SPROMPT_PHILOX SPROMPT_INLINE
#endif

namespace sprompt {

// The keys of the ten rounds, of a 64-bit seed.
struct PhiloxKeys {
    uint64_t low[10], high[10];

    SPROMPT_PHILOX explicit PhiloxKeys(int64_t seed) {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        for (int i = 0; i < 10; ++i) {
            low[i] = k0;
            high[i] = k1;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }
};

// Replaces the counter c[4] by the four random words. Arithmetic::product(lane, number) multiplies the word of a lane by a
// 32-bit number, and Arithmetic::mix(a, b, key) is the exclusive or of the three.
template <class Arithmetic, class U>
SPROMPT_PHILOX void philox(const PhiloxKeys& keys, U* c) {
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) {
        const U a = Arithmetic::product(c[0], 0xD2511F53u), b = Arithmetic::product(c[2], 0xCD9E8D57u);
        c[0] = Arithmetic::mix(Arithmetic::high(b), c[1], keys.low[i]);
        c[2] = Arithmetic::mix(Arithmetic::high(a), c[3], keys.high[i]);
        c[1] = b;
        c[3] = a;
    }
}

}  // namespace sprompt

#if defined(SPROMPT_ISA)
#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

typedef uint64_t v64 __attribute__((vector_size(4 * W)));
typedef uint32_t v32 __attribute__((vector_size(4 * W)));

struct LaneArithmetic {
    static SPROMPT_INLINE v64 product(v64 a, uint32_t b) {
        const v64 other = static_cast<uint64_t>(b) - v64{};
#if defined(__AVX512F__)
        return (v64)_mm512_mul_epu32((__m512i)a, (__m512i)other);
#elif defined(__AVX2__)
        return (v64)_mm256_mul_epu32((__m256i)a, (__m256i)other);
#elif SPROMPT_X86
        return (v64)_mm_mul_epu32((__m128i)a, (__m128i)other);
#else
        return (a & 0xffffffffu) * other;
#endif
    }
    // On x86 a shuffle, since the ports of shifts are those of products.
    static SPROMPT_INLINE v64 high(v64 a) {
#if defined(__AVX512F__)
        return (v64)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#elif defined(__AVX2__)
        return (v64)_mm256_shuffle_epi32((__m256i)a, 0xf5);
#elif SPROMPT_X86
        return (v64)_mm_shuffle_epi32((__m128i)a, 0xf5);
#else
        return a >> 32;
#endif
    }
    static SPROMPT_INLINE v64 mix(v64 a, v64 b, uint64_t key) {
#if defined(__AVX512F__)  // one instruction
        return (v64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)(key - v64{}), 0x96);
#else
        return a ^ b ^ key;
#endif
    }
};

// Points (x, y) in [0, 1)^2 of W indices >= 0 of one mask: counter (mask, index), low halves first; x and y are the first two
// words >> 8, times 2^-24.
SPROMPT_INLINE void draw_points(const PhiloxKeys& keys, int64_t mask, vi index, vf& x, vf& y) {
    const uint64_t low = static_cast<uint32_t>(mask), high = static_cast<uint64_t>(mask) >> 32;
    v64 even[4] = {low - v64{}, high - v64{}, (v64)index & 0xffffffffu, v64{}};
    v64 odd[4] = {even[0], even[1], (v64)index >> 32, v64{}};
    philox<LaneArithmetic>(keys, even);
    philox<LaneArithmetic>(keys, odd);
    const auto place = [](v64 a, v64 b) __attribute__((always_inline)) {
        const v32 words = (v32)((a & 0xffffffffu) | b << 32);
        return __builtin_convertvector((vi)(words >> 8), vf) * 0x1p-24f;
    };
    x = place(even[0], odd[0]);
    y = place(even[1], odd[1]);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
#endif
