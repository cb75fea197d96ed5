// exp, log1p on [0, 1] and the sigmoid family on W lanes. Relative error below 3 units in the last place
// (tests/test_vmath.py measures it against float64 through the losses that use them).
#pragma once

#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

// e^x. x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial to r^7 (error < 1e-8). The argument is held to
// [-87.4, 88.8]: nothing is below 1.1e-38, and above 3.4e38 the result is infinite. NaN stays NaN.
SPROMPT_INLINE vf exp(vf x) {
    x = select(x > 88.8f, broadcast(88.8f), x);
    x = select(x < -87.4f, broadcast(-87.4f), x);
    const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = fma(x, broadcast(1.44269504f), magic);
    const vf n = shifted - magic;
    vf r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vf p = broadcast(1.0f / 5040.0f);
    p = fma(p, r, broadcast(1.0f / 720.0f));
    p = fma(p, r, broadcast(1.0f / 120.0f));
    p = fma(p, r, broadcast(1.0f / 24.0f));
    p = fma(p, r, broadcast(1.0f / 6.0f));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p, r, broadcast(1.0f));
    p = fma(p, r, broadcast(1.0f));
    // 2^n in two steps, since n may be 128.
    const vi k = bits_to_int(shifted) - bits_to_int(magic);
    const vi half = k >> 1;
    return p * bits_to_float((half + 127) << 23) * bits_to_float((k - half + 127) << 23);
}

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3, by its series to s^15 (relative error < 1e-8).
SPROMPT_INLINE vf log1p_unit(vf e) {
    const vf s = e / (e + 2.0f);
    const vf t = s * s;
    vf p = broadcast(2.0f / 15.0f);
    p = fma(p, t, broadcast(2.0f / 13.0f));
    p = fma(p, t, broadcast(2.0f / 11.0f));
    p = fma(p, t, broadcast(2.0f / 9.0f));
    p = fma(p, t, broadcast(2.0f / 7.0f));
    p = fma(p, t, broadcast(2.0f / 5.0f));
    p = fma(p, t, broadcast(2.0f / 3.0f));
    p = fma(p, t, broadcast(2.0f));
    return p * s;
}

// 1 / (1 + e^-z), without overflow on either side.
SPROMPT_INLINE vf sigmoid(vf z) {
    const vf e = exp(-absolute(z));
    return select(z < 0.0f, e, broadcast(1.0f)) / (e + 1.0f);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
