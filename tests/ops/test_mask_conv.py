"""mask_conv, mask_bits, mask_pool, mask_update: tables by hand, exactness, and cases that the contract tests do not reach."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import sprompt
from sprompt import BitMasks
from sprompt.ops import mask_bits, mask_conv, mask_pool, mask_update, pack_masks, triton_launch
from sprompt.testing.spec import blobs, random

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def whole(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, size: int = 2) -> Tensor:
    """Whole numbers in [-size, size]: sums are exact in any order."""
    return torch.randint(-size, size + 1, shape, generator=random(seed)).to(dtype)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_table() -> None:
    """Two channels, three pixels and two kernels, calculated by hand."""
    features = torch.tensor([[[[1.0, 2.0, -3.0]], [[4.0, 0.0, 5.0]]]], requires_grad=True)
    kernels = torch.tensor([[[1.0, 1.0], [-2.0, 0.0]]], requires_grad=True)
    logits, pooled = mask_update(features, kernels)
    assert logits.tolist() == [[[[5.0, 2.0, 2.0]], [[-2.0, -4.0, 6.0]]]]
    assert pooled.tolist() == [[[0.0, 9.0], [-3.0, 5.0]]]
    to_logits = torch.tensor([[[[1.0, 0.0, 2.0]], [[0.0, 10.0, 0.0]]]])
    to_pooled = torch.tensor([[[100.0, 200.0], [1000.0, 2000.0]]])
    torch.autograd.backward((logits, pooled), (to_logits, to_pooled))
    # First channel: the logits give 1, -20 and 2; the pooled sums give 100 everywhere and 1000 where the second mask is set.
    assert features.grad is not None and kernels.grad is not None
    assert features.grad.tolist() == [[[[101.0, 80.0, 1102.0]], [[201.0, 200.0, 2202.0]]]]
    assert kernels.grad.tolist() == [[[-5.0, 14.0], [20.0, 0.0]]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(2, 7, 5, 5, 7), (1, 40, 96, 9, 33), (1, 15, 3, 1, 64)], ids=str)
def test_bits_are_the_sign_of_the_returned_logits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit, also where rounding decides: many float16 logits are -0 here."""
    B, N, C, H, W = sizes
    features, kernels = torch.randn(B, C, H, W, generator=random(0)), torch.randn(B, N, C, generator=random(1))
    features, kernels = (features * 1e-4).to(dtype), (kernels * 1e-4).to(dtype)
    logits, bits = mask_conv(features, kernels), mask_bits(features, kernels)
    assert torch.equal(bits.to_dense(), logits >= 0)
    assert dtype != torch.float16 or bool((logits.signbit() & (logits == 0)).any())


