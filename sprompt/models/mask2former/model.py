"""Mask2Former as a model that methods can train: see `sprompt.models.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks, Size
from sprompt.models import query_inference
from sprompt.models.backbone import build_backbone
from sprompt.models.mask2former import loss
from sprompt.models.mask2former.config import Mask2FormerConfig
from sprompt.models.protocol import (
    Features,
    Losses,
    ParameterGroup,
    Prediction,
    Prompter,
    Slots,
    Targets,
    check_images,
    prompted,
)
from sprompt.models.query_groups import join
from sprompt.nn.masked_decoder import MaskedDecoder
from sprompt.nn.pixel_decoder import LEVELS, PixelDecoder
from sprompt.nn.swin import Swin, WindowAttention
from sprompt.ops import mask_conv


class Outputs(NamedTuple):
    """The predictions of the start queries, then of every layer."""

    classes: list[Tensor]  # (B, Q, K + 1) logits; the last class is no object
    hidden: list[Tensor]  # (B, Q, C)
    embeddings: list[Tensor]  # (B, Q, C): their products with the mask features are mask logits of stride 4
    mask_features: Tensor  # (B, C, H, W), stride 4
    last: Tensor  # (B, Q, C), the queries behind the last layer
    groups: tuple[Outputs, ...] = ()  # of extra queries, in the order of the groups


class TransformerModule(nn.Module):
    """The queries and the decoder."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.queries_embedder = nn.Embedding(config.queries, config.channels)
        self.queries_features = nn.Embedding(config.queries, config.channels)
        self.level_embed = nn.Embedding(LEVELS, config.channels)
        self.decoder = MaskedDecoder(config.channels, config.heads, config.decoder_feedforward, config.decoder_layers)


class Mask2Former(nn.Module):
    """Mask2Former. Parameters outside of the backbone have transformers' names.

    One site takes prompts: "query", the content of the learned queries; their positions stay as they are. `Features.maps` are the mask
    features (stride 4), then the pixel decoder's maps of strides 8, 16 and 32.
    """

    Config = Mask2FormerConfig
    sites = ("query",)

    def __init__(self, config: Mask2FormerConfig | None = None) -> None:
        super().__init__()
        self.config = config = Mask2FormerConfig() if config is None else config
        frozen = config.frozen_stages
        self.backbone = (
            Swin(config.swin, frozen_stages=frozen)
            if config.backbone == "swin"
            else build_backbone(config, frozen_stages=frozen)
        )
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, config.channels, config.heads, config.encoder_feedforward, config.encoder_layers
        )
        self.transformer_module = TransformerModule(config)
        self.class_predictor = nn.Linear(config.channels, config.num_classes + 1)

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
        self.config = replace(self.config, num_classes=num_classes)
        like = self.class_predictor.weight
        self.class_predictor = nn.Linear(self.channels, num_classes + 1, device=like.device, dtype=like.dtype)

    def freeze_backbone(self, stages: int) -> None:
        self.config = replace(self.config, frozen_stages=stages)
        self.backbone.freeze(stages)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Norms, queries, level embeddings and a Swin's position biases do not decay; the backbone has a tenth of the learning rate."""
        still = {p for m in self.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
        module = self.transformer_module
        for table in (module.queries_embedder, module.queries_features, module.level_embed):
            still.update(table.parameters())
        still |= {m.relative_position_bias_table for m in self.modules() if isinstance(m, WindowAttention)}
        still.add(self.pixel_decoder.level_embed)
        backbone = list(self.backbone.parameters())
        return [
            ParameterGroup(list(still - set(backbone)), decay=0),
            ParameterGroup([p for p in backbone if p not in still], rate=0.1),
            ParameterGroup([p for p in backbone if p in still], rate=0.1, decay=0),
        ]

    @staticmethod
    def released_config(path: Path, config: Mask2FormerConfig) -> Mask2FormerConfig:
        """The sizes of a file of transformers; see `sprompt.models.mask2former.checkpoint`."""
        from sprompt.models.mask2former.checkpoint import released_config

        return released_config(path, config)

    def import_checkpoint(self, path: Path) -> str:
        """Takes the weights of a file of transformers or of the official release; see `sprompt.models.mask2former.checkpoint`."""
        from sprompt.models.mask2former.checkpoint import import_checkpoint

        return import_checkpoint(self, path)

    def forward(self, images: Tensor) -> Outputs:
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Features:
        """Maps of images (B, 3, H, W), normalised, H and W multiples of 32. Padding is pixels like any other."""
        check_images("Mask2Former", images)
        maps = self.backbone(images)
        return Features(maps, self.pixel_decoder(maps))

    def decode(self, features: Features, prompter: Prompter | None = None, targets: Targets | None = None) -> Outputs:
        mask_features, *maps = features.maps
        module, batch = self.transformer_module, len(mask_features)
        content = module.queries_features.weight.expand(batch, -1, -1)
        content = prompted("Mask2Former", prompter, "query", content)
        groups = () if targets is None else targets.groups
        joined = join(content, module.queries_embedder.weight.expand(batch, -1, -1), groups)
        decoded = module.decoder(
            joined.content, joined.positions, maps[::-1], module.level_embed.weight, mask_features,
            sees=joined.sees, given=joined.masks,
        )  # fmt: skip
        classes = [self.class_predictor(hidden) for hidden in decoded.hidden]
        own, *others = (
            Outputs(
                [x[:, place] for x in classes], [x[:, place] for x in decoded.hidden], [x[:, place] for x in decoded.embeddings],
                mask_features, decoded.last[:, place],
            )
            for place in joined.places
        )  # fmt: skip
        return own._replace(groups=tuple(others))

    def losses(self, outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        return loss.losses(outputs, masks, labels, counts, self.config)

    def learned_queries(self) -> tuple[Tensor, Tensor]:
        module = self.transformer_module
        return module.queries_features.weight, module.queries_embedder.weight

    def group_states(self, outputs: Outputs, group: int) -> Tensor:
        return outputs.groups[group].last

    def group_losses(
        self, outputs: Outputs, group: int, masks: BitMasks, counts: Tensor, slots: Slots
    ) -> dict[str, Tensor]:
        return loss.group_losses(outputs.groups[group], masks, counts, slots, self.config)

    def mask_logits(self, outputs: Outputs) -> Tensor:
        return mask_conv(outputs.mask_features, outputs.embeddings[-1])

    @torch.no_grad()
    def predictions(
        self, outputs: Outputs, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        return query_inference.predictions(
            "Mask2Former", outputs.mask_features, outputs.embeddings[-1], outputs.classes[-1], input_size, sizes, original_sizes, threshold,
            max_per_image,
        )  # fmt: skip
