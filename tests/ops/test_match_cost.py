"""match_cost: a table by hand, NaN and padding, soft targets from bits, independence of chunks, tiles and threads."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt import BitMasks, native, use_backend
from sprompt.ops import match_cost, triton_launch
from sprompt.testing.spec import blobs, random

SURE = 50.0  # the probability of this logit is 1, that of its negative is 0


def test_table_by_hand() -> None:
    """Logits of ±SURE, so that p is 0 or 1. For the first pair, 1 of 4 pixels is common, |p| = 2 and |t| = 1."""
    logits = SURE * torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])
    targets = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]]]).bool()
    bce = match_cost(logits, targets, weights=(0, 1, 0))
    assert torch.equal(bce, torch.tensor([[[-3 / 4, -2 / 4, -1.0], [-3 / 4, -1.0, -2 / 4]]]))
    dice = match_cost(logits, targets, weights=(0, 0, 1))
    expected = torch.tensor([[[-2 / 3.002, 0.0, -4 / 4.002], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(dice, expected, rtol=1e-6, atol=1e-20)
    classes = torch.tensor([[[0.0, SURE], [-SURE, 0.0]]])
    labels = torch.tensor([[0, 1, 1]])
    focal = match_cost(logits, targets, classes, labels, weights=(1, 0, 0))
    even = 0.25 * (0.75 - 0.25) * torch.tensor(0.5).log()
    sure = 0.75 * torch.tensor(1e-12).log()  # of a certain class: only the epsilon is left
    unlikely = -0.25 * torch.tensor(1e-12).log()
    torch.testing.assert_close(
        focal, torch.stack((even, sure, sure, unlikely, even, even)).view(1, 2, 3), rtol=1e-5, atol=0
    )


def test_weights_add_up() -> None:
    g = random(0)
    logits, targets = torch.randn(1, 5, 9, 11, generator=g), torch.rand(1, 4, 9, 11, generator=g)
    classes, labels = torch.randn(1, 5, 3, generator=g), torch.randint(0, 3, (1, 4), generator=g)
    parts = [match_cost(logits, targets, classes, labels, weights=w) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    default = match_cost(logits, targets, classes, labels)
    torch.testing.assert_close(default, 2 * parts[0] + parts[1] + 4 * parts[2], rtol=1e-5, atol=1e-6)


def test_direct_formula() -> None:
    """The kernel takes one product and never forms (1 − p)(1 − t). The result equals K-Net's formula with two products."""
    g = random(1)
    logits = 3 * torch.randn(2, 30, 25, 42, generator=g)
    soft = (torch.rand(2, 13, 50, 84, generator=g) * 4).round() / 4
    p = F.interpolate(logits, scale_factor=2, mode="bilinear").double().sigmoid().flatten(2)
    t = soft.double().flatten(2)
    bce = -(p @ t.mT + (1 - p) @ (1 - t).mT) / 4200
    dice = -2 * p @ t.mT / (((p * p).sum(2) + 1e-3)[:, :, None] + ((t * t).sum(2) + 1e-3)[:, None])
    torch.testing.assert_close(match_cost(logits, soft, upsample=2).double(), bce + 4 * dice, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row() -> None:
    g = random(2)
    logits, targets = torch.randn(2, 9, 6, 10, generator=g), torch.rand(2, 5, 6, 10, generator=g) < 0.2
    targets[:, 3] = False
    classes, labels = torch.randn(2, 9, 3, generator=g), torch.zeros(2, 5, dtype=torch.int64)
    counts = torch.tensor([5, 3])
    clean = match_cost(logits, targets, classes, labels, counts)
    logits[0, 7, 5, 9] = classes[1, 2, 0] = float("nan")
    cost = match_cost(logits, targets, classes, labels, counts)
    assert cost[0, 7].isnan().all() and cost[1, 2, :3].isnan().all()
    assert torch.equal(cost[1, 2, 3:], torch.zeros(2)), "padding stays 0"
    cost[0, 7], cost[1, 2] = clean[0, 7], clean[1, 2]
    assert torch.equal(cost, clean)


def test_nan_of_a_target_stays_in_its_column() -> None:
    logits, targets = torch.randn(1, 6, 4, 9, generator=random(3)), torch.rand(1, 5, 4, 9, generator=random(4))
    clean = match_cost(logits, targets)
    targets[0, 2, 1, 8] = float("nan")
    cost = match_cost(logits, targets)
    assert cost[0, :, 2].isnan().all()
    assert torch.equal(cost[:, :, [0, 1, 3, 4]], clean[:, :, [0, 1, 3, 4]])


def test_padding_is_not_read() -> None:
    """The values in the padding do not change the cost. The cost of padding is 0."""
    g = random(5)
    logits, classes = torch.randn(3, 7, 5, 8, generator=g), torch.randn(3, 7, 2, generator=g)
    targets, labels = torch.rand(3, 6, 5, 8, generator=g), torch.randint(0, 2, (3, 6), generator=g)
    counts = torch.tensor([6, 2, 0])
    cost = match_cost(logits, targets, classes, labels, counts)
    for b, count in enumerate(counts.tolist()):
        targets[b, count:], labels[b, count:] = float("nan"), -7
        alone = match_cost(logits[b : b + 1], targets[b : b + 1, :count], classes[b : b + 1], labels[b : b + 1, :count])
        torch.testing.assert_close(cost[b, :, :count], alone[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(cost[b, :, count:], torch.zeros(7, 6 - count))
    assert torch.equal(match_cost(logits, targets, classes, labels, counts), cost)


@pytest.mark.parametrize("ratio", (1, 2, 4))
@pytest.mark.parametrize(("h", "w"), ((3, 5), (5, 16), (2, 33), (9, 70)))
def test_bits_are_their_soft_targets(ratio: int, h: int, w: int) -> None:
    """The kernel reduces bits as F.interpolate reduces masks, at every alignment of a row to a word."""
    masks = (torch.rand(1, 6, ratio * 2 * h, ratio * 2 * w, generator=random(h)) < 0.4).float()
    masks[0, 4], masks[0, 5] = 0, 1
    masks[0, 3, :, : w * ratio] = 0
    soft = F.interpolate(masks, size=(2 * h, 2 * w), mode="bilinear")
    logits = torch.randn(1, 5, h, w, generator=random(w))
    bits = match_cost(logits, BitMasks.from_dense(masks), upsample=2)
    assert torch.equal(bits, match_cost(logits, soft, upsample=2))


def test_chunks_and_images_are_independent() -> None:
    """The costs of an image do not depend on the other images; they depend on the cuts between chunks of rows only by
    rounding."""
    logits = 3 * torch.randn(3, 11, 40, 52, generator=random(6))
    targets = blobs(21, 80, 104, 7).view(3, 7, 80, 104)
    whole = match_cost(logits, targets, upsample=2)
    for b in range(3):
        assert torch.equal(match_cost(logits[b : b + 1], targets[b : b + 1], upsample=2), whole[b : b + 1])
    torch.testing.assert_close(match_cost(logits.flip(2), targets.flip(2), upsample=2), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native._C is None, reason=native.why_not())
@pytest.mark.parametrize("targets", ("soft", "bits"))
def test_same_bits_on_any_number_of_threads(targets: str) -> None:
    logits = torch.randn(2, 17, 33, 40, generator=random(8))
    soft = blobs(22, 66, 80, 9).view(2, 11, 66, 80)
    given = BitMasks.from_dense(soft) if targets == "bits" else soft
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with use_backend("native"):
                results.append(match_cost(logits, given, upsample=2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_mixed_dtypes_and_no_gradient() -> None:
    logits = torch.randn(1, 4, 6, 7, generator=random(10))
    targets = (torch.rand(1, 3, 6, 7, generator=random(11)) * 4).round() / 4
    cost = match_cost(logits.bfloat16().requires_grad_(), targets.half())
    assert cost.dtype == torch.float32 and not cost.requires_grad
    assert torch.equal(cost, match_cost(logits.bfloat16().float(), targets))
    assert match_cost(logits.double(), targets).dtype == torch.float64


def test_many_targets_and_wide_maps() -> None:
    """Tiles of one row, more targets than a cache holds, and a remainder of every register tile."""
    logits = torch.randn(1, 6, 3, 700, generator=random(12))
    targets = (torch.rand(1, 70, 6, 1400, generator=random(13)) < 0.01).float()
    p, t = (
        F.interpolate(logits, scale_factor=2, mode="bilinear").double().sigmoid().flatten(2),
        targets.double().flatten(2),
    )
    dice = -2 * p @ t.mT / (((p * p).sum(2) + 1e-3)[:, :, None] + ((t * t).sum(2) + 1e-3)[:, None])
    torch.testing.assert_close(
        match_cost(logits, targets, weights=(0, 0, 1), upsample=2).double(), dice, rtol=1e-5, atol=1e-6
    )


on_triton = pytest.mark.skipif(
    bool(triton_launch.why_not(torch.empty(0))), reason=triton_launch.why_not(torch.empty(0))
)


def truth(logits: Tensor, soft: Tensor, upsample: int) -> Tensor:
    """bce and dice with the weights 1 and 4, in float64."""
    p = F.interpolate(logits.double(), scale_factor=upsample, mode="bilinear").sigmoid().flatten(2)
    t = soft.double().flatten(2)
    bce = -(p @ t.mT + (1 - p) @ (1 - t).mT) / p.shape[2]
    return bce - 8 * p @ t.mT / (((p * p).sum(2) + 1e-3)[:, :, None] + ((t * t).sum(2) + 1e-3)[:, None])


@on_triton
@pytest.mark.parametrize(("N", "G"), ((1, 1), (16, 16), (17, 33), (3, 64), (2, 65), (130, 70)))
def test_triton_borders_of_masks_and_targets(N: int, G: int) -> None:
    logits, soft = 3 * torch.randn(2, N, 3, 4, generator=random(N)), torch.rand(2, G, 6, 8, generator=random(G))
    with use_backend("triton"):
        found = match_cost(logits, soft, upsample=2)
    torch.testing.assert_close(found.double(), truth(logits, soft, 2), rtol=1e-5, atol=1e-6)


@on_triton
@pytest.mark.parametrize(
    ("h", "w", "upsample"),
    ((15, 17, 1), (16, 16, 1), (1, 257, 1), (15, 15, 2), (14, 16, 2), (20, 30, 2), (13, 21, 3), (65, 66, 1)),
)
def test_triton_borders_of_chunks(h: int, w: int, upsample: int) -> None:
    """Sizes below, at and above a chunk of 256 quads, and more chunks than the second kernel reads at once."""
    logits = 3 * torch.randn(1, 3, h, w, generator=random(h))
    soft = torch.rand(1, 4, h * upsample, w * upsample, generator=random(w))
    with use_backend("triton"):
        found = match_cost(logits, soft, counts=torch.tensor([3]), upsample=upsample)
    torch.testing.assert_close(found[:, :, :3].double(), truth(logits, soft[:, :3], upsample), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, :, 3], torch.zeros(1, 3))


@on_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_triton_product_of_parts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """On a GPU the kernel splits each factor into three bfloat16 parts instead of taking a float32 product. The interpreter
    takes the float32 product because that is faster, so the test switches it to the parts."""
    import triton.language as tl

    module = importlib.import_module("sprompt.ops.match_cost.triton")
    monkeypatch.setattr(module, "INTERPRETED", tl.constexpr(False))
    logits = 3 * torch.randn(1, 5, 4, 6, generator=random(14))
    soft = torch.rand(1, 3, 8, 12, generator=random(15)).to(dtype)
    spots = torch.zeros(1, 3, 8, 12)
    spots[0, 0, 2, 3], spots[0, 1, 7, 11], spots[0, 2] = 1, 0.1, 1e-3
    with use_backend("triton"):
        for targets in (soft, spots.to(dtype)):
            found = match_cost(logits, targets, weights=(0, 0, 4), upsample=2)
            p = F.interpolate(logits.double(), scale_factor=2, mode="bilinear").sigmoid().flatten(2)
            t = targets.double().flatten(2)
            dice = -8 * p @ t.mT / (((p * p).sum(2) + 1e-3)[:, :, None] + ((t * t).sum(2) + 1e-3)[:, None])
            torch.testing.assert_close(found.double(), dice, rtol=2e-6, atol=1e-12)
        quarters = (soft.float() * 4).round() / 4
        assert torch.equal(
            match_cost(logits, quarters, upsample=2), match_cost(logits, quarters.bfloat16(), upsample=2)
        )
