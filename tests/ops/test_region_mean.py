import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from sprompt.ops import mask_boxes, mask_mean, pack_masks, region_mean, triton_launch
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs import region_mean as spec

pytestmark = pytest.mark.usefixtures("backend")
ON_TRITON = not triton_launch.why_not(torch.empty(0))  # TRITON_INTERPRET=1
NAN = math.nan


def cells(height: int, width: int, *boxes: list[float]) -> list[int]:
    """The cells of each box as bits. Cell i holds 2^i, so the mean of a box shows which cells it takes."""
    features = (2.0 ** torch.arange(height * width)).reshape(1, 1, height, width)
    out = []
    for box in boxes:
        mean = region_mean(features, torch.tensor([[box]], dtype=torch.float64)).item()
        count = next(
            n for n in range(1, height * width + 1) if (mean * n).is_integer() and int(mean * n).bit_count() == n
        )
        out.append(int(mean * count))
    return out


# ---- region_mean


def test_cells_of_boxes():
    """The cells of each box in one row of 4 cells, as bits."""
    rows = [
        ([0, 0, 4, 1], 0b1111), ([1, 0, 3, 1], 0b0110), ([1.5, 0, 2.5, 1], 0b0110), ([1.999, 0, 2.001, 1], 0b0110),
        ([2, 0, 2, 1], 0b0100), ([2.5, 0, 2.5, 1], 0b0100), ([3, 0, 1, 1], 0b1000), ([-2, 0, 1, 1], 0b0001),
        ([-0.5, 0, 0.5, 1], 0b0001), ([-9, 0, -5, 1], 0b0001), ([3.5, 0, 9, 1], 0b1000), ([4, 0, 9, 1], 0b1000),
        ([7, 0, 9, 1], 0b1000), ([-1e300, 0, 1e300, 1], 0b1111), ([1e300, 0, -1e300, 1], 0b1000), ([0, -5, 4, -4], 0b1111),
        ([0, 8, 2, 9], 0b0011), ([0.0, 0.2, 1.0, 0.3], 0b0001),
    ]  # fmt: skip
    assert cells(1, 4, *(box for box, _ in rows)) == [bits for _, bits in rows]


def test_cells_of_boxes_in_two_dimensions():
    assert cells(3, 3, [1, 0, 3, 2], [0, 2, 1, 3], [2.2, 1.2, 2.3, 2.3]) == [0b000110110, 0b001000000, 0b100100000]


def test_dtypes_of_boxes_agree():
    features = torch.randn(2, 9, 6, 11)
    boxes = torch.tensor([[0, 0, 3, 2], [4, 1, 11, 6], [-2, 3, 2, 4]]).expand(2, 3, 4)
    expected = region_mean(features, boxes)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(region_mean(features, boxes.to(dtype)), expected)
    assert torch.equal(region_mean(features, boxes.clamp(0).to(torch.uint8)), region_mean(features, boxes.clamp(0)))


def test_cells_outside_do_not_count():
    features = torch.full((1, 9, 6, 20), NAN)
    features[..., 2:4, 3:15] = 1.0
    features[..., 2, 3] = math.inf
    boxes = torch.tensor([[[4.0, 2.0, 15.0, 4.0], [3.0, 2.0, 5.0, 3.0], [0.0, 0.0, 20.0, 6.0]]])
    out = region_mean(features, boxes)
    assert out[0, 0].tolist() == [1.0] * 9
    assert out[0, 1].tolist() == [math.inf] * 9
    assert out[0, 2].isnan().all()


def test_padding_is_not_looked_at():
    features = torch.randn(3, 5, 6, 9, requires_grad=True)
    boxes = spec.random_boxes(3, 4, 6, 9, 0)
    counts = torch.tensor([2, 0, 4])
    expected = [region_mean(features[b : b + 1], boxes[b : b + 1, :n]) for b, n in enumerate(counts.tolist())]
    for b, n in enumerate(counts.tolist()):
        boxes[b, n:] = NAN
    out = region_mean(features, boxes, counts)
    for b, n in enumerate(counts.tolist()):
        assert torch.equal(out[b, :n], expected[b][0])
        assert out[b, n:].abs().sum() == 0
    grad = torch.randn(out.shape)
    (clean,) = torch.autograd.grad(out, features, grad, retain_graph=True)
    for b, n in enumerate(counts.tolist()):
        grad[b, n:] = NAN
    (padded,) = torch.autograd.grad(out, features, grad)
    assert torch.equal(clean, padded) and padded[1].abs().sum() == 0


def test_gradient_of_region_mean_by_hand():
    features = torch.zeros(1, 1, 2, 4, requires_grad=True)
    boxes = torch.tensor([[[0, 0, 2, 2], [1, 0, 4, 1], [3, 1, 4, 2]]])
    region_mean(features, boxes).backward(torch.tensor([[[4.0], [3.0], [8.0]]]))
    assert features.grad.tolist() == [[[[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 0.0, 8.0]]]]


def test_bad_boxes(backend):
    if backend == "triton":
        pytest.skip("a GPU op cannot look at values before it is launched")
    features, boxes = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4)
    for value in (NAN, math.inf, -math.inf):
        boxes[0, 2, 3] = value
        with pytest.raises(ValueError, match=r"region_mean: boxes must be finite, got \[.*\] at \[0, 2\]; leave"):
            region_mean(features, boxes)
        region_mean(features, boxes, torch.tensor([2]))


