// The AVX-512 instructions that the kernels use, as plain loops, for tests only. `cmake -DSPROMPT_EMULATE_AVX512=ON` compiles
// the avx512 level for AVX2 and includes this file first, so that CPUs without AVX-512 can run and test that code. The loops
// follow the documentation of the instruction set. A released build contains none of them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512CD__ 1
#define __AVX512VPOPCNTDQ__ 1
#define __AVX512BF16__ 1

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

// 64 bytes as N lanes of T.
template <class T, int N>
struct Lanes {
    T lane[N];
    template <class V>
    EMULATED Lanes of(V v) {
        static_assert(sizeof(V) == sizeof(Lanes));
        Lanes out;
        __builtin_memcpy(&out, &v, sizeof out);
        return out;
    }
    template <class V>
    inline __attribute__((always_inline)) V as() const {
        static_assert(sizeof(V) == sizeof(Lanes));
        V out;
        __builtin_memcpy(&out, this, sizeof out);
        return out;
    }
};
using F = Lanes<float, 16>;
using D = Lanes<double, 8>;
using I = Lanes<int32_t, 16>;
using Q = Lanes<int64_t, 8>;
using S = Lanes<int16_t, 32>;
using H = Lanes<uint16_t, 32>;

#define EACH(n) for (int i = 0; i < (n); ++i)

