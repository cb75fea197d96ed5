"""Labels of all models: those behind counts may be anything, those of targets must be classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks
from sprompt.models.fastinst import FastInstConfig
from sprompt.models.knet import KNetConfig
from sprompt.models.mask2former import Mask2FormerConfig
from sprompt.models.queryinst import QueryInstConfig
from sprompt.models.registry import build

SMALL: dict[str, Any] = {"depth": 18, "backbone_width": 8, "channels": 16, "heads": 2, "num_classes": 3}
MODELS = {
    "knet": KNetConfig(kernels=6, feedforward=16, stages=2, **SMALL),
    "mask2former": Mask2FormerConfig(
        queries=6,
        encoder_layers=1,
        encoder_feedforward=16,
        decoder_layers=2,
        decoder_feedforward=16,
        points=40,
        **SMALL,
    ),
    "fastinst": FastInstConfig(
        queries=6, auxiliary_queries=2, decoder_layers=1, decoder_feedforward=16, points=40, **SMALL
    ),
    "queryinst": QueryInstConfig(queries=6, feedforward=16, dynamic_channels=4, stages=2, **SMALL),
}


@pytest.fixture(scope="module", params=MODELS)
def losses(request: pytest.FixtureRequest) -> tuple[str, Callable[[list[list[int]]], dict[str, Tensor]]]:
    """A model's name, and its loss terms by the labels of two pictures."""
    torch.manual_seed(0)
    model: Any = build(MODELS[request.param]).eval()
    images, noise = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 4, 5)
    masks = BitMasks.from_dense(nn.functional.interpolate(noise, (64, 64), mode="bilinear") > 0.2)
    outputs = model(images)

    def terms(labels: list[list[int]]) -> dict[str, Tensor]:
        torch.manual_seed(1)  # of the points of masks
        found: dict[str, Tensor] = model.losses(outputs, masks, torch.tensor(labels), torch.tensor([3, 1])).terms
        return found

    return type(model).__name__, terms


@pytest.mark.parametrize("selects", [True, False])
def test_labels_behind_counts_do_not_matter(losses: Any, selects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprompt.models.queryinst.loss._selects", lambda device: selects)
    _, terms = losses
    wanted = terms([[2, 0, 1], [1, 0, 0]])
    for label in (-1, 3, 99, -(2**62)):
        assert terms([[2, 0, 1], [1, label, label]]) == wanted


@pytest.mark.parametrize("label", [-1, 3, 99])
def test_labels_of_targets_are_classes(losses: Any, label: int) -> None:
    name, terms = losses
    match = rf"{name}.losses: labels must lie between 0 and 2, got {label}; was the model made for these classes"
    with pytest.raises(ValueError, match=match):
        terms([[2, 0, 1], [label, 0, 0]])
