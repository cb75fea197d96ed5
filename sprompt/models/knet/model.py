"""K-Net as a model that methods can train: see `sprompt.models.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks, Size
from sprompt.models.backbone import build_backbone
from sprompt.models.knet import inference, loss
from sprompt.models.knet.config import KNetConfig
from sprompt.models.knet.kernel_head import KernelHead
from sprompt.models.knet.outputs import Outputs
from sprompt.models.knet.update_head import UpdateHead
from sprompt.models.protocol import (
    Features,
    Losses,
    ParameterGroup,
    Prediction,
    Prompter,
    Targets,
    check_images,
    refuse_groups,
)
from sprompt.nn.fpn import FPN
from sprompt.ops import mask_conv, mask_pool, mask_update


class IterativeHead(nn.Module):
    """The update heads, one after the other."""

    def __init__(self, config: KNetConfig) -> None:
        super().__init__()
        self.mask_head = nn.ModuleList(
            UpdateHead(config.channels, config.heads, config.feedforward, config.num_classes)
            for _ in range(config.stages)
        )


class KNet(nn.Module):
    """K-Net with an FPN. Parameters have the names of the official checkpoints.

    Two sites take prompts. "kernel": the learned kernels, which are the same for all images. The prompted kernels make the
    first masks and are the base of the proposal kernels. "proposal": the proposal kernels before the first stage. A proposal
    kernel is a kernel plus the features pooled under its mask.
    """

    Config = KNetConfig
    sites = ("kernel", "proposal")

    def __init__(self, config: KNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = KNetConfig() if config is None else config
        self.backbone = build_backbone(config, frozen_stages=config.frozen_stages)
        self.neck = FPN(self.backbone.channels, config.channels)
        self.rpn_head = KernelHead(config.channels, config.kernels, config.num_classes)
        self.roi_head = IterativeHead(config)

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_queries(self) -> int:
        return self.config.kernels

    def reset_classifier(self, num_classes: int) -> None:
        """Makes fresh classification layers for this number of classes. Make the optimiser after this call."""
        self.config = replace(self.config, num_classes=num_classes)
        self.rpn_head.reset_classifier(num_classes)
        for stage in self.stages:
            stage.reset_classifier(num_classes)

    def freeze_backbone(self, stages: int) -> None:
        """Freezes this many stages of the backbone and makes the others trainable. Make the optimiser after this call."""
        self.config = replace(self.config, frozen_stages=stages)
        self.backbone.freeze(stages)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone has a quarter of the learning rate. All parameters decay, as in the official release."""
        return [ParameterGroup(list(self.backbone.parameters()), rate=0.25)]

    def import_checkpoint(self, path: Path) -> str:
        """Takes the weights of an official checkpoint; see `sprompt.models.knet.checkpoint`."""
        from sprompt.models.knet.checkpoint import import_checkpoint

        return import_checkpoint(self, path)

    @property
    def stages(self) -> list[UpdateHead]:
        return list(self.roi_head.mask_head)  # type: ignore[arg-type]  # a ModuleList of UpdateHeads

    def forward(self, images: Tensor) -> Outputs:
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Features:
        """Maps of images (B, 3, H, W), normalised, H and W multiples of 32. The model treats padding as pixels."""
        check_images("KNet", images)
        maps = self.backbone(images)
        return Features(maps, self.neck(maps))

    def decode(self, features: Features, prompter: Prompter | None = None, targets: Targets | None = None) -> Outputs:
        refuse_groups("KNet", targets)
        loc, sem = self.rpn_head(features.maps)
        kernels = self._prompted(prompter, "kernel", self.rpn_head.kernels(len(loc)), loc)
        masks = [mask_conv(loc, kernels)]
        seg = self.rpn_head.conv_seg(sem)
        x = loc + sem
        if self.config.fold:
            x = torch.cat([x, x.new_ones(()).expand(len(x), 1, *x.shape[2:])], 1)  # x₊
        pooled = mask_pool(x, masks[0])
        proposals = kernels + pooled[..., : self.channels]
        proposals = self._prompted(prompter, "proposal", proposals, x[:, : self.channels])

        outputs = Outputs(masks, [], [], seg)
        for number, stage in enumerate(self.stages):
            last = number == self.config.stages - 1
            if self.config.fold:
                classes, mask_kernels, proposals = stage.folded(pooled, proposals)
                if last:
                    logits = mask_conv(x, mask_kernels)
                else:
                    logits, pooled = mask_update(x, mask_kernels)  # also pools for the next stage, with one read of x
            else:
                transformed = stage.feat_transform(x)
                classes, mask_kernels, proposals = stage(mask_pool(transformed, masks[-1]), proposals)
                logits = mask_conv(transformed, mask_kernels)
            outputs.masks.append(logits)
            outputs.classes.append(classes)
            outputs.kernels.append(proposals)
        return outputs

    def losses(self, outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        return loss.losses(outputs, masks, labels, counts, self.config)

    def predictions(
        self, outputs: Outputs, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        return inference.predictions(
            outputs.masks[-1], outputs.classes[-1], input_size, sizes, original_sizes, threshold, max_per_image
        )

    def mask_logits(self, outputs: Outputs) -> Tensor:
        return outputs.masks[-1]

    def _prompted(self, prompter: Prompter | None, site: str, kernels: Tensor, features: Tensor) -> Tensor:
        if prompter is None:
            return kernels
        prompted = prompter(site, kernels, features)
        if prompted.shape != kernels.shape:
            raise ValueError(
                f"KNet: at {site!r} the prompter must return kernels of shape {tuple(kernels.shape)}, got {tuple(prompted.shape)}"
            )
        return prompted
