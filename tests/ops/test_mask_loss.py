"""mask_loss: a table by hand, gradients against autograd of the plain formula, NaN, empty batches, threads."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt import BitMasks, native, use_backend
from sprompt.ops import mask_loss, triton_launch
from sprompt.testing.spec import blobs, random


def plain(logits: Tensor, soft: Tensor, upsample: int) -> tuple[Tensor, Tensor]:
    """The formulas of the code that the paper's authors released."""
    z = F.interpolate(logits[None], scale_factor=upsample, mode="bilinear")[0] if upsample > 1 else logits
    z, t = z.flatten(1), soft.flatten(1).to(z.dtype)
    p = z.sigmoid()
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1)
    return bce, 1 - 2 * (p * t).sum(1) / ((p * p).sum(1) + 1e-3 + (t * t).sum(1) + 1e-3)


def gradient(function: object, logits: Tensor, *args: object, **kwargs: object) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    bce, dice = function(leaf, *args, **kwargs)
    weights = torch.linspace(-1, 2, 2 * len(logits), dtype=bce.dtype)
    return torch.autograd.grad((bce * weights[::2] + dice * weights[1::2]).sum(), leaf)[0]


def test_table_by_hand() -> None:
    log2 = 0.6931472
    logits = torch.tensor([[[0.0, 0.0]], [[50.0, -50.0]], [[50.0, -50.0]], [[-50.0, -50.0]]])
    targets = torch.tensor([[[1.0, 0.5]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])
    bce, dice = mask_loss(logits, targets)
    torch.testing.assert_close(bce, torch.tensor([log2, 0.0, 50.0, 0.0]), rtol=1e-6, atol=1e-20)
    expected = torch.tensor([1 - 2 * 0.75 / (0.5 + 1.25 + 2e-3), 1 - 2 / 2.002, 1.0, 1.0])
    torch.testing.assert_close(dice, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("upsample", (1, 2, 3, 4, 7))
@pytest.mark.parametrize(("h", "w"), ((1, 1), (2, 3), (8, 8), (5, 17), (70, 9), (33, 40)))
def test_equals_the_plain_formula(upsample: int, h: int, w: int) -> None:
    """Losses and gradients. The gradient of a map of 70 rows takes several chunks, and neighbouring chunks share rows."""
    if triton_launch.interpreted() and h * w * upsample**2 > 2600:
        pytest.skip(
            "takes minutes under Triton's interpreter; every factor has a smaller map, every map a smaller factor"
        )
    logits = 3 * torch.randn(3, h, w, generator=random(h + w))
    soft = torch.rand(3, h * upsample, w * upsample, generator=random(upsample))
    for a, e in zip(mask_loss(logits, soft, upsample=upsample), plain(logits.double(), soft, upsample), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
    exact = gradient(plain, logits.double(), soft, upsample)
    scale = float(exact.abs().max())
    torch.testing.assert_close(
        gradient(mask_loss, logits, soft, upsample=upsample).double(), exact, rtol=1e-5, atol=6e-6 * scale
    )


@pytest.mark.parametrize("ratio", (1, 2, 4))
@pytest.mark.parametrize(("h", "w"), ((3, 5), (5, 16), (2, 33), (9, 70)))
def test_bits_are_their_soft_targets(ratio: int, h: int, w: int) -> None:
    masks = (torch.rand(4, ratio * 2 * h, ratio * 2 * w, generator=random(h)) < 0.4).float()
    masks[2, : ratio * h], masks[3] = 0, 1
    soft = F.interpolate(masks[None], size=(2 * h, 2 * w), mode="bilinear")[0]
    logits, bits = torch.randn(4, h, w, generator=random(w)), BitMasks.from_dense(masks)
    for a, e in zip(mask_loss(logits, bits, upsample=2), mask_loss(logits, soft, upsample=2), strict=True):
        assert torch.equal(a, e)
    assert torch.equal(gradient(mask_loss, logits, bits, upsample=2), gradient(mask_loss, logits, soft, upsample=2))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_logits_are_read_exactly(dtype: torch.dtype) -> None:
    """The losses equal those of the same numbers in float32; the gradient is rounded once."""
    logits = (3 * torch.randn(3, 11, 21, generator=random(0))).to(dtype)
    bits = BitMasks.from_dense(blobs(3, 88, 168, 1))
    for a, e in zip(mask_loss(logits, bits, upsample=2), mask_loss(logits.float(), bits, upsample=2), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)
    half = gradient(mask_loss, logits, bits, upsample=2)
    assert half.dtype == dtype
    assert torch.equal(half, gradient(mask_loss, logits.float(), bits, upsample=2).to(dtype))


@pytest.mark.parametrize("targets", (torch.zeros(0, 6, 8), BitMasks(torch.zeros(0, 6, dtype=torch.int32), (12, 16))))
def test_no_masks_are_empty_and_connected(targets: Tensor | BitMasks) -> None:
    logits = torch.zeros(0, 3, 4, requires_grad=True)
    bce, dice = mask_loss(logits, targets, upsample=2)
    assert bce.shape == dice.shape == (0,)
    (bce.sum() + dice.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 3, 4)


def test_nan_stays_in_its_mask() -> None:
    logits, targets = torch.randn(3, 20, 9, generator=random(2)), torch.rand(3, 40, 18, generator=random(3))
    clean, clean_gradient = mask_loss(logits, targets, upsample=2), gradient(mask_loss, logits, targets, upsample=2)
    logits[1, 19, 8] = float("nan")
    losses, found = mask_loss(logits, targets, upsample=2), gradient(mask_loss, logits, targets, upsample=2)
    for a, e in zip(losses, clean, strict=True):
        assert a[1].isnan() and torch.equal(a[::2], e[::2])
    assert found[1].isnan().all() and torch.equal(found[::2], clean_gradient[::2])


def test_targets_get_no_gradient() -> None:
    logits, targets = torch.randn(2, 4, 4), torch.rand(2, 4, 4, requires_grad=True)
    assert not mask_loss(logits, targets)[0].requires_grad
    bce, dice = mask_loss(logits.requires_grad_(), targets)
    (bce.sum() + dice.sum()).backward()
    assert targets.grad is None


def test_one_loss_alone() -> None:
    logits, targets = torch.randn(2, 4, 4, generator=random(4)), torch.rand(2, 4, 4, generator=random(5))
    for which in (0, 1):
        leaf, plain_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        mask_loss(leaf, targets)[which].sum().backward()
        plain(plain_leaf, targets, 1)[which].sum().backward()
        torch.testing.assert_close(leaf.grad, plain_leaf.grad, rtol=1e-5, atol=1e-7)


def test_saved_for_backward_is_little() -> None:
    """The backward keeps the logits, the targets as given, and three sums per mask, but nothing of the size of the upsampled
    map."""
    saved: list[Tensor] = []
    logits, bits = torch.randn(5, 20, 30, requires_grad=True), BitMasks.from_dense(blobs(5, 160, 240, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mask_loss(logits, bits, upsample=2)
    assert sorted(t.numel() for t in saved) == sorted((logits.numel(), bits.words.numel(), 15))


@pytest.mark.skipif(native._C is None, reason=native.why_not())
def test_same_bits_on_any_number_of_threads() -> None:
    logits, bits = torch.randn(7, 70, 40, generator=random(7)), BitMasks.from_dense(blobs(7, 280, 160, 8))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with use_backend("native"):
                results.append((*mask_loss(logits, bits, upsample=2), gradient(mask_loss, logits, bits, upsample=2)))
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))


@pytest.mark.parametrize("h", (1, 31, 32, 33, 64, 65, 96, 130))
def test_chunk_borders_of_the_gradient(h: int) -> None:
    logits, soft = torch.randn(1, h, 3, generator=random(h)), torch.rand(1, 2 * h, 6, generator=random(h + 1))
    exact = gradient(plain, logits.double(), soft, 2)
    torch.testing.assert_close(
        gradient(mask_loss, logits, soft, upsample=2).double(), exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max())
    )


on_triton = pytest.mark.skipif(
    bool(triton_launch.why_not(torch.empty(0))), reason=triton_launch.why_not(torch.empty(0))
)


@on_triton
@pytest.mark.parametrize(
    ("h", "w", "upsample"),
    ((23, 89, 1), (32, 64, 1), (3, 683, 1), (22, 88, 2), (31, 63, 2), (2, 682, 2), (260, 260, 1)),
)
def test_triton_borders_of_chunks(h: int, w: int, upsample: int) -> None:
    """Sizes below, at and above a chunk of 2048 quads, and more chunks than the second kernel reads at once."""
    logits = 3 * torch.randn(1, h, w, generator=random(h))
    soft = torch.rand(1, h * upsample, w * upsample, generator=random(w))
    with use_backend("triton"):
        found = mask_loss(logits, soft, upsample=upsample)
    for a, e in zip(found, plain(logits.double(), soft, upsample), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-6)


@on_triton
@pytest.mark.parametrize("upsample", (1, 2, 3))
@pytest.mark.parametrize(("h", "w"), ((7, 63), (8, 64), (9, 65), (17, 2), (1, 129)))
def test_triton_borders_of_the_gradient(h: int, w: int, upsample: int) -> None:
    """The kernel works on strips of 8 rows of cells and blocks of 64 columns."""
    logits = 3 * torch.randn(1, h, w, generator=random(h))
    soft = torch.rand(1, h * upsample, w * upsample, generator=random(w))
    exact = gradient(plain, logits.double(), soft, upsample)
    with use_backend("triton"):
        found = gradient(mask_loss, logits, soft, upsample=upsample)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max()))


@on_triton
def test_triton_small_losses_keep_their_digits() -> None:
    """For a large logit of the right sign, log(1 + e^-|z|) is far below the rounding error of 1."""
    logits = torch.tensor([[[20.0, -20.0, 12.0, -9.0, 3.0, -3.0, 4.0, 80.0]]])
    with use_backend("triton"):
        for z in logits[0, 0]:
            bce, _ = mask_loss(z.view(1, 1, 1), (z > 0).view(1, 1, 1))
            torch.testing.assert_close(bce.double(), (-z.double().abs()).exp().log1p().view(1), rtol=2e-6, atol=0)
