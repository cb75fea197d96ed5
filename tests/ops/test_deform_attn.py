"""deform_attn: tables by hand, gradients against autograd of the plain formula, NaN, channels and threads."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sprompt import native, use_backend
from sprompt.ops import deform_attn
from sprompt.testing.spec import random
from sprompt.testing.specs.deform_attn import MAPS, _draw, _eager, _encoder

MAP = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])  # h 2, w 3


def sampled(x: float, y: float) -> tuple[float, list[float], list[list[float]]]:
    """The sample of MAP at pixel (x, y), its gradient by x and y in cells, and its gradient to the map."""
    values = MAP.reshape(1, 6, 1, 1).clone().requires_grad_()
    place = torch.tensor([(x + 0.5) / 3, (y + 0.5) / 2]).reshape(1, 1, 1, 1, 1, 2).requires_grad_()
    out = deform_attn(values, [(2, 3)], place, torch.ones(1, 1, 1, 1, 1))
    out.sum().backward()
    return out.item(), (place.grad.flatten() / torch.tensor([3.0, 2.0])).tolist(), values.grad.reshape(2, 3).tolist()


@pytest.mark.parametrize(
    ("x", "y", "value", "by", "cells"),
    (
        (0.5, 0.5, 6.75, (4.5, 10.5), [[0.25, 0.25, 0], [0.25, 0.25, 0]]),
        (1.25, 0.0, 2.5, (2.0, 17.5), [[0, 0.75, 0.25], [0, 0, 0]]),
        (-0.5, 0.0, 0.5, (1.0, 3.5), [[0.5, 0, 0], [0, 0, 0]]),  # the left half of the sample is outside
        (2.5, 1.5, 8.0, (-16.0, -16.0), [[0, 0, 0], [0, 0, 0.25]]),
        (0.5, -0.75, 0.375, (0.25, 1.5), [[0.125, 0.125, 0], [0, 0, 0]]),
        (3.0, 0.5, 0.0, (0.0, 0.0), [[0, 0, 0], [0, 0, 0]]),
        (0.0, 2.0, 0.0, (0.0, 0.0), [[0, 0, 0], [0, 0, 0]]),
        (-1.25, 0.0, 0.0, (0.0, 0.0), [[0, 0, 0], [0, 0, 0]]),
        (math.nan, 0.5, 0.0, (0.0, 0.0), [[0, 0, 0], [0, 0, 0]]),
        (0.5, math.inf, 0.0, (0.0, 0.0), [[0, 0, 0], [0, 0, 0]]),
    ),
)
def test_table(x: float, y: float, value: float, by: tuple[float, float], cells: list[list[float]]) -> None:
    found, found_by, found_cells = sampled(x, y)
    for actual, expected in ((found, value), (found_by, by), (found_cells, cells)):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "y"), ((-1.0, 0.5), (0.5, -1.0), (3.0, 1.0), (1.0, 2.0)))
def test_a_point_one_cell_outside_samples_nothing(x: float, y: float) -> None:
    """Such a point lies exactly on the border of the domain. Sizes are powers of 2, so that its coordinates are exact."""
    values = torch.ones(1, 8, 1, 1, requires_grad=True)
    exact = torch.tensor([(x * 4 / 3 if x > 2 else x) + 0.5, y + 0.5]) / torch.tensor([4.0, 2.0])
    points = exact.reshape(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.ones(1, 1, 1, 1, 1, requires_grad=True)
    out = deform_attn(values, [(2, 4)], points, weights)
    out.backward(torch.full_like(out, float("nan")))
    assert out.item() == 0
    assert not any(leaf.grad.any() for leaf in (values, points, weights))  # NaN counts as true


def test_levels_points_and_heads_by_hand() -> None:
    """Two heads that swap the levels, with different weights."""
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]]).reshape(1, 3, 2, 1)  # levels of 1x2 and 1x1 cells
    points = torch.tensor([[0.25, 0.5], [0.5, 0.5]]).expand(1, 1, 2, 2, 2, 2)  # centre of the first cell; of the map
    weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.0], [0.0, 0.0]]]).reshape(1, 1, 2, 2, 2)
    out = deform_attn(values, ((1, 2), (1, 1)), points, weights)
    assert out.tolist() == [[[1 * 1 + 2 * 1.5 + 3 * 0.75 * 5 + 4 * 5, 0.5 * 10]]]


def leaves(sample: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in sample]


def results(
    function: Callable[..., Tensor], shapes: object, drawn: list[Tensor], **kwargs: object
) -> tuple[Tensor, ...]:
    """The output and the three gradients."""
    values, points, weights = drawn
    out = function(values, shapes, points, weights, **kwargs)
    grad = torch.randn(out.shape, generator=random(9)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, drawn, grad)


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-5 * float(e.abs().max()))


@pytest.mark.parametrize("D", (1, 3, 4, 8, 12, 16, 24, 32, 33, 48, 64, 80, 100, 128, 129))
def test_every_number_of_channels(D: int) -> None:
    shapes = ((5, 9), (2, 3))
    drawn = _draw(2, 11, 2, D, shapes, 3, D)
    assert_near(results(deform_attn, shapes, leaves(drawn)), results(_eager, shapes, leaves(drawn, torch.float64)))


@pytest.mark.parametrize("Q", (1, 15, 16, 17, 64, 65, 130))
@pytest.mark.parametrize("T", (1, 2, 5, 9))
def test_every_number_of_queries_and_points(Q: int, T: int) -> None:
    shapes = ((4, 4), (7, 2), (1, 3))
    drawn = _draw(1, Q, 2, 8, shapes, T, Q + T, low=-0.4, high=1.4)
    assert_near(results(deform_attn, shapes, leaves(drawn)), results(_eager, shapes, leaves(drawn, torch.float64)))


def test_an_encoder_at_full_size() -> None:
    """22 050 queries, compared on one head."""
    sample = _encoder(1)(torch.device("cpu"), torch.float32, 0)
    values, _, points, weights = (t[:, :, :1] if isinstance(t, Tensor) else t for t in sample.args)
    out = deform_attn(values, MAPS, points, weights)
    expected = _eager(values.double(), MAPS, points.double(), weights.double())
    # A coordinate below 168 has a rounding error of 8e-6 cells.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_numbers_per_level_equal_padding_with_weights_of_0() -> None:
    shapes, numbers = ((4, 5), (3, 2), (2, 2)), (3, 1, 2)
    values, points, weights = _draw(2, 6, 2, 8, shapes, 3, 5)
    picked = [3 * v + t for v, number in enumerate(numbers) for t in range(number)]
    masked = weights.flatten(3).clone()
    masked[..., [i for i in range(9) if i not in picked]] = 0
    expected = results(deform_attn, shapes, leaves((values, points, masked.reshape(weights.shape))))
    listed = leaves((values, points.flatten(3, 4)[:, :, :, picked], weights.flatten(3)[..., picked]))
    out, to_values, to_points, to_weights = results(deform_attn, shapes, listed, per_level=numbers)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(to_values, expected[1])
    torch.testing.assert_close(to_points, expected[2].flatten(3, 4)[:, :, :, picked])
    torch.testing.assert_close(to_weights, expected[3].flatten(3)[..., picked])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_values_with_float32_points_are_read_exactly(dtype: torch.dtype) -> None:
    """The results equal those of the same numbers in float32, rounded once. Sums over channels may have another order."""
    shapes = ((6, 7), (3, 3))
    values, points, weights = _draw(2, 30, 2, 32, shapes, 4, 3)
    half = [values.to(dtype).requires_grad_(), *leaves((points, weights))[:2]]
    full = leaves((values.to(dtype), points, weights))
    grad = torch.randn(2, 30, 64, generator=random(4)).to(dtype)
    out, wide_out = deform_attn(half[0], shapes, *half[1:]), deform_attn(full[0], shapes, *full[1:])
    assert out.dtype == dtype and torch.equal(out, wide_out.to(dtype))
    found = torch.autograd.grad(out, half, grad)
    expected = torch.autograd.grad(wide_out, full, grad.float())
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    assert torch.equal(found[0], expected[0].to(dtype))
    for a, e in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-6 * float(e.abs().max()))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_a_gradient_that_is_not_finite_is_nan_where_it_reaches(bad: float) -> None:
    """Query 1 of head 0 samples cell 0 only; its channel 2 is not finite."""
    values, points, weights = leaves(
        (torch.ones(1, 6, 2, 3), torch.full((1, 3, 2, 1, 1, 2), 0.5), torch.ones(1, 3, 2, 1, 1))
    )
    with torch.no_grad():
        points[0, 1, 0, 0, 0] = torch.tensor([0.5 / 3, 0.25])
    grad = torch.ones(1, 3, 6)
    grad[0, 1, 2] = bad
    to_values, to_points, to_weights = torch.autograd.grad(
        deform_attn(values, ((2, 3),), points, weights), (values, points, weights), grad
    )
    assert to_values[0, 0, 0].isnan().tolist() == [False, False, True]
    assert to_points[0, 1, 0].isnan().all() and to_weights[0, 1, 0].isnan().all()
    assert to_weights.isnan().sum() == 1 and to_points.isnan().sum() == 2
    assert not to_values[0, :, 1].isnan().any()


def test_values_outside_of_a_sample_have_no_influence() -> None:
    """Not even NaN: the corners outside of a map are not read, nor are other levels and heads."""
    shapes = ((2, 3), (3, 3))
    values, points, weights = _draw(1, 40, 2, 8, shapes, 4, 6, low=-0.5, high=1.5)
    weights[:, :, :, 1], points[:, :, :, 1] = float("nan"), 2.0
    values[:, 6:] = float("inf")
    found = results(deform_attn, shapes, leaves((values, points, weights)))
    assert all(t.isfinite().all() for t in found)
    first = leaves((values[:, :6], points[:, :, :, :1], weights[:, :, :, :1]))
    assert torch.equal(found[0], results(deform_attn, shapes[:1], first)[0])


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_gradients_that_are_needed(needed: int) -> None:
    shapes = ((4, 5), (2, 2))
    drawn = _draw(1, 20, 2, 32, shapes, 2, 7)
    every = results(deform_attn, shapes, leaves(drawn))[1:]
    some = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(drawn)]
    out = deform_attn(some[0], shapes, *some[1:])
    out.backward(torch.randn(out.shape, generator=random(9)))
    for leaf, expected in zip(some, every, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)


@pytest.mark.skipif(native._C is None, reason=native.why_not())
@pytest.mark.parametrize(("B", "H", "D"), ((1, 1, 32), (1, 2, 64), (2, 8, 32), (1, 1, 20)))
def test_same_bits_on_any_number_of_threads(B: int, H: int, D: int) -> None:
    shapes = ((9, 8), (5, 4))
    drawn = _draw(B, 300, H, D, shapes, 4, 8)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 16, 40):
            torch.set_num_threads(threads)
            with use_backend("native"):
                found.append(results(deform_attn, shapes, leaves(drawn)))
    finally:
        torch.set_num_threads(before)
    for result in found:
        assert all(torch.equal(a, e) for a, e in zip(result, found[0], strict=True))
