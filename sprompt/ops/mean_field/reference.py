"""mean_field in plain PyTorch. It computes in float32 (float64 for float64).

In log-odds z = log(x / (1 − x)), with p = −log(1 − x) = softplus(z) and A the sum over a pixel and its neighbours with their
weights, log F = log t + A z − A p and log G = −A p. So F / (F + G + ε) has the log-odds log F − log(G + ε) =
log t + A z − softplus(A p + log ε).

In float32 every product and sum is rounded by itself, in the order written here, and the other backends compute the same bits.
The order of a sum is such that flips and transposition do not change it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import pack
from sprompt.ops.mean_field.op import numbers
from sprompt.ops.unfused import exp, log, softplus

#: Steps (down, right) to the neighbours that share a weight plane with their opposites.
EAST, SOUTH, SOUTH_EAST, SOUTH_WEST = (0, 1), (1, 0), (1, 1), (1, -1)


def shifted(plane: Tensor, down: int, right: int) -> Tensor:
    """The plane (..., h, w) at pixels `down` and `right` of here; 0 outside."""
    h, w = plane.shape[-2:]
    return F.pad(plane, (1, 1, 1, 1))[..., 1 + down : 1 + down + h, 1 + right : 1 + right + w]


def weights(images: Tensor, step: tuple[int, int], factor: float) -> Tensor:
    """The weight (B, h, w) between each pixel and the one at `step`; 0 where this one is outside, or a weight is NaN."""
    d = images - shifted(images, *step)
    red, green, blue = (d * d).unbind(1)
    w = exp(((red + green) + blue) * factor)
    inside = shifted(torch.ones_like(images[:, 0]), *step) > 0
    return torch.where(inside & (w == w), w, 0.0)


def sums(u: Tensor, planes: dict[tuple[int, int], Tensor]) -> Tensor:
    """A u."""
    both = {}
    for step, w in planes.items():
        down, right = step
        both[step] = w * shifted(u, down, right) + shifted(w * u, -down, -right)
    return (u + (both[EAST] + both[SOUTH])) + (both[SOUTH_EAST] + both[SOUTH_WEST])


def mean_field(a: Args) -> Tensor:
    dtype = torch.float64 if torch.float64 in (a.images.dtype, a.start.dtype, a.boxes.dtype) else torch.float32
    images, start, t = (x.to(dtype).contiguous() for x in (a.images, a.start, a.boxes))
    n = numbers(a)
    inside = t >= torch.finfo(torch.float32).tiny
    log_t = torch.where(inside, log(torch.where(inside, t, 1.0)), -torch.inf)
    x = start * t
    x = torch.where(inside & (x > n.low), x, n.low)  # false for NaN
    x = torch.where(x < n.high, x, n.high)
    z = log(x / (1.0 - x)).clamp(n.least, n.most)
    planes = {step: weights(images, step, n.factor) for step in (EAST, SOUTH, SOUTH_EAST, SOUTH_WEST)}
    for _ in range(a.iterations):
        before, p = z, softplus(z)
        z = ((log_t + sums(z, planes)) - softplus(sums(p, planes) + n.epsilon)).clamp(n.least, n.most)
        if torch.equal(z, before):
            break
    return pack(z > 0, 0.0)
