"""Mask2Former of transformers computes the same before and after `sprompt.patch.mask2former()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sprompt

transformers = pytest.importorskip("transformers", reason="the patched package, and the truth of these tests")
from transformers.models.mask2former import modeling_mask2former as modeling  # noqa: E402

HEADS = 5
OPS = {"deform_attn", "mask_conv", "mask_bits", "mask_attention", "point_cost", "point_loss", "linear_assignment"}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    sprompt.patch.undo()


@pytest.fixture
def float64() -> Iterator[None]:
    """transformers samples logits at points of the default dtype, and needs both in one dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    sprompt.patch.mask2former(**options)
    try:
        yield
    finally:
        sprompt.patch.undo()


def tiny(**config: Any) -> nn.Module:
    """Random weights, with sampling offsets that reach beyond a cell, and mask logits far from 0 in every version."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {
        "num_labels": 3, "num_queries": 7, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4,
        "encoder_layers": 2, "encoder_feedforward_dim": 40, "decoder_layers": HEADS, "dim_feedforward": 48, "train_num_points": 60,
        **config,
    }  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=backbone, **sizes)
    )
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "sampling_offsets"):
                module.sampling_offsets.weight.normal_(std=0.5)
                module.attention_weights.weight.normal_(std=0.5)
            if isinstance(module, modeling.Mask2FormerPredictionBlock):
                nn.init.orthogonal_(module.layers[0].weight)
    return model.eval()


def batch(
    counts: list[int], sizes: list[tuple[int, int]] | None = None, size: tuple[int, int] = (64, 96)
) -> dict[str, Any]:
    """Pictures, and for each of them masks (of the picture's size, or of its own), with classes."""
    g = torch.Generator().manual_seed(3)
    masks = [
        (nn.functional.interpolate(torch.randn(1, n, 5, 7, generator=g), each, mode="bilinear")[0] > 0.2).to(
            torch.get_default_dtype()
        )
        if n
        else torch.zeros(0, *each)
        for n, each in zip(counts, sizes or [size] * len(counts), strict=True)
    ]
    return {
        "pixel_values": torch.randn(len(counts), 3, *size, generator=g),
        "mask_labels": masks,
        "class_labels": [torch.randint(0, 3, (n,), generator=g) for n in counts],
    }


def step(model: nn.Module, given: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """All that a step of training gives: outputs, each term of the loss, the loss, gradients."""
    found: dict[str, Tensor] = {}
    hook = model.criterion.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, args, terms: found.update({name: term.detach().clone() for name, term in terms.items()})
    )
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**given, output_auxiliary_logits=True, output_hidden_states=True)
    hook.remove()
    outputs.loss.backward()
    for name in ("loss", "class_queries_logits", "masks_queries_logits", "transformer_decoder_last_hidden_state"):
        found[name] = outputs[name].detach()
    for k, states in enumerate(outputs.transformer_decoder_hidden_states):
        found[f"hidden {k}"] = states.detach()
    for k, head in enumerate(outputs.auxiliary_logits):
        found |= {f"{name} of head {k}": value.detach() for name, value in head.items()}
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        worst = float((found[name] - wanted).abs().max())
        assert worst <= bound * max(1.0, float(wanted.abs().max())), f"{name}: off by {worst}"


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({"counts": [3, 0]}, {}),
        ({"counts": [0]}, {}),
        ({"counts": [9, 2], "size": (96, 64)}, {}),
        ({"counts": [3, 2], "sizes": [(64, 96), (50, 120)]}, {}),
        ({"counts": [2, 4]}, {"pre_norm": True}),
    ],
    ids=[
        "an image without targets",
        "no targets",
        "more targets than queries",
        "targets of different sizes",
        "pre_norm",
    ],
)
def test_float64_with_the_same_draws(given: dict[str, Any], config: dict[str, Any], float64: None) -> None:
    model, data = tiny(**config), batch(**given)
    expected = step(model, data)
    assert f"loss_mask_{HEADS - 2}" in expected
    with patched(same_draws=True), sprompt.trace_backends() as ran:
        found = step(model, data)
    assert {op for op, _ in ran} >= OPS
    assert_same(found, expected, 1e-9)
    with patched(same_draws=True):  # a model that is built after the patch
        assert_same(step(tiny(**config), data), expected, 1e-9)


def test_gradient_checkpointing(float64: None) -> None:
    model, data = tiny().train(), batch([3, 1])
    runs = []
    for checkpointed in (False, True):
        for layer in model.model.transformer_module.decoder.layers:  # type: ignore[union-attr]
            layer.gradient_checkpointing = checkpointed  # the model has no switch for it, its layers have
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        expected = step(model, data)
        with patched(same_draws=True), sprompt.trace_backends() as ran:
            found = step(model, data)
        assert_same(found, expected, 1e-9)
        runs.append([op for op, _ in ran].count("mask_attention"))
    assert runs == [HEADS - 1, 2 * (HEADS - 1)]  # every layer runs again in the backward


