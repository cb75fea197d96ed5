// exp, log and softplus with the same bits on every backend: sprompt/ops/unfused.py is the same in Python, and says what they
// compute and how exactly. Every product, sum and quotient is rounded by itself; the build lets no compiler fuse them.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if defined(SPROMPT_ISA)
#include "common/vec.h"
#endif

#if defined(__CUDACC__)
#define SPROMPT_UNFUSED static __device__ __forceinline__
#else
#define SPROMPT_UNFUSED static SPROMPT_INLINE
#endif

namespace sprompt {

// `Lanes` has the types F (float, or a vector of floats) and I (int32_t, or a vector of these), and select(condition, yes, no),
// to_int(F) and to_float(I) that keep the bits, and converted(I), which keeps the value.
template <class Lanes>
struct Unfused {
    using F = typename Lanes::F;
    using I = typename Lanes::I;

    template <int N>
    SPROMPT_UNFUSED F polynomial(const float (&coefficients)[N], F x) {
        F y = F{} + coefficients[0];
        for (int i = 1; i < N; ++i) y = y * x + coefficients[i];
        return y;
    }

    // x <= 0 or NaN.
    SPROMPT_UNFUSED F exp(F x) {
        constexpr float factors[] = {0.0013814598570010804f,
                                     0.00836871687872159f,
                                     0.04166838804685972f,
                                     0.1666652063172005f,
                                     0.49999993444788793f,
                                     1.0f,
                                     1.0f};
        const auto tiny = x < -80.0f;
        x = Lanes::select(tiny, F{} - 80.0f, x);
        const F shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
        F r = x - n * 0.693359375f;
        r = r - n * -2.12194440e-4f;
        // 0x4b400000: the bits of 12582912. 127: the bias of exponents.
        const F two_to_n = Lanes::to_float((Lanes::to_int(shifted) - (0x4b400000 - 127)) << 23);
        return Lanes::select(tiny, F{}, polynomial(factors, r) * two_to_n);
    }

    // Normal x > 0.
    SPROMPT_UNFUSED F log(F x) {
        constexpr float factors[] = {0.08734844880252313f, -0.14307522546770718f, 0.14917973324644052f, -0.16570508045157994f,
                                     0.19962072148604335f, -0.2500175525914837f,  0.3333395022138946f,  -0.49999991606358146f};
        const I bits = Lanes::to_int(x), step = (bits - 0x3f3504f3) & -0x800000;
        const F f = Lanes::to_float(bits - step) - 1.0f;
        return Lanes::converted(step) * (0.693147181f * 0x1p-23f) + (polynomial(factors, f) * f * f + f);
    }

    // Finite x.
    SPROMPT_UNFUSED F softplus(F x) {
        constexpr float factors[] = {0.005613430699595863f, -0.031102749430195403f, 0.08097488404205627f, -0.13912691871804933f,
                                     0.19233617140477313f,  -0.24879338647175925f,  0.33324381057675656f, -0.4999980342927437f};
        const auto more = x > 0.0f;
        const F e = exp(Lanes::select(more, -x, x));
        return Lanes::select(more, x, F{}) + (polynomial(factors, e) * e * e + e);
    }
};

#if defined(SPROMPT_ISA)

namespace SPROMPT_ISA {

struct Lanes {
    using F = vf;
    using I = vi;
    SPROMPT_UNFUSED F select(I condition, F yes, F no) { return SPROMPT_ISA::select(condition, yes, no); }
    SPROMPT_UNFUSED I to_int(F x) { return bits_to_int(x); }
    SPROMPT_UNFUSED F to_float(I x) { return bits_to_float(x); }
    SPROMPT_UNFUSED F converted(I x) { return __builtin_convertvector(x, F); }
};
using Exact = Unfused<Lanes>;

}  // namespace SPROMPT_ISA

#else  // CUDA C++, behind common/device.cuh

namespace cuda {

struct Lane {
    using F = float;
    using I = int32_t;
    SPROMPT_UNFUSED F select(bool condition, F yes, F no) { return condition ? yes : no; }
    SPROMPT_UNFUSED I to_int(F x) { return __float_as_int(x); }
    SPROMPT_UNFUSED F to_float(I x) { return __int_as_float(x); }
    SPROMPT_UNFUSED F converted(I x) { return static_cast<F>(x); }
};
using Exact = Unfused<Lane>;

}  // namespace cuda

#endif

}  // namespace sprompt
