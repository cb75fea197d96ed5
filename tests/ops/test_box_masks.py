"""crop_masks and paste_masks: tables by hand, peculiar boxes, pictures pixel by pixel, the same bits on every backend."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sprompt
from sprompt.masks import BitMasks
from sprompt.ops import crop_masks, pack_masks, paste_masks
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.spec import blobs, random
from sprompt.testing.specs.box_masks import NEAR, PECULIAR, boxes_around, crop_oracle, pasted

pytestmark = pytest.mark.usefixtures("backend")
NAN, INF = math.nan, math.inf


# -- crop_masks


def crop_one(mask: Tensor, box: list[float], size: int) -> Tensor:
    """The crop (size, size) of one dense mask (H, W)."""
    boxes = torch.tensor(box, dtype=torch.float64)[None, None]
    return crop_masks(mask[None, None], boxes, torch.zeros(1, 1, dtype=torch.int64), size)[0, 0]


def test_crops_by_hand():
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[1:, 1:] = True
    # Samples lie at whole positions 0 to 3: the first part of an axis has pixels 0 and 1, the second 2 and 3.
    assert crop_one(corner, [0, 0, 4, 4], 2).tolist() == [[0.25, 0.5], [0.5, 1.0]]
    assert crop_one(corner, [0, 0, 4, 4], 1).item() == 9 / 16
    # One sample a part, at -0.25, 0.25, ..., 3.25 of the columns: 0.75 of pixel 0 and 0.25 of pixel 1, and so on. The first
    # and the last are moved to the edge.
    assert crop_one(corner, [0, 3, 4, 4], 8)[0].tolist() == [0.0, 0.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    # An extent of 3 has one sample in each of 3 parts, one of 3.5 two in each: at 1/12 + k 7/12 - 1/2 + 5/24.
    assert crop_one(corner, [0, 3, 3, 4], 3)[0].tolist() == [0.0, 1.0, 1.0]
    places = [-0.5 + (j + 0.5) * 3.5 / 6 for j in range(6)]
    steps = [min(max(place, 0.0), 1.0) for place in places]
    expected = [(steps[2 * p] + steps[2 * p + 1]) / 2 for p in range(3)]
    assert crop_one(corner, [0, 3, 3.5, 4], 3)[0].tolist() == pytest.approx(expected, abs=2.0**-24)


def test_crops_outside_of_the_picture():
    ones = torch.ones(4, 4, dtype=torch.bool)
    # Samples at -4, -3, -2, -1 | 0, 1, 2, 3. The one at -1 counts.
    assert crop_one(ones, [-4, 0, 4, 4], 2).tolist() == [[0.25, 1.0], [0.25, 1.0]]
    # 0, 1, 2, 3 | 4, 5, 6, 7: the one at 4, the number of pixels, counts.
    assert crop_one(ones, [0, 0, 4, 8], 2).tolist() == [[1.0, 1.0], [0.25, 0.25]]
    assert not crop_one(ones, [-6, 0, -1, 4], 5)[:, :4].any()
    assert not crop_one(ones, [5, 5, 9, 9], 4).any()


def test_crop_of_its_own_size_is_the_mask():
    mask = torch.rand(30, 30, generator=random(0)) < 0.5
    assert torch.equal(crop_one(mask, [0, 0, 30, 30], 30), mask.float())
    wide = torch.zeros(30, 90, dtype=torch.bool)
    wide[:, 41:71] = mask
    assert torch.equal(crop_one(wide, [41, 0, 71, 30], 30), mask.float())


def test_a_half_is_exact():
    """Targets are crops >= 0.5, so a part of which exactly half is set must be 0.5."""
    mask = torch.zeros(84, 84, dtype=torch.bool)
    mask[:, 42:] = True
    for low, size in ((0, 1), (10, 7), (36, 3), (21, 21)):
        crop = crop_one(mask, [low, low, 84 - low, 84 - low], size)
        assert (crop[:, size // 2] == 0.5).all() and not (crop[:, : size // 2]).any()
        assert (crop[:, size // 2 + 1 :] == 1.0).all()


def test_boxes_that_are_not_cropped():
    masks = torch.ones(1, 1, 20, 34, dtype=torch.bool)
    boxes = PECULIAR[None].double()
    crops = crop_masks(masks, boxes, torch.zeros(1, len(PECULIAR), dtype=torch.int64), 3)[0]
    assert not crops[8:].any()
    assert crops[[0, 1, 3, 4]].flatten(1).amax(1).tolist() == [1.0] * 4 and crops[2].any()
    for edge, cropped in ((2.0**24, True), (math.nextafter(2.0**24, INF), False)):
        assert bool(crop_one(masks[0, 0], [0, 0, edge, 20], 4).any()) == cropped
        assert bool(crop_one(masks[0, 0], [-edge, 0, 34, 20], 4).any()) == cropped
        assert bool(crop_one(masks[0, 0], [0, -edge, 34, edge], 1).any()) == cropped


def test_a_huge_box_has_all_its_samples():
    """2^24 samples on each axis, of which those at -1, 0, ..., 10 lie inside."""
    ones = torch.ones(10, 10, dtype=torch.bool)
    assert crop_one(ones, [-(2**23), -(2**23), 2**23, 2**23], 1).item() == (12 / 2**24) ** 2


@pytest.mark.parametrize("extent", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_box_is_one_point(extent: float):
    """All samples lie at the corner of the box minus half a pixel."""
    mask = torch.eye(5, dtype=torch.bool)
    crop = crop_one(mask, [0.0, 0.0, extent, extent], 28)
    assert (crop == 1.0).all()
    assert not crop_one(mask, [0.0, 3.0, extent, 3.0 + 1e-3], 28).any()


def test_each_box_has_its_mask():
    dense = torch.rand(2, 3, 12, 40, generator=random(1)) < 0.5
    index = torch.tensor([[2, -1, 0, 0], [1, 1, 2, -1]])
    boxes = boxes_around(8, 12, 40, 2).reshape(2, 4, 4)
    crops = crop_masks(dense, boxes, index, 5)
    for b in range(2):
        for n in range(4):
            own = crop_one(dense[b, index[b, n]], boxes[b, n].tolist(), 5)
            assert torch.equal(crops[b, n], own if index[b, n] >= 0 else torch.zeros(5, 5))


def on_a_limit(boxes: Tensor, size: int, height: int, width: int) -> bool:
    """Whether a sample lies at -1 or at the number of pixels. Rounding decides whether it counts."""
    for box in boxes.reshape(-1, 4).double().tolist():
        for low, high, pixels in ((box[0], box[2], width), (box[1], box[3], height)):
            samples = size * math.ceil((high - low) / size)
            places = low - 0.5 + (np.arange(samples) + 0.5) * (high - low) / max(samples, 1)
            if (np.abs(places + 1) < 1e-9).any() or (np.abs(places - pixels) < 1e-9).any():
                return True
    return False


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70), st.integers(1, 200), st.integers(1, 30), st.integers(0, 999), st.floats(0.01, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_crops_agree_with_all_samples(
    height: int, width: int, size: int, seed: int, scale: float, dtype: torch.dtype, whole: bool
):
    masks = pack_masks(torch.rand(2, 2, height, width, generator=random(seed)) < 0.5)
    boxes = boxes_around(6, height, width, seed).reshape(2, 3, 4) * scale
    if whole:  # such a box has no sample at a limit if it lies inside the picture
        boxes = boxes.round().clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    boxes = boxes.to(dtype)
    assume(not on_a_limit(boxes, size, height, width))
    index = torch.randint(-1, 2, (2, 3), generator=random(seed))
    crops = crop_masks(masks, boxes, index, size)
    g = math.ceil(2 * scale * max(height, width) / size)
    torch.testing.assert_close(
        crops.double(), crop_oracle(masks, boxes, index, size), rtol=0, atol=2 * g * 2.0**-26 + 2.0**-25
    )
    with sprompt.use_backend("reference"):
        assert_same_bits(crops, crop_masks(masks, boxes, index, size))


def test_crops_of_blobs_have_the_reference_bits():
    """Rows of equal bits, empty rows, parts of more than 64 columns."""
    masks = pack_masks(blobs(4, 150, 700, 3)[None] > 0.5)
    boxes = torch.cat((boxes_around(6, 150, 700, 4), torch.tensor([[0.0, 0, 700, 150], [-900, 3, 1900, 90]])))[None]
    index = torch.arange(8)[None] % 4
    for size in (1, 3, 28):
        crops = crop_masks(masks, boxes, index, size)
        with sprompt.use_backend("reference"):
            assert_same_bits(crops, crop_masks(masks, boxes, index, size))


# -- paste_masks


def rows(masks: BitMasks) -> list[list[int]]:
    return masks.to_dense().int().tolist()[0]


def test_pastes_by_hand():
    soft = torch.tensor([[[0.9, 0.2], [0.9, 0.9]]])
    # Twice as wide and high, one column to the right. Columns 1 and 4 lie beyond the centres of the cells, where 0.75 of the
    # cell is left. Values of the first row: 0.51, 0.54, 0.28, 0.11, halfway down to the next: 0.65, 0.70, 0.55, 0.44.
    pasted_bits = paste_masks(soft, torch.tensor([[1.0, 0.0, 5.0, 4.0]]), (4, 6))
    assert rows(pasted_bits) == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]
    # One cell over four pixels: its weight is 5/8, 7/8, 7/8, 5/8, and beside the box 3/8, 1/8.
    cell, box = torch.ones(1, 1, 1), torch.tensor([[4.0, 0.0, 8.0, 1e6]])
    for threshold, columns in ((0.0, 8), (0.12, 8), (0.2, 6), (0.374, 6), (0.376, 4), (0.626, 2), (0.9, 0)):
        row = paste_masks(cell, box * torch.tensor([1, -1, 1, 1]) + torch.tensor([0, -1e6, 0, 0]), (1, 12), threshold)
        assert sum(rows(row)[0]) == columns, threshold
        assert rows(row)[0] == rows(row)[0][::-1]


def test_paste_of_its_own_size_is_the_map():
    soft = torch.rand(3, 9, 9, generator=random(5))
    boxes = torch.tensor([[0, 0, 9, 9], [20, 3, 29, 12], [30, -4, 39, 5]]).float()
    expected = torch.zeros(3, 14, 35, dtype=torch.bool)
    expected[0, :9, :9] = soft[0] > 0.5
    expected[1, 3:12, 20:29] = soft[1] > 0.5
    expected[2, :5, 30:35] = soft[2, 4:, :5] > 0.5
    assert torch.equal(paste_masks(soft, boxes, (14, 35)).to_dense(), expected)


def picture(soft: np.ndarray, box: list[float], size: tuple[int, int]) -> np.ndarray:
    """The float picture of one map, pixel by pixel in float64."""
    x1, y1, x2, y2 = box
    out = np.zeros(size)
    if not (0 < x2 - x1 < INF and 0 < y2 - y1 < INF):
        return out
    s = len(soft)
    for y, x in np.ndindex(*size):
        v, u = ((y + 0.5 - y1) / (y2 - y1) * s - 0.5, (x + 0.5 - x1) / (x2 - x1) * s - 0.5)
        if not (-1 < v < s and -1 < u < s):
            continue
        for i in (math.floor(v), math.floor(v) + 1):
            for j in (math.floor(u), math.floor(u) + 1):
                if 0 <= i < s and 0 <= j < s:
                    out[y, x] += soft[i, j] * (1 - abs(v - i)) * (1 - abs(u - j))
    return out


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("s", [1, 2, 7])
def test_peculiar_boxes(s: int, threshold: float):
    soft = torch.rand(len(PECULIAR), s, s, generator=random(s))
    found = paste_masks(soft, PECULIAR, (20, 34), threshold).to_dense().numpy()
    for n, box in enumerate(PECULIAR.double().tolist()):
        values = picture(soft[n].double().numpy(), box, (20, 34))
        known = (values == 0) | (np.abs(values - threshold) > NEAR)
        assert np.array_equal(found[n][known], (values > threshold)[known]), f"box {box}"
        assert found[n].any() == (values > threshold).any(), f"box {box}"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 20), st.integers(1, 150), st.integers(1, 200), st.integers(0, 999), st.floats(-3, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([0.0, 0.2, 0.5, 0.8]),
)  # fmt: skip
def test_pastes_agree_with_grid_sample(
    s: int, height: int, width: int, seed: int, scale: float, dtype: torch.dtype, threshold: float
):
    soft = torch.rand(3, s, s, generator=random(seed)).to(dtype)
    boxes = boxes_around(3, height, width, seed) * 10**scale
    found = paste_masks(soft, boxes, (height, width), threshold)
    pixels = pasted(soft.double(), boxes.double(), (height, width))
    known = (pixels == 0) | ((pixels - threshold).abs() > NEAR)
    assert torch.equal(found.to_dense()[known], (pixels > threshold)[known])
    with sprompt.use_backend("reference"):
        assert_same_bits(found, paste_masks(soft, boxes, (height, width), threshold))


@pytest.mark.parametrize("size", [(300, 45), (129, 64), (64, 33), (700, 1), (1, 700)])
def test_bands_of_rows(size: tuple[int, int]):
    """One mask is made in bands of rows, many are made whole."""
    soft = torch.rand(1, 14, 14, generator=random(7))
    box = torch.tensor([[0.3, -5.0, 0.9, 1.1]]) * torch.tensor([size[1], 1, size[1], size[0]])
    one = paste_masks(soft, box, size)
    many = paste_masks(soft.expand(70, 14, 14), box.expand(70, 4), size)
    assert one.area().item() > 0 and torch.equal(many.words, one.words.expand(70, -1))
    with sprompt.use_backend("reference"):
        assert_same_bits(one, paste_masks(soft, box, size))


def test_cells_that_are_not_finite():
    soft = torch.full((1, 3, 3), 0.9)
    box = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    soft[0, 0, 0] = NAN
    # Pixel 1 of an axis lies at the centre of cell 0, pixel 4 at that of cell 1: pixels 0 to 3 give weight to cell 0.
    found = paste_masks(soft, box, (9, 9)).to_dense()[0]
    assert not found[:4, :4].any() and found[4:8, 1:8].all() and found[1:8, 4:8].all()
    soft[0, 0, 0] = -INF
    assert torch.equal(paste_masks(soft, box, (9, 9)).to_dense()[0], found)
    soft[0, 0, 0] = INF
    found = paste_masks(soft, box, (9, 9)).to_dense()[0]
    assert found[:4, :4].all()
    assert not paste_masks(soft, box, (9, 9), INF).to_dense().any()


def test_a_weight_that_rounds_to_0_ignores_its_cell():
    """A pixel 1e-12 cells before the centre of cell 1: its weight rounds to 1 in float32."""
    soft = torch.tensor([[NAN, 0.9], [NAN, 0.9]])[None]
    box = torch.tensor([[1e-12, 0.0, 2 + 1e-12, 2.0]], dtype=torch.float64)
    assert rows(paste_masks(soft, box, (2, 2))) == [[0, 1], [0, 1]]
    assert rows(paste_masks(soft.mT, box[:, [1, 0, 3, 2]], (2, 2))) == [[0, 0], [1, 1]]


def test_strides():
    soft = torch.rand(5, 2, 7, 7, generator=random(9))
    boxes = boxes_around(5, 30, 50, 10)
    expected = paste_masks(soft[:, 1].contiguous(), boxes, (30, 50))
    assert_same_bits(paste_masks(soft[:, 1], boxes, (30, 50)), expected)
    assert_same_bits(
        paste_masks(soft.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)[:, 1], boxes, (30, 50)), expected
    )
