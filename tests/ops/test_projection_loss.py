"""projection_loss: tables by hand, ties, numbers that are not finite."""

import math

import pytest
import torch
from torch import Tensor

from sprompt.ops import projection_loss
from sprompt.testing.specs.projection_loss import crops

pytestmark = pytest.mark.usefixtures("backend")
NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def slopes(masks: Tensor, boxes: Tensor) -> Tensor:
    leaf = masks.clone().requires_grad_()
    projection_loss(leaf, boxes).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_by_hand():
    """Row maxima 0.5 and 1, column maxima 1, 0.25 and 0.5; the box: rows 0 and 1, columns 1, 0 and 1."""
    masks = torch.tensor([[[0.25, 0.0, 0.5], [1.0, 0.25, 0.0]]])
    boxes = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]])
    rows, columns = 1.25 + 1 + 0.002, 1.3125 + 2 + 0.002
    loss = (1 - 2 * 1 / rows) + (1 - 2 * 1.5 / columns)
    torch.testing.assert_close(projection_loss(masks, boxes), torch.tensor([loss]))

    def slope(a: float, b: float, product: float, denominator: float) -> float:
        return 4 * a * product / denominator**2 - 2 * b / denominator

    expected = torch.zeros(1, 2, 3)
    expected[0, 0, 2] = slope(0.5, 0, 1, rows) + slope(0.5, 1, 1.5, columns)  # the maximum of its row and of its column
    expected[0, 1, 0] = slope(1, 1, 1, rows) + slope(1, 1, 1.5, columns)
    expected[0, 1, 1] = slope(0.25, 0, 1.5, columns)
    torch.testing.assert_close(slopes(masks, boxes), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", (0.5, 0.0, -0.0, -1.0, -INF))
def test_equal_maxima_go_to_the_lowest_place(dtype: torch.dtype, value: float):
    masks = torch.full((2, 37, 70), value, dtype=dtype)
    boxes = torch.rand(2, 37, 70, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    got = slopes(masks, boxes).isnan() if value == -INF else slopes(masks, boxes) != 0
    expected = torch.zeros(2, 37, 70, dtype=torch.bool)
    expected[:, 0, :] = expected[:, :, 0] = True
    assert torch.equal(got, expected)


def test_zeros_of_both_signs_are_equal():
    masks = torch.zeros(1, 5, 40)
    masks[0, :, 0], masks[0, 0] = -0.0, -0.0
    assert torch.equal(
        slopes(masks, torch.ones(1, 5, 40)) != 0, slopes(torch.zeros(1, 5, 40), torch.ones(1, 5, 40)) != 0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mask_that_is_its_box_loses_nothing(dtype: torch.dtype):
    box = torch.zeros(1, 128, 128, dtype=dtype)
    box[0, 20:90, 31:100] = 1
    assert 0 <= projection_loss(box, box).item() < 4e-5  # 0.002 / 140 + 0.002 / 138
    assert projection_loss(torch.ones_like(box), box) > 0.4
    one_a_line = torch.zeros_like(box)
    for y in range(20, 90):
        one_a_line[0, y, 31 + (y - 20) % 69] = 1
    assert torch.equal(projection_loss(one_a_line, box), projection_loss(box, box))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_concerns_its_map_only(dtype: torch.dtype):
    masks, boxes = (x.to(dtype) for x in crops(4, 20, 50, 1))
    holes, boxes_with_holes = masks.clone(), boxes.clone()
    holes[1, 3, 40], holes[1, 3, 7], boxes_with_holes[2, 0, 0] = NAN, -NAN, NAN
    loss, plain = projection_loss(holes, boxes_with_holes), projection_loss(masks, boxes)
    assert loss.isnan().tolist() == [False, True, True, False] and torch.equal(loss[::3], plain[::3])
    found, known = slopes(holes, boxes_with_holes), slopes(masks, boxes)
    assert torch.equal(found[::3], known[::3])
    for b in (1, 2):
        map_of = holes[b].float().numpy()
        maxima = torch.zeros(20, 50, dtype=torch.bool)
        maxima[torch.arange(20), torch.from_numpy(map_of.argmax(1))] = True  # numpy takes the first NaN
        maxima[torch.from_numpy(map_of.argmax(0)), torch.arange(50)] = True
        assert torch.equal(found[b].isnan(), maxima) and not found[b][~maxima].any()


def test_infinity_is_a_number():
    masks = torch.tensor([[[1.0, INF, -INF]]])
    assert projection_loss(masks, torch.ones(1, 1, 3)).isnan()  # infinity by infinity
    assert projection_loss(torch.tensor([[[1.0, -INF]]]), torch.tensor([[[1.0, 0.0]]])).isnan()


def test_dtypes_may_differ():
    masks, boxes = crops(2, 10, 11, 2)
    mixed = projection_loss(masks.bfloat16(), boxes)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, projection_loss(masks.bfloat16().float(), boxes))


def test_maps_without_pixels():
    for h, w in ((0, 5), (5, 0), (0, 0)):
        leaf = torch.zeros(2, h, w, requires_grad=True)
        loss = projection_loss(leaf, torch.zeros(2, h, w))
        assert loss.tolist() == [2, 2]
        loss.sum().backward()
