"""The functions of sprompt/ops/unfused.py, compared with float64. Kernels that use them are compared with it to the bit, in the
tests of their ops."""

import math

import pytest
import torch
from torch import Tensor

from sprompt.ops import unfused


def last_places(actual: Tensor, exact: Tensor) -> float:
    """Largest error in units in the last place of the exact value."""
    unit = 2.0 ** (exact.abs().log2().floor() - 23)
    return float(((actual.double() - exact) / unit).abs().max())


def test_exponential() -> None:
    x = torch.cat((torch.linspace(-80, 0, 100_001), torch.tensor([-80.001, -math.inf, math.nan])))
    y = unfused.exp(x)
    assert y[-3:-1].tolist() == [0, 0] and y[-1].isnan() and y[100_000] == 1
    assert last_places(y[:-3], x[:-3].double().exp()) < 3


def test_logarithm() -> None:
    wide = torch.logspace(-37.9, 38.5, 100_001).clamp(min=torch.finfo(torch.float32).tiny)
    near = torch.cat([1 + torch.linspace(0, 1, 100_001) ** 3 * side for side in (1.0, -0.9)])
    x = torch.cat((wide, near))
    x = x[x != 1]
    assert last_places(unfused.log(x), x.double().log()) < 4
    assert unfused.log(torch.ones(1)) == 0 and unfused.log(torch.tensor(math.inf)) < 89


def test_softplus() -> None:
    x = torch.linspace(-79, 200, 200_001)
    y = unfused.softplus(x)
    assert last_places(y, torch.logaddexp(x.double(), torch.zeros(1, dtype=torch.float64))) < 4
    assert unfused.softplus(torch.tensor(-81.0)) == 0


@pytest.mark.parametrize("name", ("exp", "log", "softplus"))
def test_float64_is_exact(name: str) -> None:
    x = torch.linspace(-30, 0, 1001, dtype=torch.float64) if name != "log" else torch.logspace(-9, 9, 1001).double()
    exact = {"exp": torch.exp, "log": torch.log, "softplus": lambda x: torch.log1p(x.exp())}[name](x)
    torch.testing.assert_close(getattr(unfused, name)(x), exact, rtol=1e-13, atol=0)