EMULATED __m512i setzero_si512() { return Q{}.as<__m512i>(); }
EMULATED __m512i set1_epi32(int x) {
    I r;
    EACH(16) r.lane[i] = x;
    return r.as<__m512i>();
}
EMULATED __m512i setr_epi32(int a0, int a1, int a2, int a3, int a4, int a5, int a6, int a7, int a8, int a9, int a10, int a11,
                            int a12, int a13, int a14, int a15) {
    return I{{a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15}}.as<__m512i>();
}
EMULATED __m512i loadu_si512(const void* p) {
    Q r;
    __builtin_memcpy(&r, p, 64);
    return r.as<__m512i>();
}
EMULATED __m512i maskz_loadu_epi32(__mmask16 k, const void* p) {  // lanes outside the mask are not read
    I r{};
    EACH(16) if (k >> i & 1) __builtin_memcpy(&r.lane[i], static_cast<const char*>(p) + 4 * i, 4);
    return r.as<__m512i>();
}
EMULATED __m256i maskz_set1_epi8(__mmask32 k, char x) {
    Lanes<char, 32> r{};
    EACH(32) if (k >> i & 1) r.lane[i] = x;
    return r.as<__m256i>();
}
EMULATED __m512 mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
    F x = F::of(a), y = F::of(b);
    EACH(16) if (k >> i & 1) x.lane[i] = y.lane[i];
    return x.as<__m512>();
}
EMULATED __m512i and_si512(__m512i a, __m512i b) {
    Q x = Q::of(a), y = Q::of(b);
    EACH(8) x.lane[i] &= y.lane[i];
    return x.as<__m512i>();
}
EMULATED __m512i add_epi64(__m512i a, __m512i b) {
    Q x = Q::of(a), y = Q::of(b);
    EACH(8) x.lane[i] += y.lane[i];
    return x.as<__m512i>();
}
EMULATED __m512i add_epi32(__m512i a, __m512i b) {
    I x = I::of(a), y = I::of(b);
    EACH(16) x.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) + static_cast<uint32_t>(y.lane[i]));
    return x.as<__m512i>();
}
EMULATED __m512i popcnt_epi64(__m512i a) {
    Q x = Q::of(a);
    EACH(8) x.lane[i] = __builtin_popcountll(static_cast<uint64_t>(x.lane[i]));
    return x.as<__m512i>();
}
EMULATED long long reduce_add_epi64(__m512i a) {
    const Q x = Q::of(a);
    long long sum = 0;
    EACH(8) sum += x.lane[i];
    return sum;
}
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    F x = F::of(a), y = F::of(b), z = F::of(c);
    EACH(16) x.lane[i] = __builtin_fmaf(x.lane[i], y.lane[i], z.lane[i]);
    return x.as<__m512>();
}
// The second operand if either operand is NaN or both are zero.
EMULATED __m512 min_ps(__m512 a, __m512 b) {
    F x = F::of(a), y = F::of(b);
    EACH(16) x.lane[i] = x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i];
    return x.as<__m512>();
}
EMULATED __m512 max_ps(__m512 a, __m512 b) {
    F x = F::of(a), y = F::of(b);
    EACH(16) x.lane[i] = x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i];
    return x.as<__m512>();
}
template <int predicate, class T>
EMULATED bool holds(T a, T b) {
    static_assert(predicate == _CMP_GT_OQ || predicate == _CMP_GE_OQ || predicate == _CMP_LT_OQ || predicate == _CMP_LE_OQ ||
                  predicate == _CMP_EQ_OQ || predicate == _CMP_NEQ_UQ);
    switch (predicate) {
        case _CMP_GT_OQ:
            return a > b;
        case _CMP_GE_OQ:
            return a >= b;
        case _CMP_LT_OQ:
            return a < b;
        case _CMP_LE_OQ:
            return a <= b;
        case _CMP_EQ_OQ:
            return a == b;
        default:
            return a != b;
    }
}
template <int predicate>
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
    const F x = F::of(a), y = F::of(b);
    unsigned k = 0;
    EACH(16) k |= static_cast<unsigned>(holds<predicate>(x.lane[i], y.lane[i])) << i;
    return static_cast<__mmask16>(k);
}
template <int predicate>
EMULATED __mmask8 cmp_pd_mask(__m512d a, __m512d b) {
    const D x = D::of(a), y = D::of(b);
    unsigned k = 0;
    EACH(8) k |= static_cast<unsigned>(holds<predicate>(x.lane[i], y.lane[i])) << i;
    return static_cast<__mmask8>(k);
}
template <int predicate>
EMULATED __mmask32 cmp_epi16_mask(__m512i a, __m512i b) {
    static_assert(predicate == _MM_CMPINT_EQ || predicate == _MM_CMPINT_LT || predicate == _MM_CMPINT_LE ||
                  predicate == _MM_CMPINT_NE || predicate == _MM_CMPINT_NLT || predicate == _MM_CMPINT_NLE);
    const S x = S::of(a), y = S::of(b);
    uint32_t k = 0;
    EACH(32) {
        const int16_t p = x.lane[i], q = y.lane[i];
        const bool yes = predicate == _MM_CMPINT_EQ    ? p == q
                         : predicate == _MM_CMPINT_LT  ? p < q
                         : predicate == _MM_CMPINT_LE  ? p <= q
                         : predicate == _MM_CMPINT_NE  ? p != q
                         : predicate == _MM_CMPINT_NLT ? p >= q
                                                       : p > q;
        k |= static_cast<uint32_t>(yes) << i;
    }
    return k;
}
EMULATED __m512i cvtepu16_epi32(__m256i a) {
    uint16_t half[16];
    __builtin_memcpy(half, &a, 32);
    I r;
    EACH(16) r.lane[i] = half[i];
    return r.as<__m512i>();
}
EMULATED __m512 cvtph_ps(__m256i a) {
    uint16_t half[16];
    __builtin_memcpy(half, &a, 32);
    F r;
    EACH(16) r.lane[i] = _cvtsh_ss(half[i]);
    return r.as<__m512>();
}
template <int rounding>
EMULATED __m256i cvtps_ph(__m512 a) {
    const F x = F::of(a);
    uint16_t half[16];
    EACH(16) half[i] = static_cast<uint16_t>(_cvtss_sh(x.lane[i], rounding & 7));
    __m256i r;
    __builtin_memcpy(&r, half, 32);
    return r;
}
EMULATED __m512 permutexvar_ps(__m512i index, __m512 a) {
    const I k = I::of(index);
    const F x = F::of(a);
    F r;
    EACH(16) r.lane[i] = x.lane[k.lane[i] & 15];
    return r.as<__m512>();
}
EMULATED __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {  // bit 4 of the index chooses b
    const I k = I::of(index);
    const F x = F::of(a), y = F::of(b);
    F r;
    EACH(16) r.lane[i] = k.lane[i] & 16 ? y.lane[k.lane[i] & 15] : x.lane[k.lane[i] & 15];
    return r.as<__m512>();
}
template <int scale>
EMULATED __m512 i32gather_ps(__m512i index, const void* p) {
    const I k = I::of(index);
    F r;
    EACH(16) __builtin_memcpy(&r.lane[i], static_cast<const char*>(p) + static_cast<int64_t>(k.lane[i]) * scale, 4);
    return r.as<__m512>();
}
template <int scale>
EMULATED __m512d i32gather_pd(__m256i index, const void* p) {
    int32_t k[8];
    __builtin_memcpy(k, &index, sizeof k);
    D r;
    EACH(8) __builtin_memcpy(&r.lane[i], static_cast<const char*>(p) + static_cast<int64_t>(k[i]) * scale, 8);
    return r.as<__m512d>();
}
EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
    const Q x = Q::of(a), y = Q::of(b);
    Q r;
    EACH(8) {
        const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(x.lane[i])) * static_cast<uint32_t>(y.lane[i]);
        __builtin_memcpy(&r.lane[i], &product, 8);
    }
    return r.as<__m512i>();
}
EMULATED __m512i maskz_compress_epi32(__mmask16 k, __m512i a) {
    const I x = I::of(a);
    I r{};
    int next = 0;
    EACH(16) if (k >> i & 1) r.lane[next++] = x.lane[i];
    return r.as<__m512i>();
}
template <int order>
EMULATED __m512i shuffle_epi32(__m512i a) {
    const I x = I::of(a);
    I r;
    EACH(16) r.lane[i] = x.lane[i / 4 * 4 + (order >> 2 * (i % 4) & 3)];
    return r.as<__m512i>();
}
template <int table>
EMULATED __m512i ternarylogic_epi64(__m512i a, __m512i b, __m512i c) {
    static_assert(table == 0x96, "only the exclusive or is emulated");
    const Q x = Q::of(a), y = Q::of(b), z = Q::of(c);
    Q r;
    EACH(8) r.lane[i] = x.lane[i] ^ y.lane[i] ^ z.lane[i];
    return r.as<__m512i>();
}
EMULATED __m256 castps512_ps256(__m512 a) {
    __m256 r;
    __builtin_memcpy(&r, &a, 32);
    return r;
}
template <int half>
EMULATED __m256 extractf32x8_ps(__m512 a) {
    __m256 r;
    __builtin_memcpy(&r, reinterpret_cast<const char*>(&a) + 32 * half, 32);
    return r;
}
// Each lane: c + the product of the odd elements, then + the product of the even elements.
EMULATED __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    F r = F::of(c);
    const H x = H::of(a), y = H::of(b);
    const auto wide = [](uint16_t h) {
        const uint32_t bits = static_cast<uint32_t>(h) << 16;
        float f;
        __builtin_memcpy(&f, &bits, 4);
        return f;
    };
    EACH(16) {
        r.lane[i] = __builtin_fmaf(wide(x.lane[2 * i + 1]), wide(y.lane[2 * i + 1]), r.lane[i]);
        r.lane[i] = __builtin_fmaf(wide(x.lane[2 * i]), wide(y.lane[2 * i]), r.lane[i]);
    }
    return r.as<__m512>();
}

