"""resize_masks: tables, equality of the backends to the bit, agreement with torch's interpolation."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sprompt
from sprompt import BitMasks
from sprompt.ops import resize_masks
from sprompt.ops.resize_masks import ResizedMasks
from sprompt.ops.resize_masks.reference import taps, taps_via
from sprompt.testing.spec import blobs
from sprompt.testing.specs.resize_masks import interpolated, two_maps

INF, NAN = float("inf"), float("nan")


def bits(masks: BitMasks) -> list:
    return masks.to_dense().int().tolist()


def both(soft: torch.Tensor, size: tuple[int, int], **options: object) -> BitMasks:
    """resize_masks on the active backend; the result must equal the reference to the bit."""
    masks = resize_masks(soft, size, **options)
    with sprompt.use_backend("reference"):
        expected = resize_masks(soft, size, **options)
    assert torch.equal(masks.words, expected.words), int((masks.to_dense() != expected.to_dense()).sum())
    return masks


def test_tables() -> None:
    assert bits(both(torch.tensor([[-1.0, 3.0]]), (1, 8))) == [[0, 0, 0, 1, 1, 1, 1, 1]], (
        "-1, -1, -.5, .5, 1.5, 2.5, 3, 3"
    )
    assert bits(both(torch.tensor([[-1.0], [3.0]]), (8, 1), threshold=0.5)) == [
        [0],
        [0],
        [0],
        [0],
        [1],
        [1],
        [1],
        [1],
    ], "strict"
    # The crop: 1.5 of 3 cells become 3 pixels. The pixel centres are at 0.25, 0.75 and 1.25 cells; minus a half: -0.25 -> 0,
    # 0.25, 0.75.
    assert bits(both(torch.tensor([[-1.0, 1.0, 9.0]]), (1, 3), crop=(1.0, 1.5))) == [[0, 0, 1]]
    # A crop reads beyond its end: when 1.9 cells become 19 pixels, the last pixel is at 1.35.
    row = both(torch.tensor([[-1.0, -1.0, 9.0]]), (1, 19), crop=(1.0, 1.9))
    assert bits(row) == [[int(-1 + 10 * max(0.0, (x + 0.5) * 0.1 - 0.5 - 1) > 0) for x in range(19)]]
    assert bits(both(torch.tensor([[5.0]]), (2, 2))) == [[1, 1], [1, 1]]


def test_values_without_weight_do_not_count() -> None:
    """If the size does not change, every weight is 0 or 1. Each pixel then equals its cell, and the neighbouring cells do not
    matter."""
    cells = torch.tensor([[1.0, NAN, 1.0, INF, -1.0, -INF, 1.0], [INF, -INF, 1.0, 1.0, INF, 1.0, NAN]])
    assert bits(both(cells, (2, 7))) == [[1, 0, 1, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 0]]
    # From three times the size, each pixel is again the centre of one cell.
    assert bits(both(cells.repeat_interleave(3, 1).repeat_interleave(3, 0), (2, 7))) == [
        [1, 0, 1, 1, 0, 0, 1],
        [1, 0, 1, 1, 1, 1, 0],
    ]


def test_infinities_and_nan() -> None:
    assert bits(both(torch.tensor([[-1.0, INF]]), (1, 4))) == [[0, 1, 1, 1]], "infinity with weight 1/4 outweighs -1"
    assert bits(both(torch.tensor([[1.0, -INF]]), (1, 4))) == [[1, 0, 0, 0]]
    assert bits(both(torch.tensor([[INF, -INF]]), (1, 4))) == [[1, 1, 0, 0]], "not NaN"
    assert bits(both(torch.tensor([[1.0, NAN]]), (1, 4))) == [[1, 0, 0, 0]]
    assert bits(both(torch.tensor([[3e38, INF]]), (1, 2), threshold=3e38)) == [[0, 0]], "held at 2^127"
    assert bits(both(torch.tensor([[-INF, 1.0]]), (1, 2), threshold=-INF)) == [[1, 1]], "held at -2^127"
    assert bits(both(torch.tensor([[INF, 1.0]]), (1, 2), threshold=INF)) == [[0, 0]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_backends_agree_to_the_bit(dtype: torch.dtype) -> None:
    """Random sizes, layouts, crops and thresholds. The values are smooth, equal to the threshold, or of a huge range."""
    draw = random.Random(0)
    g = torch.Generator().manual_seed(0)
    for case in range(60):
        h, w = draw.randint(1, 40), draw.randint(1, 110)
        any_size = draw.randint(1, 130), draw.randint(1, 260)
        H, W = draw.choice([(draw.randint(1, 12), draw.randint(1, 12)), any_size, (4 * h, 4 * w), (h, w)])
        M = draw.choice([1, 2, 66]) if h * w * H * W < 1 << 20 else 2
        soft = (
            torch.randn(M, h, w, generator=g),
            blobs(M, h, w, case) - 0.5,
            torch.randint(-1, 2, (M, h, w), generator=g).float(),
            torch.randn(M, h, w, generator=g) * (torch.rand(M, h, w, generator=g) * 80 - 40).exp2(),
        )[case % 4].to(dtype)
        if case % 5 == 0:
            chance = torch.rand(M, h, w, generator=g)
            soft[chance < 0.02] = NAN
            soft[chance > 0.98] = INF
            soft[(chance > 0.95) & (chance < 0.97)] = -INF
        if case % 3 == 0:
            soft = soft.mT.contiguous().mT
        crop = None if case % 2 else (draw.uniform(0.01, 1) * h, draw.choice([w, draw.uniform(0.01, 1) * w]))
        both(soft, (H, W), threshold=draw.choice([0.0, 0.5, -1.0, INF, -INF, 1.0, 1e-30]), crop=crop)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 99),
    st.floats(-0.5, 0.5),
)
def test_agrees_with_torch(h: int, w: int, H: int, W: int, seed: int, threshold: float) -> None:
    soft = torch.randn(2, h, w, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(soft[None], (H, W), mode="bilinear", align_corners=False)[0]
    off = resize_masks(soft, (H, W), threshold=threshold).to_dense() != (pixels > threshold)
    assert not off.any() or (pixels[off] - threshold).abs().max() < 1e-5


def test_crop_equals_slicing_a_larger_image() -> None:
    """Resizing a crop of 3/4 of the cells to 3/4 of the pixels gives the top left part of the whole resized mask."""
    soft = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))
    whole = resize_masks(soft, (64, 96))
    assert torch.equal(both(soft, (48, 72), crop=(12.0, 18.0)).words, whole.crop(0, 0, 48, 72).words)
    exact = interpolated(soft, (75, 133), (15.3, 23.1))
    off = both(soft, (75, 133), crop=(15.3, 23.1)).to_dense() != (exact > 0)
    assert exact[off].abs().sum() < 1e-5


@pytest.mark.parametrize("threshold", (0.1, 0.7, -0.3, 1e30, 0.0, 1.0))
def test_cells_next_to_the_threshold(threshold: float) -> None:
    """Cells one or two float32 steps from the threshold. Rounding may move a pixel across the threshold, but in the same way on
    every backend."""
    level = torch.tensor(threshold)
    up, down = torch.tensor(INF), torch.tensor(-INF)
    near = torch.stack((level.nextafter(down), level, level.nextafter(up), level.nextafter(down).nextafter(down)))
    cells = near[torch.randint(0, 4, (6, 23, 37), generator=torch.Generator().manual_seed(2))]
    for constant in near:
        both(constant.expand(1, 23, 37), (61, 97), threshold=float(level))
    both(cells, (61, 97), threshold=float(level))


@pytest.mark.parametrize("threshold", (3e38, -3e38))
def test_thresholds_beyond_the_held_cells(threshold: float) -> None:
    """Whole segments of infinities. An infinity counts as ±2^127, which is above -3e38 and not above 3e38."""
    for value in (INF, -INF):
        assert both(torch.full((1, 8, 80), value), (16, 200), threshold=threshold).area().item() == (
            3200 if threshold < 0 else 0
        )


def test_weights() -> None:
    (first, second), (w0, w1) = taps(8, 4, 4.0, torch.float32, torch.device("cpu"))
    assert first.tolist() == [0, 0, 0, 1, 1, 2, 2, 3] and second.tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert w1.tolist() == [0, 0.25, 0.75, 0.25, 0.75, 0.25, 0.75, 0] and (w0 + w1 == 1).all()
    rounded = taps(3, 1000, 1e-9, torch.float32, torch.device("cpu"))
    assert rounded.cells[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("M", (1, 3, 70))
def test_threads_and_bands(M: int) -> None:
    """The kernel cuts a large image into bands of rows, but not if there are many masks. Every number of threads gives the same
    bits."""
    soft = blobs(M, 11, 20, 2) - 0.5
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(resize_masks(soft, (133, 121)).words)
            results.append(torch.cat([resize_masks(m, (133, 121)).words[None] for m in soft]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
    assert (
        BitMasks(results[0], (133, 121)).area().tolist()
        == resize_masks(soft, (133, 121)).to_dense().sum((1, 2)).tolist()
    )


def test_padding_bits_are_zero() -> None:
    for width in (1, 31, 32, 33, 63, 95):
        masks = resize_masks(torch.ones(3, 2, 2), (5, width))
        assert masks.area().tolist() == [5 * width] * 3
        assert (masks.words[:, -1] == (-1 if 5 * width % 32 == 0 else (1 << 5 * width % 32) - 1)).all()


def test_very_wide() -> None:
    soft = torch.tensor([[[1.0, -1.0], [-1.0, -1.0]]])
    masks = resize_masks(soft, (4, 2**20))
    # In the middle half, u goes from 0 to 1 along the columns. A pixel is set if 2 (1 - u) weight - 1 > 0, where weight is the
    # row's weight of the upper cells: 1, 3/4, 1/4 and 0. So the rows are set for u < 1/2, u < 1/3, never and never.
    lengths = masks.to_dense().sum(-1)[0].tolist()
    assert lengths[0] == 2**19 and lengths[2:] == [0, 0]
    assert lengths[1] == int((0.25 + 0.5 / 3) * 2**20 + 0.5)


def test_far_apart_rows() -> None:
    """Strides unlike those of a dense tensor; some cells lie more than 2^31 elements behind the first cell."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # only four elements are ever touched
    view = memory.as_strided((1, 2, 2), (0, 2**31, 5))
    view.copy_(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    assert torch.equal(resize_masks(view, (6, 6)).words, resize_masks(view.contiguous(), (6, 6)).words)


# -- two maps, and sums


def both_general(soft: torch.Tensor, size: tuple[int, int], **options: object) -> ResizedMasks:
    """With sums, on the active backend. Bits and areas must equal the reference, and the bits those of a call without sums."""
    found = resize_masks(soft, size, sums=True, **options)
    assert torch.equal(found.masks.words, resize_masks(soft, size, **options).words)
    with sprompt.use_backend("reference"):
        expected = resize_masks(soft, size, sums=True, **options)
    assert torch.equal(found.masks.words, expected.masks.words)
    assert torch.equal(found.areas, expected.areas)
    bound = 2.0**-16 * expected.sums + 2e-38 * expected.areas  # no probability is below 1.2e-38
    assert bool(((found.sums - expected.sums).abs() <= bound).all())
    return found


def sigmoid(*values: float) -> float:
    return sum(1 / (1 + math.exp(-v)) for v in values)


def test_two_maps_tables() -> None:
    # -1, 3 become -1, 0, 2, 3 (places -1/4 -> 0, 1/4, 3/4, 5/4 -> 1), and these -0.5, 2.5: the means of neighbours.
    found = both_general(torch.tensor([[-1.0, 3.0]]), (1, 2), via=(1, 4))
    assert bits(found.masks) == [[0, 1]] and found.areas.item() == 1
    assert found.sums.item() == pytest.approx(sigmoid(2.5), rel=1e-6)
    # The first three of them, -1, 0, 2, become two pixels at the places 1/4 and 7/4: -0.75 and 1.5.
    found = both_general(torch.tensor([[-1.0, 3.0]]), (1, 2), via=(1, 4), crop=(1, 3), threshold=-0.8)
    assert bits(found.masks) == [[1, 1]]
    assert found.sums.item() == pytest.approx(sigmoid(-0.75, 1.5), rel=1e-6)
    # A crop never reads behind its end, unlike a crop of the map: the last pixel is cell 2 of via, not 2.33.
    found = both_general(torch.tensor([[-1.0, 3.0]]), (1, 9), via=(1, 4), crop=(1, 3), threshold=1.99)
    assert bits(found.masks) == [[0, 0, 0, 0, 0, 0, 0, 1, 1]]
    # Along columns: 0, 0, 8 become their mean at 1.5 cells of 3 (the middle cell), then two rows of it.
    assert bits(both_general(torch.tensor([[0.0], [0.0], [8.0]]), (2, 1), via=(1, 1)).masks) == [[0], [0]]


def test_sums_of_one_map_by_hand() -> None:
    found = both_general(torch.tensor([[[-1.0, 3.0]], [[-5.0, -5.0]], [[INF, -INF]]]), (1, 4))
    assert found.areas.tolist() == [2, 0, 2]  # -1, 0, 2, 3: 0 is not above 0
    assert found.sums.tolist() == pytest.approx([sigmoid(2, 3), 0.0, 2.0], rel=1e-6)
    assert found.masks.area().tolist() == found.areas.tolist()


def test_weights_of_two_maps() -> None:
    cells, weights = taps_via(6, 8, 4, 8.0, torch.float64, torch.device("cpu"))
    pixels = torch.eye(4, dtype=torch.float64)
    expected = two_maps(pixels[None, :, :], (4, 6), (4, 8), None)[0]  # a column of pixels by the weights of each cell
    dense = torch.zeros(6, 4, dtype=torch.float64)
    for cell, weight in zip(cells, weights, strict=True):
        dense[torch.arange(6), cell] += weight
    assert torch.allclose(dense.T, expected, rtol=0, atol=1e-15)
    assert (weights[0] > 0).all() and ((weights > 0).sum(0) <= 3).all(), "an enlarged map: at most three cells"
    cells, weights = taps_via(6, 5, 20, 5.0, torch.float32, torch.device("cpu"))
    assert (weights > 0).sum(0).tolist() == [2, 4, 4, 4, 4, 2] and weights.dtype == torch.float32


def test_two_maps_agree_with_torch_in_float64() -> None:
    """Random sizes of the map, of via, of the crop and of the picture; the same bits on the reference."""
    draw = random.Random(3)
    g = torch.Generator().manual_seed(3)
    for case in range(80):
        h, w = draw.randint(1, 30), draw.randint(1, 70)
        via = draw.choice(
            [(4 * h, 4 * w), (draw.randint(1, 90), draw.randint(1, 150)), (h, w), (max(h // 3, 1), max(w // 2, 1))]
        )
        crop = draw.choice([None, via, (draw.randint(1, via[0]), draw.randint(1, via[1]))])
        size = draw.choice([crop or via, (draw.randint(1, 90), draw.randint(1, 200))])
        soft = torch.randn(draw.choice([1, 2, 66]) if h * w < 200 else 2, h, w, generator=g)
        if case % 3 == 0:
            soft = 8 * blobs(len(soft), h, w, case) - 4
        threshold = draw.choice([0.0, 0.5, -2.0])
        found = both_general(soft, size, via=via, crop=crop, threshold=threshold)
        pixels = two_maps(soft, size, via, crop)
        off = found.masks.to_dense() != (pixels > threshold)
        assert not off.any() or (pixels[off] - threshold).abs().max() < 1e-5
        exact = torch.where(found.masks.to_dense(), pixels, -INF).sigmoid().sum((1, 2))
        assert bool(((found.sums - exact).abs() <= 2e-5 * exact).all())


def test_two_maps_in_half_types_and_layouts() -> None:
    soft = (8 * blobs(6, 20, 34, 2) - 4).bfloat16()
    for layout in (
        soft,
        soft.mT.contiguous().mT,
        soft[::2, :, 3:],
        soft[:1, :1].expand(3, 9, 34),
        soft.view(2, 3, 20, 34),
    ):
        found = both_general(layout, (41, 67), via=(80, 136), crop=(77, 133))
        assert found.sums.shape == found.areas.shape == layout.shape[:-2]


def test_two_maps_drop_cells_without_weight() -> None:
    """A picture of via's size, and via of the map's size: every pixel is one cell, so its neighbours do not count."""
    cells = torch.tensor([[1.0, NAN, 1.0, INF, -1.0, -INF, 1.0]])
    found = both_general(cells, (1, 7), via=(1, 7))
    assert bits(found.masks) == [[1, 0, 1, 1, 0, 0, 1]] and found.sums.item() == pytest.approx(3 * sigmoid(1.0) + 1)
    assert bits(both_general(cells, (1, 3), via=(1, 7), crop=(1, 3)).masks) == [[1, 0, 1]]
    assert bits(both_general(cells, (1, 14), via=(1, 14)).masks) == [[1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("threshold", (3e38, -3e38, INF, -INF))
def test_sums_at_thresholds_beyond_the_held_cells(threshold: float) -> None:
    for value, probability in ((INF, 1.0), (-INF, 0.0)):
        found = both_general(torch.full((1, 8, 80), value), (16, 200), via=(8, 100), threshold=threshold)
        assert found.areas.item() == (3200 if threshold < 0 else 0)
        assert found.sums.item() == pytest.approx(found.areas.item() * probability, abs=1e-30)


@pytest.mark.parametrize("M", (1, 3, 70))
def test_sums_are_the_same_for_every_number_of_threads(M: int) -> None:
    soft = 8 * blobs(M, 22, 40, 2) - 4
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(resize_masks(soft, (133, 121), via=(88, 160), crop=(80, 150), sums=True))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert torch.equal(found.sums, results[0].sums) and torch.equal(found.areas, results[0].areas)


def test_sums_of_a_wide_row() -> None:
    """Many float32 sums in a row. Each value has the probability 3/4, so the sum is known."""
    soft = torch.full((1, 2, 40), math.log(3.0))
    found = both_general(soft, (3, 2**20 + 5))
    assert found.areas.item() == 3 * (2**20 + 5)
    assert found.sums.item() == pytest.approx(0.75 * found.areas.item(), rel=1e-6)
