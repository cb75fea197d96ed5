"""transformers' Mask2Former at small sizes, which is the truth of the tests of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.models.mask2former.checkpoint import import_checkpoint, to_transformers
from sprompt.nn.swin import SwinConfig
from sprompt.nn.swin_files import from_transformers
from sprompt.nn.tensor_files import write_tensors

transformers = pytest.importorskip("transformers", reason="the independent truth of these tests")

TINY = Mask2FormerConfig(
    depth=18, backbone_width=8, channels=32, queries=7, heads=4, encoder_layers=2, encoder_feedforward=40, decoder_layers=4,
    decoder_feedforward=48, points=60, num_classes=3,
)  # fmt: skip
SWIN = replace(
    TINY, backbone="swin", swin=SwinConfig(8, (1, 2, 2, 1), (1, 2, 4, 2), window=3, drop_path=0.2), frozen_stages=-1,
    depth=50, backbone_width=64,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [TINY, SWIN], ids=["resnet", "swin"])
BACKBONE = "model.pixel_level_module.encoder."


def theirs(config: Mask2FormerConfig = TINY, seed: int = 0) -> nn.Module:
    """transformers' model of these sizes, with random weights and batch norm statistics."""
    width, swin = config.backbone_width, config.swin
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if config.backbone == "swin":
        backbone = transformers.SwinConfig(
            embed_dim=swin.width, depths=swin.depths, num_heads=swin.heads, window_size=swin.window,
            drop_path_rate=swin.drop_path, out_features=stages,
        )  # fmt: skip
    else:
        backbone = transformers.ResNetConfig(
            embedding_size=width, hidden_sizes=[width * s for s in (1, 2, 4, 8)], depths=[2, 2, 2, 2], layer_type="basic",
            out_features=stages,
        )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=backbone, num_labels=config.num_classes, num_queries=config.queries, feature_size=config.channels,
            mask_feature_size=config.channels, hidden_dim=config.channels, num_attention_heads=config.heads,
            encoder_layers=config.encoder_layers, encoder_feedforward_dim=config.encoder_feedforward,
            decoder_layers=config.decoder_layers + 1, dim_feedforward=config.decoder_feedforward, train_num_points=config.points,
        )
    )  # fmt: skip
    model.criterion.matcher.cost_class = config.cost_class  # several versions of transformers have 1 here
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 1.5)
            if hasattr(module, "relative_position_bias_table"):
                module.relative_position_bias_table.normal_()
            if hasattr(module, "sampling_offsets"):
                module.sampling_offsets.weight.normal_(std=0.5)
                module.attention_weights.weight.normal_(std=0.5)
    return model.eval()


def ours(other: nn.Module, tmp_path: Path, config: Mask2FormerConfig = TINY) -> Mask2Former:
    """Our model with the weights of theirs, by way of a file."""
    write_tensors(tmp_path / "theirs.safetensors", other.state_dict())
    model = Mask2Former(config)
    said = import_checkpoint(model, tmp_path / "theirs.safetensors")
    assert "as transformers names them" in said and "starts anew" not in said
    return model.eval()


def by_our_names(tensors: dict[str, Tensor], model: Mask2Former) -> dict[str, Tensor]:
    """Tensors of transformers' model."""
    ours = {to_transformers(name): name for name in model.state_dict()}
    if model.config.backbone == "resnet":
        return {ours[name]: tensor for name, tensor in tensors.items()}
    swin = {name.removeprefix(BACKBONE): t for name, t in tensors.items() if name.startswith(BACKBONE)}
    found = {f"backbone.{name}": t for name, t in from_transformers(swin).items() if not name.startswith("layernorm.")}
    return found | {ours[name]: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}


def labelled(size: tuple[int, int], counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, dense masks (B, G, H, W) that overlap and have holes, labels, counts."""
    generator = torch.Generator().manual_seed(seed)
    most = max([*counts, 1])
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(counts), most, 6, 8, generator=generator, dtype=torch.float64)
    masks = nn.functional.interpolate(noise, size, mode="bilinear") > 0.3
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    return images, masks, labels, torch.tensor(counts)
