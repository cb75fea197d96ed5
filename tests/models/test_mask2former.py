"""Mask2Former equals transformers' class: predictions, losses and gradients, with its weights and its draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_mask2former import BOTH, TINY, by_our_names, labelled, ours, theirs

from benchmarks.draws import Draws
from sprompt.masks import BitMasks
from sprompt.models.mask2former import Mask2FormerConfig, loss
from sprompt.models.mask2former.checkpoint import to_transformers
from sprompt.models.mask2former.loss import losses
from sprompt.nn import masked_decoder
from sprompt.ops import mask_bits


@pytest.mark.parametrize(
    ("size", "counts", "at_once"),
    [((64, 96), [3, 0], 256), ((96, 64), [9, 2], 256), ((64, 64), [4, 1], 256), ((64, 64), [3, 4], 9)],
    ids=["one without targets", "more than queries", "square", "two heads at once"],
)
@BOTH
def test_predictions_losses_and_gradients(
    config: Mask2FormerConfig, size: tuple[int, int], counts: list[int], at_once: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loss, "_AT_ONCE", at_once)
    other = theirs(config)
    model = ours(other, tmp_path, config).double()
    other = other.double()
    other.criterion.empty_weight[-1] = TINY.no_object  # rounded to float32 before
    images, masks, labels, number = labelled(size, counts)
    with Draws.of(other, torch.float64) as draws:
        expected = other(
            images, mask_labels=[m[:n].double() for m, n in zip(masks, counts, strict=True)],
            class_labels=[c[:n] for c, n in zip(labels, counts, strict=True)], output_auxiliary_logits=True, output_hidden_states=True,
        )  # fmt: skip
    outputs = model(images)
    theirs_masks, theirs_classes = (all_of(expected, f"{kind}_queries_logits") for kind in ("masks", "class"))
    assert len(outputs.classes) == len(theirs_classes) == TINY.decoder_layers + 1
    for own, wanted in zip(outputs.classes, theirs_classes, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)
    for embedding, wanted in zip(outputs.embeddings, theirs_masks, strict=True):
        own = torch.einsum("bqc,bchw->bqhw", embedding, outputs.mask_features)
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)

    found = losses(outputs, BitMasks.from_dense(masks), labels, number, TINY, draws.points(len(counts)))
    total = torch.stack(list(found.terms.values())).sum()
    torch.testing.assert_close(total, expected.loss.squeeze(), rtol=1e-9, atol=1e-9)
    total.backward()
    expected.loss.backward()
    gradients = by_our_names({name: p.grad for name, p in other.named_parameters() if p.grad is not None}, model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = gradients[name]
            scale = float(wanted.abs().max()) + 1e-12
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=0, atol=1e-9 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
            )


TEN = replace(TINY, decoder_layers=9)  # ten predictions, as the released model has


def test_float32_differs_by_rounding_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of an attention mask differs only where the logit is nearly 0, which one picture in some has. Where none does, all
    predictions and losses agree to 1e-4, and the gradients agree as well, unless rounding moves a ReLU or the choice of a point to its
    other side: this changes a gradient by no more than a hundredth."""
    errors = [error for seed in range(4) if (error := float32_gradients(seed, tmp_path, monkeypatch)) is not None]
    assert len(errors) >= 2 and max(errors) <= 1e-2 and sorted(errors)[1] <= 1e-4


def float32_gradients(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """The largest relative error of a gradient. None if a bit of a mask differs: the layers behind it see other pixels."""
    other = theirs(TEN, seed)
    model = ours(other, tmp_path, TEN)
    images, masks, labels, number = labelled((64, 96), [3, 2], seed)
    images = images.float()
    bits: list[BitMasks] = []  # of each layer: the pixels that queries see
    blocked: list[tuple[Tensor, Tensor]] = []  # and of transformers the logits, and the pixels that queries do not see

    def recorded(*args: Any) -> BitMasks:
        bits.append(mask_bits(*args))
        return bits[-1]

    monkeypatch.setattr(masked_decoder, "mask_bits", recorded)
    decoder = other.model.transformer_module.decoder  # type: ignore[union-attr]
    decoder.mask_predictor.register_forward_hook(lambda module, args, found: blocked.append(found))  # type: ignore[union-attr, operator]
    with Draws.of(other) as draws:
        expected = other(
            images, mask_labels=[m[:n].float() for m, n in zip(masks, number, strict=True)],
            class_labels=[c[:n] for c, n in zip(labels, number, strict=True)], output_auxiliary_logits=True, output_hidden_states=True,
        )  # fmt: skip
    outputs = model(images)
    monkeypatch.undo()

    assert len(bits) == 9 and len(blocked) == 10  # no layer reads the mask of the last prediction
    for own, (logits, closed) in zip(bits, blocked, strict=False):
        closed = closed.unflatten(0, (2, TEN.heads))[:, 0]  # the same for all heads
        resized = nn.functional.interpolate(logits.detach(), own.size, mode="bilinear", align_corners=False).flatten(2)
        seen = own.to_dense().flatten(2)
        assert seen.any() and closed.any()
        differing = seen == closed
        if differing.any():
            assert float(resized[differing].abs().max()) <= 1e-5 * float(resized.abs().max())
            return None

    for own, wanted in zip(outputs.classes, all_of(expected, "class_queries_logits"), strict=True):
        assert relative(own, wanted) <= 1e-4
    for embedding, wanted in zip(outputs.embeddings, all_of(expected, "masks_queries_logits"), strict=True):
        assert relative(torch.einsum("bqc,bchw->bqhw", embedding, outputs.mask_features), wanted) <= 1e-4
    found = losses(outputs, BitMasks.from_dense(masks), labels, number, TEN, draws.points(2))
    total = torch.stack(list(found.terms.values())).sum()
    assert relative(total, expected.loss.squeeze()) <= 1e-4
    total.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    largest = 0.0
    for name, parameter in model.named_parameters():
        wanted = gradients[to_transformers(name)]
        if parameter.requires_grad and wanted is not None:
            # Biases of keys and biases before a group norm have no gradient but rounding: their scale is that of their weight.
            weight = gradients[to_transformers(name.replace("bias", "weight"))]
            largest = max(largest, relative(parameter.grad, wanted, wanted if weight is None else weight))
    return largest


def relative(own: Any, wanted: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference as a share of the largest value of `wanted`, or of `scale` if that is larger."""
    largest = max(float(x.detach().abs().max()) for x in (wanted, wanted if scale is None else scale))
    return float((own - wanted).detach().abs().max()) / largest


def all_of(expected: Any, name: str) -> list[Tensor]:
    """The logits of all of transformers' predictions, the last prediction at the end."""
    return [*(logits[name] for logits in expected.auxiliary_logits), expected[name]]