# ---- mask_mean


def test_masks_of_boxes_give_the_means_of_boxes():
    for height, width in ((25, 42), (7, 70), (9, 21)):
        features = torch.randn(2, 11, height, width)
        masks = torch.zeros(2, 4, height, width, dtype=torch.bool)
        for b in range(2):
            for l in range(4):
                masks[b, l, l : l + 3, b : b + 5 * l + 1] = True
        boxes = mask_boxes(masks)
        assert torch.equal(mask_mean(features, masks), region_mean(features, boxes))


def test_short_stretches_anywhere_in_a_row(backend):
    """The kernel reads masks 64 cells at a time. At the end of such a read no cell may be lost or counted twice."""
    step = 5 if backend == "triton" else 1
    features = torch.randn(1, 8, 2, 150, requires_grad=True)
    boxes = torch.tensor([[[start, 0, start + length, 2] for start in range(0, 130, step) for length in (1, 9, 18)]])
    cell = torch.arange(150)
    masks = (cell >= boxes[..., :1]) & (cell < boxes[..., 2:3])
    masks = masks[:, :, None].expand(-1, -1, 2, -1)
    by_mask, by_box = mask_mean(features, masks), region_mean(features, boxes)
    assert torch.equal(by_mask, by_box)
    weights = torch.randn(by_mask.shape)
    grads = [torch.autograd.grad(out, features, weights)[0] for out in (by_mask, by_box)]
    assert torch.equal(*grads)


def test_empty_masks_give_zero():
    features = torch.full((1, 9, 3, 5), NAN, requires_grad=True)
    out = mask_mean(features, torch.zeros(1, 2, 3, 5, dtype=torch.bool))
    assert out.tolist() == [[[0.0] * 9] * 2]
    out.sum().backward()
    assert features.grad.abs().sum() == 0


def test_gradient_of_mask_mean_by_hand():
    features = torch.zeros(1, 1, 2, 3, requires_grad=True)
    masks = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]])
    mask_mean(features, masks).backward(torch.tensor([[[2.0], [8.0], [5.0]]]))
    assert features.grad.tolist() == [[[[3.0, 2.0, 1.0], [2.0, 2.0, 0.0]]]]


@hypothesis.settings(
    deadline=None, max_examples=10 if ON_TRITON else 25, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    st.integers(1, 3), st.integers(1, 19), st.integers(1, 9), st.integers(1, 75), st.floats(0, 1), st.integers(0, 2**31)
)
def test_means_of_whole_numbers_are_exact(batch, channels, height, width, density, seed):
    """Sums of small whole numbers are exact in any order, so only the division rounds."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randint(-50, 50, (batch, channels, height, width), generator=g).float()
    masks = torch.rand(batch, 3, height, width, generator=g) < density
    area = masks.sum((-2, -1))[..., None]
    total = torch.einsum("blhw,bchw->blc", masks.double(), features.double())
    expected = torch.where(area > 0, total.float() / area, 0)
    for layout in (features, features.contiguous(memory_format=torch.channels_last), features.expand_as(features)):
        assert torch.equal(mask_mean(layout, masks), expected)
    boxes = spec.random_boxes(batch, 3, height, width, seed)
    out = region_mean(features, boxes)
    for b in range(batch):
        for l in range(3):
            c0, r0, c1, r1 = spec._cells(boxes[b, l].tolist(), height, width)
            part = features[b, :, r0:r1, c0:c1]
            assert torch.equal(out[b, l], part.sum((1, 2)) / (part.shape[1] * part.shape[2]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_layouts_give_the_same_bits(dtype: torch.dtype):
    for c, h, w in ((19, 7, 33), (8, 5, 4), (1, 3, 9)):
        features = torch.randn(2, c, h, w).to(dtype)
        masks, boxes = torch.rand(2, 3, h, w) < 0.4, spec.random_boxes(2, 3, h, w, 1)
        wide = torch.zeros(2, c, h + 2, w + 3, dtype=dtype)
        wide[:, :, 1:-1, 2:-1] = features
        for layout in (
            features.contiguous(memory_format=torch.channels_last),
            wide[:, :, 1:-1, 2:-1],
            features.mT.contiguous().mT,
        ):
            assert torch.equal(layout, features)
            assert torch.equal(mask_mean(layout, masks), mask_mean(features, masks))
            assert torch.equal(region_mean(layout, boxes), region_mean(features, boxes))


def test_any_number_of_threads_gives_the_same_bits(backend):
    if backend == "triton":
        pytest.skip("programs of the Triton kernels share nothing")
    features, boxes = torch.randn(3, 37, 25, 42, requires_grad=True), spec.random_boxes(3, 7, 25, 42, 0)
    masks = pack_masks(torch.rand(3, 7, 25, 42) < 0.2)

    def everything() -> list[Tensor]:
        out = region_mean(features, boxes), mask_mean(features, masks)
        grads = (torch.autograd.grad(o.double().square().sum(), features)[0] for o in out)
        return [*(o.detach() for o in out), *grads]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(everything(), first)
    finally:
        torch.set_num_threads(before)