def test_bits_of_zero_and_nan() -> None:
    features = torch.tensor([[[[0.0, -0.0, 1e-45, -1e-45, NAN, INF, -INF]]]])
    assert mask_bits(features, torch.ones(1, 1, 1)).to_dense().int().tolist() == [[[[1, 1, 1, 0, 0, 1, 0]]]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 7, 5, 5, 7), (1, 13, 140, 9, 33), (2, 100, 64, 10, 13), (1, 3, 130, 25, 27)], ids=str
)
def test_whole_numbers_are_exact(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """In every dtype, forward and backward equal the rounded float64 product to the bit."""
    B, N, C, H, W = sizes
    features, kernels = whole((B, C, H, W), 1, dtype).requires_grad_(), whole((B, N, C), 2, dtype).requires_grad_()
    to_logits, to_pooled = whole((B, N, H, W), 3, dtype), whole((B, N, C), 4, dtype)
    logits, pooled = mask_update(features, kernels)
    to_features, to_kernels = torch.autograd.grad((logits, pooled), (features, kernels), (to_logits, to_pooled))
    x, k, dl, dp = (t.detach().double() for t in (features, kernels, to_logits, to_pooled))
    exact = torch.einsum("bnc,bchw->bnhw", k, x)
    held = (exact > 0).double()
    assert torch.equal(logits, exact.to(dtype))
    assert torch.equal(pooled, torch.einsum("bnhw,bchw->bnc", held, x).to(dtype))
    expected = torch.einsum("bnc,bnhw->bchw", k, dl) + torch.einsum("bnc,bnhw->bchw", dp, held)
    assert torch.equal(to_features, expected.to(dtype))
    assert torch.equal(to_kernels, torch.einsum("bnhw,bchw->bnc", dl, x).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_update_is_conv_and_pool_to_the_bit(dtype: torch.dtype) -> None:
    """This also holds where rounding a logit to its dtype decides whether it is above 0."""
    features, kernels = torch.randn(2, 70, 19, 31, generator=random(0)), torch.randn(2, 17, 70, generator=random(1))
    features[:, :, :5] *= 1e-25  # products below the smallest number of every dtype here
    kernels[:, 3] *= 1e-22
    features, kernels = features.to(dtype), kernels.to(dtype)
    logits, pooled = mask_update(features, kernels)
    assert torch.equal(logits, mask_conv(features, kernels))
    assert torch.equal(pooled, mask_pool(features, logits))
    assert torch.equal(pooled, mask_pool(features, logits > 0))
    assert torch.equal(pooled, mask_pool(features, pack_masks(logits, 0.0)))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 75),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_pooling_of_any_density_is_exact(B: int, N: int, C: int, H: int, W: int, seed: int) -> None:
    """Each mask has its own density, so that single pixels, runs and full blocks all occur."""
    features = whole((B, C, H, W), seed, size=50)
    masks = torch.rand(B, N, H, W, generator=random(seed)) < torch.rand(1, N, 1, 1, generator=random(seed + 1)) * 1.2
    assert torch.equal(mask_pool(features, masks), torch.einsum("bnhw,bchw->bnc", masks.float(), features))


def test_runs_of_every_length_and_place() -> None:
    """Every mask is one run of pixels. The kernel keeps sums of 2, 4 and 8 neighbours that begin at multiples of their
    length."""
    features = whole((1, 9, 1, 150), 0, size=50)
    masks = torch.zeros(1, 300, 1, 150, dtype=torch.bool)
    for i in range(300):
        masks[0, i, 0, i % 90 : i % 90 + 1 + i // 5] = True
    assert torch.equal(mask_pool(features, masks), torch.einsum("bnhw,bchw->bnc", masks.float(), features))


def test_which_pixels_are_held() -> None:
    features = torch.tensor([[[[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]]])
    assert mask_pool(features, torch.tensor([[[[NAN, 0.0, -0.0, 1e-30, INF, -INF]]]])).item() == 24
    assert mask_pool(features, torch.tensor([[[[0, 1, -1, 255, 0, 0]]]])).item() == 14
    assert (
        mask_pool(features, torch.tensor([[[[0.4, 0.5, 0.6, 0.0, -1.0, 2.0]]]])).item() == 39
    )  # logits, not probabilities


def test_kernels_that_no_pixel_answers_and_nan() -> None:
    """A logit of NaN is outside its mask: a pixel of NaN is not pooled, and a kernel of NaN pools nothing at all. (The product
    of the reference spreads the NaN of a feature through its channel.)"""
    features, kernels = torch.ones(1, 3, 8, 20), torch.ones(1, 4, 3)
    kernels[0, 1] = -1
    kernels[0, 2] = NAN
    features[0, :, 2, 3] = NAN
    logits, pooled = mask_update(features, kernels)
    assert logits.isnan().sum() == 160 + 3 and logits[0, 0].isnan().sum() == 1
    if backend_of(features, kernels) == {"native"}:
        assert pooled[0].tolist() == [[159.0] * 3, [0.0] * 3, [0.0] * 3, [159.0] * 3]
    features[0, :, 2, 3] = 1
    assert mask_update(features, kernels)[1][0].tolist() == [[160.0] * 3, [0.0] * 3, [0.0] * 3, [160.0] * 3]


def backend_of(features: Tensor, kernels: Tensor) -> set[str]:
    with sprompt.trace_backends() as ran:
        mask_conv(features, kernels)
    return {name for _, name in ran}


def test_half_sums_are_in_float32_and_overflow_to_infinity() -> None:
    features = torch.full((1, 1, 100, 100), 8.0)
    full = torch.ones(1, 1, 100, 100, dtype=torch.bool)
    assert mask_pool(features, full).item() == 80000
    assert mask_pool(features.bfloat16(), full).item() == torch.tensor(80000.0).bfloat16().item()
    assert mask_pool(features.half(), full).item() == INF
    assert mask_pool(features.half() / 2, full).item() == 40000  # a running sum in float16 would stop at 8192


@pytest.mark.parametrize("function", (mask_conv, mask_update))
def test_no_gradient_through_the_threshold_and_none_where_not_asked(function: object) -> None:
    features, kernels = whole((2, 6, 9, 11), 0).requires_grad_(), whole((2, 4, 6), 1).requires_grad_()
    logits, pooled = mask_update(features, kernels)
    masks_alone = torch.autograd.grad(pooled.sum(), (features, kernels), retain_graph=True)
    assert not masks_alone[1].any()
    assert torch.equal(masks_alone[0], (logits > 0).float().sum(1, keepdim=True).expand_as(features))
    for wanted in ((features,), (kernels,)):
        fixed = [t if any(t is w for w in wanted) else t.detach() for t in (features, kernels)]
        got = torch.autograd.grad(mask_conv(*fixed).sum(), wanted)[0]
        both = torch.autograd.grad(mask_conv(features, kernels).sum(), wanted)[0]
        assert torch.equal(got, both)
        got = torch.autograd.grad([t.sum() for t in mask_update(*fixed)], wanted)[0]
        assert torch.equal(got, torch.autograd.grad([logits.sum(), pooled.sum()], wanted, retain_graph=True)[0])


def test_the_backward_keeps_bits_not_floats() -> None:
    features, kernels = torch.randn(1, 8, 40, 40).requires_grad_(), torch.randn(1, 50, 8).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mask_update(features, kernels)
    owned = [t for t in kept if t.data_ptr() not in (features.data_ptr(), kernels.data_ptr())]
    assert [(t.dtype, tuple(t.shape)) for t in owned] == [(torch.int32, (1, 50, 50))]


def test_logits_may_be_changed_in_place_before_the_backward() -> None:
    features, kernels = whole((1, 4, 5, 6), 0).requires_grad_(), whole((1, 3, 4), 1)
    logits, pooled = mask_update(features, kernels)
    expected = torch.autograd.grad(pooled.sum(), features, retain_graph=True)[0]
    with torch.no_grad():
        logits.neg_()
    assert torch.equal(torch.autograd.grad(pooled.sum(), features)[0], expected)


@pytest.mark.parametrize("number", (2, 3, 5))
def test_the_same_bits_on_any_number_of_threads(number: int) -> None:
    """7000 pixels are several chunks, and the last chunk is not full."""
    features, kernels = torch.randn(2, 40, 70, 100, generator=random(0)), torch.randn(2, 9, 40, generator=random(1))
    weights = torch.randn(2, 9, 70, 100, generator=random(2)), torch.randn(2, 9, 40, generator=random(3))

    def everything() -> list[Tensor]:
        leaves = features.clone().requires_grad_(), kernels.clone().requires_grad_()
        outputs = mask_update(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights), mask_pool(features, outputs[0])]

    with threads(1):
        alone = everything()
    with threads(number):
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))


