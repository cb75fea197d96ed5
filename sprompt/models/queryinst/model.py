"""QueryInst as a model that methods can train: see `sprompt.models.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks, Size
from sprompt.models.backbone import build_backbone
from sprompt.models.protocol import (
    Features,
    Losses,
    ParameterGroup,
    Prediction,
    Prompter,
    Targets,
    check_images,
    prompted,
    refuse_groups,
)
from sprompt.models.queryinst import inference, loss
from sprompt.models.queryinst.boxes import corners, scales
from sprompt.models.queryinst.config import QueryInstConfig
from sprompt.models.queryinst.heads import BoxHead, MaskHead, Stage
from sprompt.nn.fpn import FPN


class Outputs(NamedTuple):
    maps: list[Tensor]  # (B, C, h, w) of strides 4, 8, 16 and 32: the mask heads read their boxes from them
    scale: Tensor  # (B, 1, 4): w, h, w, h of the images without padding
    stages: list[Stage]


class LearnedQueries(nn.Module):
    """The queries before the first stage, and their boxes: centre x, y, width, height in shares of the image."""

    def __init__(self, queries: int, channels: int) -> None:
        super().__init__()
        self.init_proposal_features = nn.Embedding(queries, channels)
        self.init_proposal_bboxes = nn.Embedding(queries, 4)
        with torch.no_grad():
            self.init_proposal_bboxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))


class StageHeads(nn.Module):
    """The heads of all stages."""

    def __init__(self, config: QueryInstConfig) -> None:
        super().__init__()
        width, dynamic, classes = config.channels, config.dynamic_channels, config.num_classes
        self.bbox_head = nn.ModuleList(
            BoxHead(width, config.heads, dynamic, config.feedforward, classes) for _ in range(config.stages)
        )
        self.mask_head = nn.ModuleList(MaskHead(width, dynamic, classes) for _ in range(config.stages))


class QueryInst(nn.Module):
    """QueryInst with an FPN. Parameters have the names of the releases.

    One site takes prompts: "query", the learned queries before the first stage; their boxes stay as they are. Boxes start in shares
    of the image without its padding.
    """

    Config = QueryInstConfig
    sites = ("query",)

    def __init__(self, config: QueryInstConfig | None = None) -> None:
        super().__init__()
        self.config = config = QueryInstConfig() if config is None else config
        self.backbone = build_backbone(config, frozen_stages=config.frozen_stages)
        self.neck = FPN(self.backbone.channels, config.channels)
        self.rpn_head = LearnedQueries(config.queries, config.channels)
        self.roi_head = StageHeads(config)

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_queries(self) -> int:
        return self.config.queries

    @property
    def mask_heads(self) -> list[MaskHead]:
        return list(self.roi_head.mask_head)  # type: ignore[arg-type]  # a ModuleList of MaskHeads

    def reset_classifier(self, num_classes: int) -> None:
        """Makes fresh last layers of classes and of masks, which have a channel for each class."""
        self.config = replace(self.config, num_classes=num_classes)
        for head in (*self.roi_head.bbox_head, *self.roi_head.mask_head):
            head.reset_classifier(num_classes)  # type: ignore[operator]  # a head, which a ModuleList does not say

    def freeze_backbone(self, stages: int) -> None:
        self.config = replace(self.config, frozen_stages=stages)
        self.backbone.freeze(stages)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone has a tenth of the learning rate. All parameters decay."""
        return [ParameterGroup(list(self.backbone.parameters()), rate=0.1)]

    def import_checkpoint(self, path: Path) -> str:
        """Takes the weights of a file of a release; see `sprompt.models.queryinst.checkpoint`."""
        from sprompt.models.queryinst.checkpoint import import_checkpoint

        return import_checkpoint(self, path)

    def forward(self, images: Tensor) -> Outputs:
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Features:
        """Maps of images (B, 3, H, W), normalised, H and W multiples of 32."""
        check_images("QueryInst", images)
        maps = self.backbone(images)
        return Features(maps, self.neck(maps))

    def decode(self, features: Features, prompter: Prompter | None = None, targets: Targets | None = None) -> Outputs:
        refuse_groups("QueryInst", targets)
        maps = features.maps
        batch, _, height, width = maps[0].shape
        sizes = features.sizes
        if sizes is not None and len(sizes) != batch:
            raise ValueError(
                f"QueryInst: features.sizes must have one entry an image, {batch}, got {len(sizes)}; take those of the batch"
            )
        # Without padding one entry serves all images, so that an exported program can take batches of any size.
        scale = scales([(4 * height, 4 * width)] if sizes is None else sizes, maps[0]).expand(batch, -1, -1)
        queries = self.rpn_head.init_proposal_features.weight.expand(batch, -1, -1)
        queries = prompted("QueryInst", prompter, "query", queries)
        boxes = corners(self.rpn_head.init_proposal_bboxes.weight) * scale
        stages: list[Stage] = []
        for head in self.roi_head.bbox_head:
            stages.append(head(maps, boxes, queries))
            boxes, queries = stages[-1].boxes.detach(), stages[-1].queries
        return Outputs(maps, scale, stages)

    def losses(self, outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        return loss.losses(outputs, masks, labels, counts, self.config, self.mask_heads)

    @torch.no_grad()
    def predictions(
        self, outputs: Outputs, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        return inference.predictions(outputs, self.mask_heads[-1], sizes, original_sizes, threshold, max_per_image)

    @torch.no_grad()
    def mask_logits(self, outputs: Outputs) -> Tensor:
        return inference.mask_logits(outputs, self.mask_heads[-1])
