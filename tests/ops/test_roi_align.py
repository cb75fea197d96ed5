"""roi_align: levels, borders and gradients by hand, linear maps, sizes around the width of a register, layouts, torchvision."""

import math

import pytest
import torch
from torch import Tensor

from sprompt.ops import roi_align
from sprompt.testing.spec import random
from sprompt.testing.specs.roi_align import PICTURE, STRIDES, _boxes, _detections, _eager, _maps, _oracle


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor([boxes], dtype=torch.float32)


# -- the level


@pytest.mark.parametrize(
    ("width", "height", "level"),
    (
        (10.0, 10.0, 0),
        (111.99, 111.99, 0),
        (112.0, 112.0, 1),  # √area / 56 = 2
        (111.99997, 111.99997, 1),  # 2 − 5e-7, and 1e-6 is added
        (223.99, 223.99, 1),
        (224.0, 224.0, 2),
        (64.0, 784.0, 2),  # the area counts, not a side
        (447.9, 448.0, 2),
        (448.0, 448.0, 3),
        (9000.0, 9000.0, 3),
        (1e25, 1e25, 3),  # the area is infinite in float32
        (0.0, 900.0, 0),
        (900.0, 0.0, 0),
        (0.0, 0.0, 0),
        (-300.0, -300.0, 0),  # the product of the sides would be positive
        (-300.0, 300.0, 0),
    ),
)
def test_level(width: float, height: float, level: int) -> None:
    """The map of level v holds v + 1 everywhere, and is so large that it holds the sample at the centre of the box."""
    maps = [torch.full((1, 1, 64, 64), float(v + 1)) for v in range(4)]
    # An inverted box has no width, so that its sample lies at x1.
    x1, y1 = 128 - max(width, 0) / 2, 128 - max(height, 0) / 2
    out = roi_align(maps, boxes_of((x1, y1, x1 + width, y1 + height)), 1, sampling=1)
    assert out.item() == level + 1


def test_levels_of_a_pyramid_of_two() -> None:
    maps = [torch.full((1, 1, 64, 64), 1.0), torch.full((1, 1, 32, 32), 2.0)]
    boxes = boxes_of((10, 10, 30, 30), (60, 60, 180, 180), (10, 10, 800, 800))
    assert roi_align(maps, boxes, 1, strides=(4, 8), sampling=1).flatten().tolist()[:2] == [1, 2]
    assert roi_align(maps[:1], boxes, 1, strides=(4,), sampling=1).flatten().tolist()[:2] == [1, 1]


# -- places of samples


@pytest.mark.parametrize(
    ("x", "value"),
    (
        (1.5, 4.0),  # the centre of cell 1
        (2.0, 6.0),  # between the centres of cells 1 and 2
        (0.5, 2.0),
        (0.25, 2.0),  # left of the first centre: moved to it
        (-0.5, 2.0),  # column -1
        (-0.5625, 0.0),
        (4.5, 16.0),  # column 4, the width
        (3.75, 16.0),
        (4.5625, 0.0),
        (1e30, 0.0),
        (-1e30, 0.0),
    ),
)
@pytest.mark.parametrize("along_y", (False, True))
def test_one_sample(x: float, value: float, along_y: bool) -> None:
    """A box without size has all its samples at one place."""
    row = torch.tensor([2.0, 4.0, 8.0, 16.0])
    level = row.expand(1, 1, 5, 4)
    box = (x, 2.5, x, 2.5)
    if along_y:
        level, box = level.mT, (2.5, x, 2.5, x)
    assert roi_align([level], boxes_of(box), 2, strides=(1,)).flatten().tolist() == [value] * 4


def test_bins_of_a_linear_map_are_its_values_at_their_centres() -> None:
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    level = (3 * x - 2 * y + 1).reshape(1, 1, 20, 30)
    x1, y1, x2, y2 = 10.0, 14.0, 100.0, 66.0
    centre = (torch.arange(5.0) + 0.5) / 5
    column, row = (x1 + (x2 - x1) * centre) / 4 - 0.5, (y1 + (y2 - y1) * centre) / 4 - 0.5
    for sampling in (1, 2, 3):
        out = roi_align([level], boxes_of((x1, y1, x2, y2)), 5, strides=(4,), sampling=sampling)
        torch.testing.assert_close(out[0, 0, 0], 3 * column - 2 * row[:, None] + 1)


# -- gradients


def gradient(shape: tuple[int, int], boxes: Tensor, size: int, **kwargs: object) -> list[list[float]]:
    level = torch.zeros(1, 1, *shape, requires_grad=True)
    roi_align([level], boxes, size, strides=(1,), **kwargs).sum().backward()
    return level.grad[0, 0].tolist()


def test_gradient_by_hand() -> None:
    # the samples (0.75, 0.5) and (1.75, 0.5) in cells
    assert gradient((2, 4), boxes_of((0.75, 0.75, 2.75, 1.25)), 1, sampling=1) == [[0, 0.375, 0.125, 0]] * 2
    # columns 0.25 and 0.75 in each of two bins, and row 0
    assert gradient((1, 3), boxes_of((0.5, 0.5, 1.5, 0.5)), 1) == [[0.5, 0.5, 0]]
    # columns -2.5, -0.5, 1.5 and 3.5; the outer two are 0, the others at the outer cells, in four rows of bins
    assert gradient((1, 2), boxes_of((-3, 0.5, 5, 0.5)), 4, sampling=1) == [[4.0, 4.0]]
    # boxes add up; the last one is not finite
    boxes = boxes_of((1.5, 0.5, 1.5, 0.5), (2, 0.5, 2, 0.5), (1, 0, math.nan, 1))
    assert gradient((1, 4), boxes, 1) == [[0, 1.5, 0.5, 0]]
    assert gradient((1, 4), boxes, 1, counts=torch.tensor([1])) == [[0, 1, 0, 0]]


