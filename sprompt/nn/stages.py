"""Backbones of a stem and four stages, of which the first ones can be frozen."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="Staged")  # typing has its own from Python 3.11 on


def laid_out(images: Tensor) -> Tensor:
    """The pictures as convolutions of a CPU read them fastest: the channels of a pixel side by side. Convolutions keep that order, so all
    maps have it. The best order on a GPU has not been measured; there the pictures stay as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


class Staged(nn.Module):
    """A backbone with maps of strides 4, 8, 16 and 32, one behind each stage.

    A subclass says its `parts`, and calls `freeze` at the end of its constructor. `frozen_stages`: -1 trains all, 0 freezes the stem, 1
    the stem and the first stage, ... 4 everything. `train_batchnorm`: False: batch norm uses its running statistics, also after
    `.train()`. True: batch norm of the parts that are not frozen follows the mode, for training from scratch.
    """

    strides = (4, 8, 16, 32)
    frozen_stages = -1
    train_batchnorm = False

    def parts(self) -> list[list[nn.Module]]:
        """The modules of the stem, then those of each stage."""
        raise NotImplementedError

    def freeze(self, stages: int) -> None:
        """Freezes this number of stages, counted as in `frozen_stages`, and makes all others trainable."""
        if not -1 <= stages <= 4:
            raise ValueError(f"{type(self).__name__}: frozen_stages must be from -1 (none) to 4 (all), got {stages}")
        self.frozen_stages = stages
        self.requires_grad_(True)
        for module in self._frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self: Self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if not self.train_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [module for part in self.parts()[: self.frozen_stages + 1] for module in part]
