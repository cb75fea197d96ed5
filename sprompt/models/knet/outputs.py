"""The decoder's outputs, for the losses and for inference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Outputs for a batch. Maps have stride 8."""

    masks: list[Tensor]  # (B, N, h, w) logits: of the kernel head, then of every stage
    classes: list[Tensor]  # (B, N, K) logits of every stage
    kernels: list[Tensor]  # (B, N, C) output kernels of every stage
    seg: Tensor  # (B, K, h, w) dense class logits of the kernel head
