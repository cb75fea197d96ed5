"""FastInst as a model that methods can train: see `sprompt.models.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.masks import BitMasks, Size
from sprompt.models import query_inference
from sprompt.models.backbone import build_backbone
from sprompt.models.fastinst import loss
from sprompt.models.fastinst.config import FastInstConfig
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
from sprompt.nn.dual_path import Decoded, DualPathDecoder
from sprompt.nn.ppm_fpn import PPMFPN
from sprompt.ops import activation_queries, mask_conv

GRID = 0.02  # standard deviation of the first values of the grid of positions


class Outputs(NamedTuple):
    decoded: Decoded  # its queries: first those chosen from cells, which predict, then the auxiliary ones
    classes: Tensor  # (B, Q, K + 1) logits of the last head; the last class is no object
    proposals: Tensor  # (B, K + 1, h, w): class logits of the cells of stride 16
    locations: (
        Tensor | None
    )  # (B, Q, 2): x, y of the cells that became queries, see `_locations`; None for learned queries


class FastInst(nn.Module):
    """FastInst.

    One site takes prompts: "query", the content of the queries that predict; their positions and the auxiliary queries stay as they are.
    `Features.maps` are the pixel decoder's maps of strides 8, 8, 16 and 32: it has no map of stride 4, so that of stride 8 stands for it
    too. Batch norm of the backbone keeps its statistics and is not trained.
    """

    Config = FastInstConfig
    sites = ("query",)

    def __init__(self, config: FastInstConfig | None = None) -> None:
        super().__init__()
        self.config = config = FastInstConfig() if config is None else config
        width, side = config.channels, round(config.queries**0.5)
        self.backbone = build_backbone(config, frozen_stages=config.frozen_stages)
        self.freeze_backbone(config.frozen_stages)
        self.pixel_decoder = PPMFPN(self.backbone.channels[1:], width)
        self.proposal_predictor = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, config.num_classes + 1, 1)
        )
        self.positions = nn.Parameter(GRID * torch.randn(1, width, side, side))  # resized to every map
        if config.selection == "learned":
            self.query_content = nn.Embedding(config.queries, width)
            self.query_positions = nn.Embedding(config.queries, width)
        self.auxiliary_content = nn.Embedding(config.auxiliary_queries, width)
        self.auxiliary_positions = nn.Embedding(config.auxiliary_queries, width)
        self.decoder = DualPathDecoder(
            width, config.heads, config.decoder_feedforward, config.decoder_layers, config.num_classes + 1
        )

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_queries(self) -> int:
        return self.config.queries

    def reset_classifier(self, num_classes: int) -> None:
        """Makes fresh last layers of the classifiers of cells and queries."""
        self.config = replace(self.config, num_classes=num_classes)
        like, width = self.positions, self.channels
        self.proposal_predictor[2] = nn.Conv2d(width, num_classes + 1, 1, device=like.device, dtype=like.dtype)
        self.decoder.reset_classifier(num_classes + 1)

    def freeze_backbone(self, stages: int) -> None:
        self.config = replace(self.config, frozen_stages=stages)
        self.backbone.freeze(stages)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Norms and learned queries do not decay, but the grid of positions does; the backbone has a tenth of the learning rate."""
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
        still = {p for m in self.modules() if isinstance(m, kinds) for p in m.parameters()}
        return [ParameterGroup(list(still), decay=0), ParameterGroup(list(self.backbone.parameters()), rate=0.1)]

    def import_checkpoint(self, path: Path) -> str:
        """Takes the weights of a file of the official release; see `sprompt.models.fastinst.checkpoint`."""
        from sprompt.models.fastinst.checkpoint import import_checkpoint

        return import_checkpoint(self, path)

    def forward(self, images: Tensor) -> Outputs:
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Features:
        """Maps of images (B, 3, H, W), normalised, H and W multiples of 32, with a cell of stride 16 for each query at least. Padding is
        pixels like any other."""
        check_images("FastInst", images)
        cells = (images.shape[2] // 16) * (images.shape[3] // 16)
        if cells < self.config.queries:
            raise ValueError(
                f"FastInst: images must have a cell of 16x16 pixels for each of the {self.config.queries} queries, got {cells} cells in "
                f"images of {images.shape[2]}x{images.shape[3]}; take larger pictures or fewer queries"
            )
        maps = self.backbone(images)
        fine, middle, coarse = self.pixel_decoder(maps[1:])
        return Features(maps, [fine, fine, middle, coarse])

    def decode(self, features: Features, prompter: Prompter | None = None, targets: Targets | None = None) -> Outputs:
        refuse_groups("FastInst", targets)
        _, fine, middle, _ = features.maps
        proposals = self.proposal_predictor(middle)
        content, positions, locations = self._queries(proposals, middle)
        content = prompted("FastInst", prompter, "query", content)
        added = [t.weight.expand(len(content), -1, -1) for t in (self.auxiliary_content, self.auxiliary_positions)]
        decoded = self.decoder(
            torch.cat([content, added[0]], 1),
            torch.cat([positions, added[1]], 1),
            fine.flatten(2).mT,
            self._positions(fine),
            (fine.shape[2], fine.shape[3]),
            self.config.queries,
        )
        classes = self.decoder.classes(-1, decoded.predicted[-1].hidden)
        return Outputs(decoded, classes, proposals, locations)

    def losses(self, outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        return loss.losses(outputs, masks, labels, counts, self.config, self.decoder)

    def mask_logits(self, outputs: Outputs) -> Tensor:
        last = outputs.decoded.predicted[-1]
        return mask_conv(last.features, last.embeddings)

    @torch.no_grad()
    def predictions(
        self, outputs: Outputs, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        last = outputs.decoded.predicted[-1]
        return query_inference.predictions(
            "FastInst", last.features, last.embeddings, outputs.classes, input_size, sizes, original_sizes, threshold, max_per_image
        )  # fmt: skip

    def _queries(self, proposals: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Content and positions (B, Q, C) of the queries that predict, and the locations of their cells."""
        if self.config.selection == "learned":
            content, positions = (
                t.weight.expand(len(cells), -1, -1) for t in (self.query_content, self.query_positions)
            )
            return content, positions, None
        index, _, _ = activation_queries(proposals.detach(), self.config.queries)
        content = cells.flatten(2).mT.gather(1, index[..., None].expand(-1, -1, self.channels))
        return content, self._positions(cells)[index], _locations(index, cells)

    def _positions(self, like: Tensor) -> Tensor:
        """(h·w, C): the position of every cell of a map."""
        return F.interpolate(self.positions, like.shape[2:], mode="bilinear", align_corners=False)[0].flatten(1).T


def _locations(index: Tensor, like: Tensor) -> Tensor:
    """x, y (B, Q, 2) of cells of a map. The outermost cells are at 0 and 1, unlike the points of `sample_points`, where cell i of n is at
    (i + ½) / n: the training of the release has this offset."""
    height, width = like.shape[2:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    column, row = (index % width).to(dtype), torch.div(index, width, rounding_mode="floor").to(dtype)
    return torch.stack([column / max(width - 1, 1), row / max(height - 1, 1)], 2)
