"""Inference of transformers' models, before and after `sprompt.patch.deformable_attention()`: rows of `benchmarks.programs`.

The networks have the sizes of the released ones and random weights. Inputs are noise: the time does not depend on them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import Program, Rivals
from sprompt import patch, trace_backends
from sprompt.masks import Size

#: Builds a model, and its inputs beside the pictures. The first argument is the package transformers.
Build = Callable[..., tuple[nn.Module, dict[str, Tensor]]]


def rf_detr(
    transformers: Any, size: int = 432, depth: int = 12, layers: int = 5, queries: int = 200
) -> tuple[nn.Module, dict[str, Tensor]]:
    """RF-DETR-Seg medium: DINOv2 small with patches of 12 pixels, one level, two points a head."""
    backbone = transformers.RfDetrDinov2Config(
        image_size=size, patch_size=12, hidden_size=384, num_hidden_layers=depth, num_attention_heads=6, num_windows=2,
        out_features=[f"stage{depth * n // 4}" for n in (1, 2, 3, 4)],
    )  # fmt: skip
    config = transformers.RfDetrConfig(
        backbone_config=backbone, decoder_layers=layers, num_queries=queries, decoder_n_points=2, num_labels=91
    )
    return transformers.RfDetrForInstanceSegmentation(config), {}


def rt_detr(transformers: Any, layers: int = 6, queries: int = 300) -> tuple[nn.Module, dict[str, Tensor]]:
    """RT-DETR with a ResNet-50: three levels, six decoder layers."""
    config = transformers.RTDetrConfig(decoder_layers=layers, num_queries=queries, num_labels=80)
    return transformers.RTDetrForObjectDetection(config), {}


def grounding_dino(transformers: Any, layers: int = 6, queries: int = 900) -> tuple[nn.Module, dict[str, Tensor]]:
    """Grounding DINO with a Swin-T: four levels, six encoder and six decoder layers."""
    swin = transformers.SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_indices=[2, 3, 4])
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, encoder_layers=layers, decoder_layers=layers, num_queries=queries
    )
    words = torch.tensor([[101, 4937, 1012, 6556, 2491, 1012, 102]])  # [CLS] cat . remote control . [SEP]
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return transformers.GroundingDinoForObjectDetection(config), inputs


def inference(device: torch.device, *, build: Build, size: Size) -> Rivals:
    torch.manual_seed(0)
    model, inputs = build(importlib.import_module("transformers"))
    model = model.to(device).eval()
    inputs = {name: x.to(device) for name, x in (inputs | {"pixel_values": torch.randn(1, 3, *size)}).items()}

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor]:
        outputs = model(**inputs)
        return outputs.logits, outputs.pred_boxes

    def ours() -> tuple[Tensor, Tensor]:
        patch.deformable_attention()
        try:
            return run()
        finally:
            patch.undo()

    def check() -> str:
        with trace_backends() as ran:
            found, expected = ours(), run()
        same = torch.ones(found[0].shape[:2], dtype=torch.bool, device=device)
        for mine, theirs in zip(found, expected, strict=True):
            finite = theirs.isfinite()  # a logit is -inf where a text has no word
            same &= (mine.isfinite() == finite).all(-1)
            same &= torch.where(finite, mine - theirs, 0).abs().amax(-1) <= 1e-3 * theirs[finite].abs().max()
        share = float(same.float().mean())
        assert share >= 0.99, f"only {share:.1%} of the queries have transformers' logits and boxes"
        told = f"{share:.1%} of the {same.shape[1]} queries have transformers' logits and boxes"
        return f"released is transformers as it is; {len(ran)} attentions; {told}"

    return Rivals({"ours": ours, "released": run}, check)


_rows: list[tuple[str, Build, Size, dict[str, int], Size]] = [
    ("RF-DETR segmentation", rf_detr, (432, 432), {"size": 96, "depth": 4, "layers": 1, "queries": 9}, (96, 96)),
    ("RT-DETR", rt_detr, (640, 640), {"layers": 1, "queries": 9}, (64, 96)),
    ("Grounding DINO", grounding_dino, (800, 1333), {"layers": 2, "queries": 9}, (64, 96)),
]

DEFORMABLE = [
    Program(
        "Deformable attention of transformers",
        f"{name}, 1 of {size[0]}x{size[1]}",
        partial(inference, build=build, size=size),
        partial(inference, build=partial(build, **tiny), size=tiny_size),
    )
    for name, build, size, tiny, tiny_size in _rows
]