#undef EACH
#undef EMULATED

}  // namespace emulated

#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm256_maskz_set1_epi8 emulated::maskz_set1_epi8
#define _mm512_and_si512 emulated::and_si512
#define _mm512_add_epi64 emulated::add_epi64
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_popcnt_epi64 emulated::popcnt_epi64
#define _mm512_reduce_add_epi64 emulated::reduce_add_epi64
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::cmp_ps_mask<predicate>(a, b)
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask(a, b, predicate) emulated::cmp_pd_mask<predicate>(a, b)
#undef _mm512_cmp_epi16_mask
#define _mm512_cmp_epi16_mask(a, b, predicate) emulated::cmp_epi16_mask<predicate>(a, b)
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps(index, p, scale) emulated::i32gather_ps<scale>(index, p)
#undef _mm512_i32gather_pd
#define _mm512_i32gather_pd(index, p, scale) emulated::i32gather_pd<scale>(index, p)
#define _mm512_maskz_compress_epi32 emulated::maskz_compress_epi32
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(a, order) emulated::shuffle_epi32<order>(a)
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64(a, b, c, table) emulated::ternarylogic_epi64<table>(a, b, c)
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_castps512_ps256 emulated::castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, half) emulated::extractf32x8_ps<half>(a)
#define _mm512_dpbf16_ps emulated::dpbf16_ps
