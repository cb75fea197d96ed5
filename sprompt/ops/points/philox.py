"""Points from Philox4x32-10 (Salmon et al. 2011, the generator of Random123) in int64 arithmetic. The compiled kernels have the
same function in csrc/common/philox.h.

The counter of a point is (mask, index), two 64-bit numbers, and the key is the 64-bit seed. The lower half of a number comes
first. Words r₀ and r₁ of the result give x, y = (r₀ >> 8, r₁ >> 8) · 2⁻²⁴: multiples of 2⁻²⁴ in [0, 1), exact in float32.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after every round
_ROUNDS = 10

Words = tuple[Tensor, ...]


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two 32-bit words. No step passes 2⁴⁹, since int64 has a sign."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _LOW


def philox(counter: Words, key: Words) -> Words:
    """The four words of a counter of four words under a key of two words. Words are int64 in [0, 2³²); they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def draw(seed: Tensor, masks: int, index: Tensor) -> Tensor:
    """The points of these indices: float32 (masks, T, 2) for int64 index (T,) or (masks, T)."""
    mask = torch.arange(masks, device=seed.device)[:, None]
    halves = (mask & _LOW, mask >> 32, index & _LOW, index >> 32)
    words = philox(halves, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack([(word >> 8).float() * 2.0**-24 for word in words[:2]], -1)