def test_float32_differs_by_rounding() -> None:
    """No bit of an attention mask differs for these weights: the bound is that of sums in float32."""
    model, data = tiny(), batch([3, 2])
    expected = step(model, data)
    with patched(same_draws=True):
        found = step(model, data)
    for name, wanted in expected.items():
        if not name.startswith("gradient"):
            assert float((found[name] - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max())), name
    apart, whole = (
        sum(float(t.square().sum()) for t in tensors)
        for tensors in (
            [found[n] - w for n, w in expected.items() if n.startswith("gradient")],
            [w for n, w in expected.items() if n.startswith("gradient")],
        )
    )
    assert apart <= 1e-8 * whole


def test_the_seed_of_torch_decides_the_draws() -> None:
    model, data = tiny(), batch([3, 2])
    with patched():
        first, again, other = (step(model, data, seed)["loss"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_matcher_is_called_for_the_last_head_and_then_for_the_others() -> None:
    model, data = tiny(), batch([3, 9])
    calls: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []
    model.criterion.matcher.register_forward_hook(lambda module, args, found: calls.append((args[0], found)))  # type: ignore[union-attr, operator]
    with patched():
        outputs = model(**data, output_auxiliary_logits=True)
    masks = [outputs.masks_queries_logits, *(head["masks_queries_logits"] for head in outputs.auxiliary_logits)]
    assert len(calls) == len(masks) == HEADS
    for (given, found), logits in zip(calls, masks, strict=True):
        assert given is logits and [len(queries) for queries, _ in found] == [3, 7]
        for queries, targets in found:
            assert queries.dtype == targets.dtype == torch.int64 and queries.device.type == targets.device.type == "cpu"
            assert (queries.diff() > 0).all() and len(set(targets.tolist())) == len(targets)


def test_dropout_takes_the_path_of_transformers(float64: None) -> None:
    model, data = tiny(dropout=0.2).train(), batch([3, 2])
    model.model.transformer_module.decoder.layerdrop = 0.0  # type: ignore[union-attr]  # a dropped layer fails in transformers
    expected = step(model, data)
    with patched(same_draws=True), sprompt.trace_backends() as ran:
        assert_same(step(model, data), expected, 1e-9)
        assert "mask_attention" not in {op for op, _ in ran}
        model.eval()(data["pixel_values"])  # without training there is no dropout
    assert "mask_attention" in {op for op, _ in ran}


def _hook_of_the_predictor(model: Any) -> None:
    model.model.transformer_module.decoder.mask_predictor.register_forward_hook(
        lambda module, args, found: (found[0] * 0.5, ~found[1])
    )


def _hook_of_an_attention(model: Any) -> None:
    model.model.transformer_module.decoder.layers[1].cross_attn.register_forward_hook(
        lambda module, args, found: (found[0] * 0.5, found[1])
    )


def _predictor_of_another_class(model: Any) -> None:
    class Inverted(modeling.Mask2FormerMaskPredictor):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits, blocked = super().forward(*args, **kwargs)
            return -logits, ~blocked

    model.model.transformer_module.decoder.mask_predictor.__class__ = Inverted


def _attention_of_another_class(model: Any) -> None:
    class Scaled(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found, weights = super().forward(*args, **kwargs)
            return 2 * found, weights

    model.model.transformer_module.decoder.layers[0].cross_attn.__class__ = Scaled


@pytest.mark.parametrize(
    "change",
    [_hook_of_the_predictor, _hook_of_an_attention, _predictor_of_another_class, _attention_of_another_class],
    ids=lambda f: f.__name__.strip("_"),
)
def test_changed_modules_take_the_path_of_transformers(change: Any) -> None:
    model, data = tiny(), batch([2])
    change(model)
    with torch.no_grad():
        expected = model(data["pixel_values"])
        with patched(), sprompt.trace_backends() as ran:
            found = model(data["pixel_values"])
    assert "mask_attention" not in {op for op, _ in ran}
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)


def test_attentions_and_tuples_are_returned_as_before() -> None:
    model, data = tiny(), batch([2])
    with torch.no_grad():
        for asked in ({"output_attentions": True}, {"return_dict": False, "output_hidden_states": True}):
            expected = model(data["pixel_values"], **asked)
            with patched():
                found = model(data["pixel_values"], **asked)
            each = (dict(x) if hasattr(x, "keys") else x for x in (found, expected))
            for a, b in zip(*map(tree_leaves, each), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_forward_compiles_as_one_graph() -> None:
    model, data = tiny(encoder_layers=1, decoder_layers=3), batch([2])
    with patched():
        outputs = [
            forward(data["pixel_values"]).masks_queries_logits
            for forward in (model, torch.compile(model, fullgraph=True, backend="eager"))
        ]
    torch.testing.assert_close(*outputs)
    level = model.model.transformer_module.level_embed.weight  # type: ignore[union-attr]
    torch.testing.assert_close(*(torch.autograd.grad(masks.square().sum(), level) for masks in outputs))


def test_undo_puts_back_the_same_objects() -> None:
    owners = [modeling, *(value for value in vars(modeling).values() if isinstance(value, type))]
    before = [(owner, dict(vars(owner))) for owner in owners]
    sprompt.patch.mask2former()
    sprompt.patch.mask2former(same_draws=True)  # another option replaces the first
    assert any(vars(owner)[name] is not value for owner, known in before for name, value in known.items())
    sprompt.patch.undo()
    for owner, known in before:
        assert vars(owner).keys() == known.keys()
        assert all(vars(owner)[name] is value for name, value in known.items())