def test_mixed_dtypes_take_the_wider_one() -> None:
    features, kernels = whole((1, 4, 3, 3), 0, torch.bfloat16), whole((1, 2, 4), 1)
    logits, pooled = mask_update(features, kernels)
    assert logits.dtype == pooled.dtype == mask_conv(features, kernels).dtype == torch.float32
    assert mask_pool(features, logits).dtype == torch.bfloat16  # the dtype of the masks does not affect the sums


def test_autocast_keeps_float64() -> None:
    features, kernels = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(1, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mask_conv(features, kernels).dtype == torch.float64
        assert mask_pool(features.float(), torch.ones(1, 1, 3, 3)).dtype == torch.float32


def test_affine_maps_commute() -> None:
    """<w, W x + b> = <W^T w, x> + <w, b>, and pool(W x + b) = W pool(x) + b area."""
    g = random(0)
    x, k = torch.randn(2, 24, 13, 17, generator=g), torch.randn(2, 6, 24, generator=g)
    weight, bias = torch.randn(24, 24, generator=g) / 5, torch.randn(24, generator=g)
    mapped = torch.einsum("dc,bchw->bdhw", weight, x) + bias[:, None, None]
    folded = mask_conv(x, k @ weight) + (k @ bias)[:, :, None, None]
    assert torch.allclose(mask_conv(mapped, k), folded, rtol=1e-4, atol=1e-4)
    masks = pack_masks(blobs(12, 13, 17, 0).reshape(2, 6, 13, 17))
    pooled = mask_pool(x, masks) @ weight.T + masks.area()[..., None] * bias
    assert torch.allclose(mask_pool(mapped, masks), pooled, rtol=1e-4, atol=1e-3)


def test_masks_shared_by_all_images() -> None:
    features = whole((3, 5, 8, 9), 0)
    one = pack_masks(blobs(4, 8, 9, 1))
    shared = BitMasks(one.words[None].expand(3, 4, -1), (8, 9))
    assert torch.equal(mask_pool(features, shared), mask_pool(features, one.to_dense()[None].expand(3, 4, 8, 9)))


def test_docstrings() -> None:
    finder = doctest.DocTestFinder()
    for function in (mask_conv, mask_bits, mask_pool, mask_update):
        for test in finder.find(function, globs={"torch": torch, function.__name__: function}):
            assert doctest.DocTestRunner().run(test).failed == 0 and test.examples


# -- Triton: tiles of up to 128 pixels, blocks of up to 128 kernels, up to 256 channels held at once in half types

by_triton = pytest.mark.skipif(
    bool(triton_launch.why_not(torch.empty(0))), reason=triton_launch.why_not(torch.empty(0)) or "it runs"
)


def triton_equals_float64(sizes: tuple[int, ...], dtype: torch.dtype, dense: float = 0.3) -> None:
    """On whole numbers, all ops and gradients of the Triton backend equal a float64 product to the bit."""
    B, N, C, H, W = sizes
    x, k = whole((B, C, H, W), 1, dtype), whole((B, N, C), 2, dtype)
    dl, dp = whole((B, N, H, W), 3, dtype), whole((B, N, C), 4, dtype)
    masks = torch.rand(B, N, H, W, generator=random(5)) < dense
    words = pack_masks(masks).words
    ops = torch.ops.sprompt
    with sprompt.use_backend("triton"):
        logits, pooled, bits = ops.mask_update(x, k)
        of_words = ops.mask_pool(x, words)
        to_features, to_kernels = ops.mask_update_backward(x, k, bits, dl, dp, True, True)
        from_words = ops.mask_pool_backward(dp, words, H, W)
        assert torch.equal(ops.mask_conv(x, k), logits) and torch.equal(ops.mask_pool(x, bits), pooled)
    x, k, dl, dp = (t.double() for t in (x, k, dl, dp))
    exact = torch.einsum("bnc,bchw->bnhw", k, x)
    held = (exact > 0).double()
    assert torch.equal(logits, exact.to(dtype))
    assert torch.equal(bits, pack_masks(exact, 0.0).words)
    assert torch.equal(pooled, torch.einsum("bnhw,bchw->bnc", held, x).to(dtype))
    assert torch.equal(of_words, torch.einsum("bnhw,bchw->bnc", masks.double(), x).to(dtype))
    expected = torch.einsum("bnc,bnhw->bchw", k, dl) + torch.einsum("bnc,bnhw->bchw", dp, held)
    assert torch.equal(to_features, expected.to(dtype))
    assert torch.equal(to_kernels, torch.einsum("bnhw,bchw->bnc", dl, x).to(dtype))
    assert torch.equal(from_words, torch.einsum("bnc,bnhw->bchw", dp, masks.double()).to(dtype))


@by_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 63), (1, 16, 16, 1, 64), (1, 17, 17, 5, 13), (1, 3, 127, 1, 129), (1, 3, 129, 1, 31), (1, 3, 257, 3, 11),
        (1, 129, 33, 1, 65),
    ],
    ids=str,
)  # fmt: skip
def test_triton_at_the_edges_of_tiles(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    triton_equals_float64(sizes, dtype)


@by_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_triton_with_several_tiles_a_chunk(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs per image; the last chunk is shorter, and the last tile is not full."""
    pick = triton_launch._pick
    monkeypatch.setattr(
        triton_launch, "_pick", lambda *args: {**pick(*args), **({"PROGRAMS": 3} if "PROGRAMS" in pick(*args) else {})}
    )
    triton_equals_float64((1, 5, 20, 10, 50), dtype, 0.01)


@by_triton
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_triton_update_is_conv_and_pool_to_the_bit(dtype: torch.dtype) -> None:
    """This also holds where rounding decides, where whole tiles have no bit, and where features are not finite."""
    features, kernels = torch.randn(2, 70, 19, 31, generator=random(0)), torch.randn(2, 17, 70, generator=random(1))
    features[:, :, :5] *= 1e-25
    kernels[:, 3] *= 1e-22
    features[1, :, 8:] = 0.0
    features[0, 5, 12, 3], features[1, 7, 15, 4] = INF, NAN
    features, kernels = features.to(dtype), kernels.to(dtype)
    with sprompt.use_backend("triton"):
        logits, pooled, words = torch.ops.sprompt.mask_update(features, kernels)
        assert torch.equal(logits.nan_to_num(7.0), torch.ops.sprompt.mask_conv(features, kernels).nan_to_num(7.0))
        again = torch.ops.sprompt.mask_pool(features, words)
    assert torch.equal(words, pack_masks(logits, 0.0).words)
    assert torch.equal(again.nan_to_num(7.0), pooled.nan_to_num(7.0))
    # The tiles that hold the NaN have no bit, so it is never pooled.
    assert pooled[1].isfinite().all()


@by_triton
def test_triton_pools_float32_exactly() -> None:
    """No bit of a float32 is lost. Each mask is one pixel; the values cover the whole range that the three parts can hold."""
    features = torch.randn(1, 20, 1, 96, generator=random(0)) * 10.0 ** torch.arange(-28, 36).repeat(2)[:96]
    features[0, 0, 0, :3] = torch.tensor([3.4028235e38, -3.4028235e38, 1.1754944e-38 * 2**20])
    masks = torch.eye(96, dtype=torch.bool).reshape(1, 96, 1, 96)
    words = pack_masks(masks).words
    with sprompt.use_backend("triton"):
        pooled = torch.ops.sprompt.mask_pool(features, words)
        back = torch.ops.sprompt.mask_pool_backward(pooled, words, 1, 96)
    assert torch.equal(pooled[0], features[0, :, 0].T)
    assert torch.equal(back, features)


@by_triton
def test_triton_takes_the_threshold_on_the_rounded_logit() -> None:
    """1e-8 is above 0 in float32, and 0 in float16."""
    tiny = torch.full((1, 1, 1, 40), 1e-4, dtype=torch.float16)
    with sprompt.use_backend("triton"):
        logits, pooled, words = torch.ops.sprompt.mask_update(tiny, tiny[:, :, 0, :1])
    assert not logits.any() and not words.any() and not pooled.any()
