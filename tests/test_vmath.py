"""The vector functions of csrc/common/vmath.h, compared with float64 through the ops that use them, with one value a mask."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt import native
from sprompt.ops import mask_loss, match_cost

pytestmark = pytest.mark.skipif(native._C is None, reason=native.why_not())

#: The values go down to -60. Lanes behind the end of a row hold probabilities of 1e-38, and a smaller sum would show them.
VALUES = torch.cat((torch.linspace(-60, 80, 40001), torch.linspace(-2, 2, 20001), torch.logspace(-30, 1.9, 4001)))


def last_places(actual: Tensor, exact: Tensor) -> Tensor:
    """Largest error in units in the last place of the exact value."""
    _, exponent = torch.frexp(exact)
    return ((actual.double() - exact) / torch.exp2((exponent - 24).double())).abs().max()


def test_softplus() -> None:
    """Cross-entropy against an empty target is log(1 + e^z): exp, log1p and their sum."""
    bce, _ = mask_loss(VALUES.view(-1, 1, 1), torch.zeros(len(VALUES), 1, 1))
    assert last_places(bce, F.softplus(VALUES.double(), threshold=1000)) < 7


def test_sigmoid() -> None:
    """Cost of the cross-entropy term alone against a full target of one pixel is -p."""
    z = VALUES[VALUES > -15]  # the cost takes p from 1 - p, in float64
    cost = match_cost(z.view(1, -1, 1, 1), torch.ones(1, 1, 1, 1), weights=(0, 1, 0))
    assert last_places(-cost.flatten(), z.double().sigmoid()) < 7


def test_slope() -> None:
    """The gradient of the cross-entropy against an empty target is p."""
    leaf = VALUES.view(-1, 1, 1).clone().requires_grad_()
    mask_loss(leaf, torch.zeros(len(VALUES), 1, 1))[0].sum().backward()
    assert leaf.grad is not None
    assert last_places(leaf.grad.flatten(), VALUES.double().sigmoid()) < 7


def test_log() -> None:
    """The focal cost of one class: log of a probability between 1e-12 and 1."""
    z = VALUES[VALUES.abs() < 20]
    cost = match_cost(
        torch.zeros(1, len(z), 1, 1),
        torch.zeros(1, 1, 1, 1),
        z.view(1, -1, 1),
        torch.zeros(1, 1).long(),
        weights=(1, 0, 0),
    )
    q, rest = z.double().sigmoid(), (-z.double()).sigmoid()
    positive, negative = -0.25 * rest**2 * (q + 1e-12).log(), -0.75 * q**2 * (rest + 1e-12).log()
    assert ((cost.flatten() - (positive - negative)).abs() / (positive + negative)).max() < 1e-6


def test_extremes() -> None:
    far = torch.tensor([1e30, -1e30, 3e38, -3e38, 100.0, -100.0, float("nan")])
    bce, dice = mask_loss(far.view(-1, 1, 1), torch.ones(7, 1, 1))
    assert bce[:6:2].max() < 1e-36 and torch.equal(bce[1:6:2], -far[1:6:2])
    torch.testing.assert_close(dice[:6], torch.tensor([1 - 2 / 2.002, 1.0] * 3), rtol=1e-5, atol=0)
    assert bce[6].isnan() and dice[6].isnan()
