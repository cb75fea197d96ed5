// exp, log, log1p on [0, 1] and the sigmoid on W lanes. The polynomials are minimax in the relative error, fitted in float64.
// The error bounds below include rounding. tests/test_vmath.py measures them against float64 through the losses, with one value
// per mask.
#pragma once

#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

// minimum(a, b) and maximum(a, b) as one instruction. If either operand is NaN, b is returned.
SPROMPT_INLINE vf min_or_second(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif SPROMPT_X86
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    return select(a < b, a, b);
#endif
}
SPROMPT_INLINE vf max_or_second(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif SPROMPT_X86
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select(a > b, a, b);
#endif
}

// e^x within 2 units in the last place. x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 h(r), h of degree 4, relative
// error 3e-9. The argument is clamped to [-87.3, 88.8]: no result is below 1.2e-38, and a result above 3.4e38 is infinite. NaN
// stays NaN.
SPROMPT_INLINE vf exp(vf x) {
    x = max_or_second(broadcast(-87.3f), min_or_second(broadcast(88.8f), x));
    const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = fma(x, broadcast(1.44269504f), magic);
    const vf n = shifted - magic;
    vf r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vf h = broadcast(0.0013814598570010804f);
    h = fma(h, r, broadcast(0.00836871687872159f));
    h = fma(h, r, broadcast(0.04166838804685972f));
    h = fma(h, r, broadcast(0.1666652063172005f));
    h = fma(h, r, broadcast(0.49999993447788793f));
    h = fma(h, r, broadcast(1.0f));
    h = fma(h, r, broadcast(1.0f));
    // The factor 2^n is applied in two steps, since n may be 128.
    const vi k = bits_to_int(shifted) - bits_to_int(magic);
    const vi half = k >> 1;
    return h * bits_to_float((half + 127) << 23) * bits_to_float((k - half + 127) << 23);
}

// e^x for |x| <= 87.3, at three quarters of the cost of exp: within 3 units in the last place for |x| < 10, within 6 elsewhere.
// Where the product is fused, ln 2 is one float (off by 2e-9, n times). h has degree 3 (relative error 1e-7), and 2^n is added
// to the exponent. NaN stays NaN; other x give some number, for lanes that a kernel drops.
SPROMPT_INLINE vf exp_small(vf x) {
    typedef uint32_t bits __attribute__((vector_size(4 * W)));  // their sum may wrap around
    const vf magic = broadcast(12582912.0f);
    const vf shifted = fma(x, broadcast(1.44269504f), magic);
    const vf n = shifted - magic;
#if defined(__FMA__) || defined(__AVX512F__)
    const vf r = fma(n, broadcast(-0.69314718f), x);
#else  // the first part of ln 2 has few bits, so its product with n needs no rounding
    const vf r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
#endif
    vf h = broadcast(0.008312520140562257f);
    h = fma(h, r, broadcast(0.041890156813231855f));
    h = fma(h, r, broadcast(0.16667114650028222f));
    h = fma(h, r, broadcast(0.4999923149539148f));
    h = fma(h, r, broadcast(1.0f));
    h = fma(h, r, broadcast(1.0f));
    return (vf)((bits)h + ((bits)shifted << 23));  // the shift drops the bits of magic
}

// log(1 + e) for e in [0, 1], within 3 units in the last place: e + e^2 h(e), h of degree 7, relative error 4e-8.
SPROMPT_INLINE vf log1p_unit(vf e) {
    vf h = broadcast(0.005613430699595863f);
    h = fma(h, e, broadcast(-0.031102749430195403f));
    h = fma(h, e, broadcast(0.08097488404205627f));
    h = fma(h, e, broadcast(-0.13912691871804933f));
    h = fma(h, e, broadcast(0.19233617140477313f));
    h = fma(h, e, broadcast(-0.24879338647175925f));
    h = fma(h, e, broadcast(0.33324381057675656f));
    h = fma(h, e, broadcast(-0.4999980342927437f));
    return fma(h * e, e, e);
}

// log x for normal x > 0. x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): k ln 2 + f + f^2 h(f), h of degree 7, relative
// error 3e-8. NaN stays NaN; other x give some number.
SPROMPT_INLINE vf log(vf x) {
    const vi k = (bits_to_int(x) - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
    const vf f = bits_to_float(bits_to_int(x) - (k << 23)) - 1.0f;
    vf h = broadcast(0.08734844880252313f);
    h = fma(h, f, broadcast(-0.14307522546770718f));
    h = fma(h, f, broadcast(0.14917973324644052f));
    h = fma(h, f, broadcast(-0.16570508045157994f));
    h = fma(h, f, broadcast(0.19962072148604335f));
    h = fma(h, f, broadcast(-0.2500175525914837f));
    h = fma(h, f, broadcast(0.3333395022138946f));
    h = fma(h, f, broadcast(-0.49999991606358146f));
    const vf y = fma(__builtin_convertvector(k, vf), broadcast(0.693147181f), fma(h * f, f, f));
    return select(x == x, y, x);
}

// The sigmoid uses the division instruction. It runs in parallel with the multiplications, so it costs less than an estimate
// with a Newton step, which adds multiplications. Its bits are the same on every machine.

// 1 / (1 + e^-z) within 4 units in the last place for |z| < 10, within 6 elsewhere. It is never below 1.2e-38. NaN stays NaN.
SPROMPT_INLINE vf sigmoid(vf z) {
    return 1.0f / (exp_small(max_or_second(broadcast(-87.3f), min_or_second(broadcast(87.3f), -z))) + 1.0f);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
