"""Every model on an EfficientNet-Lite: a step of training, and its file."""

from pathlib import Path

import pytest
import torch

from sprompt.masks import BitMasks
from sprompt.methods.auto_labeler.config import NetworkConfig
from sprompt.methods.auto_labeler.network import build_network, load_network, save_network
from sprompt.methods.densecl import DenseCL, DenseCLConfig, Views
from sprompt.models.fastinst import FastInstConfig
from sprompt.models.knet import KNetConfig
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.models.mask2former.checkpoint import export_checkpoint
from sprompt.models.protocol import Targets, checked_model, features_of
from sprompt.models.queryinst import QueryInstConfig
from sprompt.models.registry import ModelConfig, build
from sprompt.models.saved import load_model, read_info, save_model
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.vit import VitConfig

LITE = "efficientnet-lite0"
SMALL = {"num_classes": 3, "channels": 16, "heads": 2, "backbone": LITE, "frozen_stages": 1}
CONFIGS = [
    KNetConfig(kernels=5, feedforward=32, **SMALL),
    Mask2FormerConfig(
        queries=5,
        encoder_layers=1,
        encoder_feedforward=32,
        decoder_layers=3,
        decoder_feedforward=32,
        points=64,
        **SMALL,
    ),
    FastInstConfig(queries=5, auxiliary_queries=2, decoder_layers=2, decoder_feedforward=32, points=64, **SMALL),
    QueryInstConfig(queries=5, stages=2, dynamic_channels=4, feedforward=32, **SMALL),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_step_and_a_file(config: ModelConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = checked_model(build(config))
    assert isinstance(model.backbone, EfficientNet) and model.backbone.channels == [24, 40, 112, 320]
    masks = torch.zeros(2, 2, 64, 96, dtype=torch.bool)
    masks[0, 0, 8:40, 10:50] = masks[0, 1, 30:60, 40:90] = masks[1, 0, :30, :30] = True
    bits, labels, counts = BitMasks.from_dense(masks), torch.tensor([[0, 2], [1, 0]]), torch.tensor([2, 1])
    before = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images = torch.randn(2, 3, 64, 96)
    outputs = model.decode(features_of(model, images, [(64, 96)] * 2), None, Targets(bits, labels, counts))
    sum(model.losses(outputs, bits, labels, counts).terms.values()).backward()
    optimiser.step()
    changed = {
        name for name, parameter in model.backbone.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert {name.split(".")[1] for name in changed} == set("23456"), "the stem and the first stage are frozen"

    save_model(tmp_path / "model.safetensors", model.eval(), ["a", "b", "c"])
    assert read_info(tmp_path / "model.safetensors")["config"]["backbone"] == LITE
    loaded, _ = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        for found, want in zip(loaded.backbone(images), model.backbone(images), strict=True):
            assert torch.equal(found, want)


@pytest.mark.parametrize("kind", [KNetConfig, FastInstConfig, QueryInstConfig, Mask2FormerConfig, NetworkConfig])
def test_other_names_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: backbone must be one of .*{LITE}.* got 'efficientnet-b0'"):
        kind(backbone="efficientnet-b0")
    with pytest.raises(ValueError, match=f"{kind.__name__}: depth must be one of 18, 34, 50, 101, got 20"):
        kind(depth=20)


def test_transformers_has_no_such_network(tmp_path: Path) -> None:
    config = next(config for config in CONFIGS if isinstance(config, Mask2FormerConfig))
    with pytest.raises(ValueError, match=f"the backbone must be a ResNet or a Swin, got {LITE}"):
        export_checkpoint(Mask2Former(config), tmp_path / "model.safetensors")


def test_a_labeler(tmp_path: Path) -> None:
    """The stages behind the map of stride 16 neither run nor train."""
    config = NetworkConfig(backbone=LITE, width=8, crop=64, vit=VitConfig(width=64, depth=1, heads=1, grid=3))
    network = build_network(config)
    crops = torch.randn(2, 3, 64, 64)
    network(crops, [0, 2]).sum().backward()
    for name, parameter in network.named_parameters():
        unused = name.startswith(("backbone.blocks.5.", "backbone.blocks.6."))
        assert parameter.requires_grad != unused and (parameter.grad is None) == unused, name
    save_network(tmp_path / "labeler.safetensors", network, config)
    loaded, there = load_network(tmp_path / "labeler.safetensors")
    assert there == config
    with torch.no_grad():
        assert torch.equal(loaded(crops, [0, 2]), network.eval()(crops, [0, 2]))


def test_dense_contrastive_learning() -> None:
    task = DenseCL(DenseCLConfig(backbone=LITE, embedding=8, queue=4, dense_level="C4"))
    assert isinstance(task.backbone, EfficientNet)
    before = task.backbone.bn1.running_mean.clone()
    loss, _ = task(Views(torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), ["a", "b"]), 0)
    loss.backward()
    assert loss.isfinite() and not torch.equal(task.backbone.bn1.running_mean, before)
    assert all(parameter.grad is not None for parameter in task.backbone.parameters())
