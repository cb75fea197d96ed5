"""mask_attention: tables by hand, permutation of keys, ways of the CPU kernel, values that are not finite."""

from __future__ import annotations

import doctest
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import sprompt
from sprompt import BitMasks
from sprompt.ops import mask_attention, pack_masks, triton_launch
from sprompt.testing.spec import random

NAN, INF = float("nan"), float("inf")


def drawn(B: int, H: int, N: int, S: int, D: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = random(seed)
    query, key, value = (torch.randn(B, H, length, D, generator=g) for length in (N, S, S))
    return query, key, value


def bits(masks: Tensor) -> BitMasks:
    """BitMasks of bool (B, N, S), as one row of pixels."""
    return pack_masks(masks[:, :, None])


def expected(query: Tensor, key: Tensor, value: Tensor, masks: Tensor) -> Tensor:
    """By float64. Every row of masks bool (B, N, S) has a set bit."""
    query, key, value = query.double(), key.double(), value.double()
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~masks[:, None], -INF)
    return scores.softmax(-1) @ value


def test_table() -> None:
    """One head of one channel. The scores of three keys are log 1, log 2 and log 5."""
    query = torch.ones(1, 1, 3, 1, requires_grad=True)
    key = torch.tensor([1.0, 2.0, 5.0]).log().reshape(1, 1, 3, 1).requires_grad_()
    value = torch.tensor([1.0, 4.0, -3.0]).reshape(1, 1, 3, 1).requires_grad_()
    masks = bits(torch.tensor([[[1, 1, 0], [0, 0, 0], [0, 0, 1]]], dtype=torch.bool))
    out = mask_attention(query, key, value, masks)
    assert torch.allclose(out.flatten(), torch.tensor([9 / 3, -6 / 8, -3.0]))
    zero = mask_attention(query, key, value, masks, empty="zero")
    assert torch.equal(zero.flatten(), torch.stack((out.flatten()[0], torch.tensor(0.0), torch.tensor(-3.0))))
    to_query, to_key, to_value = torch.autograd.grad(zero.sum(), (query, key, value))
    # The first row has the weights 1/3 and 2/3 and the mean 3, so its scores get 1/3 (1 - 3) and 2/3 (4 - 3).
    assert torch.allclose(to_value.flatten(), torch.tensor([1 / 3, 2 / 3, 1.0]))
    assert torch.allclose(to_key.flatten(), torch.tensor([-2 / 3, 2 / 3, 0.0]), atol=1e-6)
    assert torch.allclose(to_query.flatten(), torch.tensor([2 / 3 * math.log(2), 0.0, 0.0]), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 300), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99)
)
def test_order_of_the_keys_changes_only_the_rounding(B: int, N: int, S: int, D: int, share: float, seed: int) -> None:
    query, key, value = (x.requires_grad_() for x in drawn(B, 2, N, S, D, seed))
    masks, order = torch.rand(B, N, S, generator=random(seed)) < share, torch.randperm(S, generator=random(seed))
    out = mask_attention(query, key, value, bits(masks))
    moved = mask_attention(query, key[:, :, order], value[:, :, order], bits(masks[..., order]))
    assert torch.allclose(out, moved, rtol=1e-4, atol=2e-5)
    weights = torch.randn(out.shape, generator=random(seed + 1))
    for a, b in zip(*(torch.autograd.grad(o, (query, key, value), weights) for o in (out, moved)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("share", (0.003, 0.05, 0.3, 0.6, 0.97, 1.0))
@pytest.mark.parametrize("N", (1, 13, 70))
def test_every_share_of_bits(share: float, N: int) -> None:
    """More rows than a block of the dense way, several blocks of keys, and rows of different shares in one call."""
    query, key, value = (x.requires_grad_() for x in drawn(1, 2, N, 1500, 24, 0))
    masks = torch.rand(1, N, 1500, generator=random(1)) < share * torch.linspace(0.5, 1.0, N)[:, None]
    masks[..., 700] = True
    out, truth = mask_attention(query, key, value, bits(masks)), expected(query, key, value, masks)
    assert (out - truth).abs().max() < 1e-5
    weights = torch.randn(out.shape, generator=random(2))
    ours = torch.autograd.grad(out, (query, key, value), weights)
    theirs = torch.autograd.grad(truth, (query, key, value), weights.double())
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-6


def test_large_scores() -> None:
    """Scores of several thousand: one key takes all the weight, nothing overflows."""
    query, key, value = drawn(1, 1, 4, 700, 8, 3)
    masks = torch.rand(1, 4, 700, generator=random(4)) < 0.4
    out = mask_attention(100 * query, 50 * key, value, bits(masks))
    truth = expected(100 * query, 50 * key, value, masks)
    assert torch.allclose(out.double(), truth, atol=1e-2)


@pytest.mark.parametrize("bad", (NAN, INF))
def test_keys_outside_of_a_mask_have_no_influence(bad: float) -> None:
    query, key, value = drawn(1, 2, 3, 90, 8, 5)
    masks = torch.rand(1, 3, 90, generator=random(6)) < 0.1
    masks[..., 40], masks[0, 1, 40] = False, True
    clean = mask_attention(query, key, value, bits(masks))
    key[:, :, 40] = bad
    out = mask_attention(query, key, value, bits(masks))
    assert torch.equal(out[:, :, [0, 2]], clean[:, :, [0, 2]])
    assert out[:, :, 1].isnan().any()


def test_mixed_dtypes_take_the_widest() -> None:
    query, key, value = drawn(1, 1, 2, 5, 4, 7)
    assert mask_attention(query.half(), key.half(), value.half(), None).dtype == torch.float16
    assert mask_attention(query.bfloat16(), key, value.bfloat16(), None).dtype == torch.float32


def test_gradients_that_are_not_needed() -> None:
    query, key, value = drawn(1, 1, 2, 40, 4, 8)
    out = mask_attention(query, key.requires_grad_(), value, None)
    alone = torch.autograd.grad(out.sum(), key)[0]
    out = mask_attention(query.requires_grad_(), key, value.requires_grad_(), None)
    assert torch.equal(torch.autograd.grad(out.sum(), (query, key, value))[1], alone)


def test_docstring() -> None:
    for test in doctest.DocTestFinder().find(mask_attention, globs={"torch": torch, "mask_attention": mask_attention}):
        assert doctest.DocTestRunner().run(test).failed == 0 and test.examples


@pytest.mark.skipif(
    bool(triton_launch.why_not(torch.empty(0))), reason=triton_launch.why_not(torch.empty(0)) or "it runs"
)
def test_triton_leaves_out_tiles_that_nobody_attends() -> None:
    """Keys and values of such tiles are NaN here. The last queries have another block, which attends other tiles."""
    query, key, value = drawn(1, 2, 70, 512, 8, 9)
    masks = torch.zeros(1, 70, 512, dtype=torch.bool)
    masks[:, :40, 130:180], masks[:, 64:, 400:410] = True, True
    clean = mask_attention(query, key, value, bits(masks), empty="zero")
    for tensor in (key, value):
        tensor[:, :, :128], tensor[:, :, 192:384] = NAN, NAN
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with sprompt.use_backend("triton", ["mask_attention", "mask_attention_backward"]):
        out = mask_attention(*inputs, bits(masks), empty="zero")
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert torch.allclose(out, clean, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][:, :, :128].any() and gradients[2][:, :, 400:410].any()
