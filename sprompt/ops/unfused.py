"""exp, log and softplus with the same bits on every backend.

In float32 every product, sum and quotient is rounded by itself, in the order written here. csrc/common/unfused.h does the same on
CPUs and in CUDA C++. Kernels whose results must not depend on the backend use these functions: an order of equal scores, or an
iteration that enlarges rounding errors. float64 uses torch's own functions.
"""

import torch
from torch import Tensor

#: Below this exponent exp gives 0. So no number is subnormal.
LEAST_EXPONENT = -80.0
#: e^x = 2^n e^r, n = x / ln 2 rounded. Adding ROUNDER (1.5 · 2^23) rounds to an integer in the low bits. ln 2 is the sum of two
#: floats, and the first has so few bits that its product with n is exact.
LOG2_E, ROUNDER, LN2_HIGH, LN2_LOW = 1.44269504, 12582912.0, 0.693359375, -2.12194440e-4
#: e^r for |r| ≤ ln 2 / 2, the highest power first; minimax in the relative error, like the polynomials below.
EXP = (0.0013814598570010804, 0.00836871687872159, 0.04166838804685972, 0.1666652063172005, 0.49999993444788793, 1.0, 1.0)  # fmt: skip
#: log(1 + f) = f + f² h(f): the coefficients of h for 1 + f between √½ and √2.
LOG = (
    0.08734844880252313, -0.14307522546770718, 0.14917973324644052, -0.16570508045157994, 0.19962072148604335,
    -0.2500175525914837, 0.3333395022138946, -0.49999991606358146,
)  # fmt: skip
#: The same for f in [0, 1].
LOG1P = (
    0.005613430699595863, -0.031102749430195403, 0.08097488404205627, -0.13912691871804933, 0.19233617140477313,
    -0.24879338647175925, 0.33324381057675656, -0.4999980342927437,
)  # fmt: skip
LN2 = 0.693147181
#: The bits of √½, and those of the exponent of a float.
SQRT_HALF, EXPONENT = 0x3F3504F3, -0x800000


def polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, the highest power first."""
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient
    return y


def exp(x: Tensor) -> Tensor:
    """e^x for x ≤ 0, within 3 units in the last place in float32; 0 for x < LEAST_EXPONENT. NaN stays NaN."""
    if x.dtype == torch.float64:
        return x.exp()
    tiny = x < LEAST_EXPONENT
    x = torch.where(tiny, LEAST_EXPONENT, x)
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    two_to_n = (shifted.view(torch.int32) + 127 << 23).view(torch.float32)  # the shift drops the bits of ROUNDER
    return torch.where(tiny, 0.0, polynomial(EXP, r) * two_to_n)


def log(x: Tensor) -> Tensor:
    """log x for normal x > 0, within 4 units in the last place in float32 (near x = 1 too)."""
    if x.dtype == torch.float64:
        return x.log()
    bits = x.contiguous().view(torch.int32)
    step = bits - SQRT_HALF & EXPONENT  # x = 2^k (1 + f), step = 2^23 k
    f = (bits - step).view(torch.float32) - 1.0
    return step.float() * (LN2 * 2.0**-23) + (polynomial(LOG, f) * f * f + f)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + e^−|x|) for finite x, within 4 units in the last place in float32."""
    if x.dtype == torch.float64:
        return torch.logaddexp(x, torch.zeros_like(x))
    more = x > 0
    e = exp(torch.where(more, -x, x))
    return torch.where(more, x, 0.0) + (polynomial(LOG1P, e) * e * e + e)