def test_boxes_have_no_gradient() -> None:
    maps, boxes = _maps(1, 2, ((6, 6),), 0), boxes_of((2, 2, 20, 20)).requires_grad_()
    assert not roi_align(maps, boxes, 2, strides=(4,)).requires_grad
    maps[0].requires_grad_()
    roi_align(maps, boxes, 2, strides=(4,)).sum().backward()
    assert boxes.grad is None and maps[0].grad is not None


def test_only_the_maps_that_need_a_gradient_get_one() -> None:
    boxes = _boxes(1, 8, 80, 104, 1)
    every = [m.requires_grad_() for m in _maps(1, 4, ((20, 26), (10, 13)), 0)]
    some = [every[0].detach(), every[1].detach().requires_grad_()]
    for maps in (every, some):
        roi_align(maps, boxes, 3, strides=(4, 8)).square().sum().backward()
    assert some[0].grad is None and torch.equal(some[1].grad, every[1].grad) and every[0].grad.any()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_stays_in_the_cells_of_its_bin(bad: float) -> None:
    level = torch.zeros(1, 2, 9, 40, requires_grad=True)
    out = roi_align([level], boxes_of((1, 2, 37, 8), (1, 1, 30, 8)), 3, strides=(1,))
    grad = torch.ones_like(out)
    grad[0, 0, 1, 0, 2] = bad  # samples in rows 2 and 3, and in columns 27.5 and 33.5
    out.backward(grad)
    expected = torch.zeros(9, 40, dtype=torch.bool)
    expected[2:4, [27, 28, 33, 34]] = True
    assert torch.equal(~level.grad.isfinite()[0, 1], expected) and level.grad[0, 0].isfinite().all()


# -- sizes and layouts


def results(maps: list[Tensor], boxes: Tensor, size: int, **kwargs: object) -> tuple[Tensor, ...]:
    leaves = [m.detach().requires_grad_() for m in maps]
    out = roi_align(leaves, boxes, size, **kwargs)
    grad = torch.randn(out.shape, generator=random(3)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_near(maps: list[Tensor], boxes: Tensor, size: int, **kwargs: object) -> None:
    """Against the definition, sample by sample in float64. Its gradient is that of its linear function, from unit maps."""
    leaves = [m.double() for m in maps]
    out, *found = results(maps, boxes, size, **kwargs)
    expected = _oracle(leaves, boxes, size, **kwargs)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    # <grad, f(m)> = <f*(grad), m> for a linear f, for any m
    grad = torch.randn(out.shape, generator=random(3)).double()
    pulled = sum(float((g.double() * m).sum()) for g, m in zip(found, leaves, strict=True))
    assert pulled == pytest.approx(float((grad * expected).sum()), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("C", (1, 3, 4, 5, 8, 15, 16, 17, 33, 65))
def test_every_number_of_channels(C: int) -> None:
    assert_near(_maps(2, C, ((13, 21), (7, 11)), C), _boxes(2, 3, 52, 84, C, most=200), 3, strides=(4, 8))


@pytest.mark.parametrize("w", (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 50))
def test_every_width(w: int) -> None:
    """Maps of more and fewer columns than a register has lanes, with boxes across all of them and around the ends."""
    boxes = torch.cat(
        (_boxes(1, 4, 5, w, w, 1, 60), boxes_of((0, 0, w, 5), (-2, 1, w / 2, 3), (w / 2, 0, w + 2, 6))), 1
    )
    assert_near(_maps(1, 5, ((5, w),), w), boxes, 4, strides=(1,))


@pytest.mark.parametrize(("size", "sampling"), ((1, 1), (1, 7), (2, 4), (4, 1), (5, 3), (9, 2), (16, 1), (17, 1)))
def test_every_number_of_bins_and_samples(size: int, sampling: int) -> None:
    assert_near(_maps(1, 3, ((9, 40),), size), _boxes(1, 4, 9, 40, size, 1, 60), size, strides=(1,), sampling=sampling)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_channels_last_gives_the_same_bits(dtype: torch.dtype) -> None:
    maps = [m.to(dtype) for m in _maps(2, 37, ((20, 26), (10, 13)), 5)]
    last = [m.to(memory_format=torch.channels_last) for m in maps]
    boxes = _boxes(2, 7, 80, 104, 5)
    for a, b, mixed in zip(
        *(results(m, boxes, 7, strides=(4, 8)) for m in (maps, last, [maps[0], last[1]])), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, mixed)


def test_the_maps_of_a_picture() -> None:
    """The maps and boxes of 100 queries, with few channels, against grid_sample in float64."""
    maps = _maps(1, 3, [(PICTURE[0] // s, PICTURE[1] // s) for s in STRIDES], 0)
    boxes = _detections(1, 100, 0)
    leaves = [m.double().requires_grad_() for m in maps]
    expected = _eager(leaves, boxes.double(), 7)
    out, *found = results(maps, boxes, 7)
    # A coordinate below 336 has a rounding error of about 6e-5 cells.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=6e-4)
    grad = torch.randn(out.shape, generator=random(3)).double()
    for a, e in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-3)


def test_equals_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    level, boxes = _maps(1, 3, ((20, 26),), 0)[0], _boxes(1, 20, 80, 104, 0)
    rois = torch.cat((torch.zeros(20, 1), boxes[0]), 1)
    torch.testing.assert_close(
        roi_align([level], boxes, 7, strides=(4,))[0], ops.roi_align(level, rois, 7, 0.25, 2, True)
    )
