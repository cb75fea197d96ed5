"""The rows of `benchmarks.programs` on QueryInst: from the pyramid to RLEs, and a training step of the heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import released_queryinst
from benchmarks.fastinst_rows import Found, same
from benchmarks.measure import Call
from benchmarks.rivals import Program, Rivals, regions, same_step, step
from sprompt.masks import BitMasks, Size
from sprompt.models.protocol import Features
from sprompt.models.queryinst import QueryInst, QueryInstConfig
from sprompt.models.queryinst.model import Outputs
from sprompt.ops import pack_masks
from sprompt.testing.spec import blobs


@torch.no_grad()
def network(config: QueryInstConfig, device: torch.device) -> QueryInst:
    """Random weights, with boxes of all sizes, and classes and masks that differ."""
    torch.manual_seed(0)
    model = QueryInst(config).to(device).eval()
    boxes, heads = model.rpn_head.init_proposal_bboxes.weight, model.roi_head
    boxes[:, :2].uniform_(0.1, 0.9)
    boxes[:, 2:].uniform_(0.05, 0.6)
    head: Any  # a BoxHead or a MaskHead, which a ModuleList does not say
    for head in heads.bbox_head:
        head.fc_reg.weight.mul_(0.1)
        head.fc_cls.weight.mul_(3)
    for head in heads.mask_head:
        head.conv_logits.weight.mul_(5)
    return model


def inference(device: torch.device, *, view: Size, picture: Size, **config: Any) -> Rivals:
    """From the maps of the pyramid to RLEs at the picture's size."""
    padded = (-view[0] % 32 + view[0], -view[1] % 32 + view[1])
    model = network(QueryInstConfig(**config), device)
    maps = [
        regions(model.channels, (padded[0] // stride, padded[1] // stride), 1, seed).to(device)
        for seed, stride in enumerate((4, 8, 16, 32))
    ]
    features = Features([], maps, [view])
    with torch.inference_mode():
        outputs = model.decode(features)

    def written(outputs: Outputs) -> Found:
        (found,) = model.predictions(outputs, padded, [view], [picture])
        return found.masks.rle(), found.scores, found.labels

    @torch.inference_mode()
    def ours() -> Found:
        return written(model.decode(features))

    @torch.inference_mode()
    def released() -> Found:
        return released_queryinst.results(model, released_queryinst.decode(model, maps, view), view, picture)

    parts: dict[str, Call] = {
        "stages": torch.inference_mode()(lambda: model.decode(features)),
        "masks": torch.inference_mode()(lambda: written(outputs)),
    }
    return Rivals({"ours": ours, "released": released}, lambda: same(ours(), released(), picture), parts)


def head_step(
    device: torch.device, *, images: int, size: Size = (800, 1344), targets: int = 15, **config: Any
) -> Rivals:
    """Forward, matching, losses and backward of the heads, on given maps with gradient."""
    model = network(QueryInstConfig(**config), device).train()
    maps = [
        regions(model.channels, (size[0] // stride, size[1] // stride), images, seed).to(device).requires_grad_()
        for seed, stride in enumerate((4, 8, 16, 32))
    ]
    leaves = [*model.rpn_head.parameters(), *model.roi_head.parameters(), *maps]
    dense = [(blobs(targets, *size, seed) > 0.5).to(device) for seed in range(images)]
    bits = BitMasks.stack([pack_masks(each) for each in dense])
    bytes_ = [each.to(torch.uint8) for each in dense]
    labels = torch.arange(targets, device=device).remainder(model.num_classes).expand(images, -1)
    counts = torch.full((images,), targets, device=device)

    def ours() -> dict[str, Tensor]:
        return model.losses(model.decode(Features([], maps)), bits, labels, counts).terms

    def released() -> dict[str, Tensor]:
        return released_queryinst.losses(model, released_queryinst.decode(model, maps), bytes_, list(labels))

    calls: dict[str, Call] = {"ours": lambda: step(ours(), leaves), "released": lambda: step(released(), leaves)}

    def check() -> str:
        same_step(calls["ours"](), calls["released"](), "released")
        return f"{targets} targets an image"

    return Rivals(calls, check)


_SMALL: dict[str, Any] = {
    "depth": 18, "backbone_width": 8, "channels": 16, "queries": 12, "stages": 2, "heads": 4, "dynamic_channels": 8, "feedforward": 32,
    "num_classes": 5,
}  # fmt: skip

QUERYINST = [
    Program(
        "QueryInst inference",
        "pyramid to RLEs, 1 of 800x1067 -> 480x640",
        partial(inference, view=(800, 1067), picture=(480, 640)),
        partial(inference, view=(60, 100), picture=(70, 90), **_SMALL),
        {"time": 2},
    ),
    Program(
        "QueryInst head step",
        "1 of 800x1344",
        partial(head_step, images=1),
        partial(head_step, images=2, size=(96, 128), targets=4, **_SMALL),
    ),
]
