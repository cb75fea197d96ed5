"""A kernel update head: it updates kernels by the features under their masks, and lets them attend to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.conv import Conv, full_precision
from sprompt.nn.kernel_updator import KernelUpdator
from sprompt.nn.query_layers import RARE, FeedForward, SelfAttention, branch


class Update(NamedTuple):
    class_logits: Tensor  # (B, N, K)
    mask_kernels: Tensor  # (B, N, C): their products with the transformed features are the mask logits
    kernels: Tensor  # (B, N, C), for the next stage


class UpdateHead(nn.Module):
    """Kernels and the transformed features pooled under their masks -> class logits, mask kernels, new kernels.

    The feature transform is affine, x̃ = Wx + b, so it can be applied to kernels and pooled sums instead of the features. Let
    T = [W | b] and x₊ = [x; 1]. Then the pooled x̃ is T times the pooled x₊, whose last entry is the mask's area, and
    ⟨w, x̃⟩ = ⟨Tᵀw, x₊⟩. A pooled sum can run over all cells and be large, so the head computes in float32 under autocast too.
    """

    def __init__(self, channels: int, heads: int, feedforward: int, num_classes: int) -> None:
        super().__init__()
        self.attention = SelfAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.kernel_update_conv = KernelUpdator(channels)
        self.feat_transform = Conv(channels, channels)
        self.ffn = FeedForward(channels, feedforward)
        self.ffn_norm = nn.LayerNorm(channels)
        self.cls_fcs = branch(channels)
        self.fc_cls = nn.Linear(channels, num_classes)
        self.mask_fcs = branch(channels)
        self.fc_mask = nn.Linear(channels, channels)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        assert self.feat_transform.conv.bias is not None
        nn.init.zeros_(self.feat_transform.conv.bias)
        nn.init.constant_(self.fc_cls.bias, RARE)

    def reset_classifier(self, num_classes: int) -> None:
        like = self.fc_mask.weight
        self.fc_cls = nn.Linear(like.shape[1], num_classes, device=like.device, dtype=like.dtype)
        nn.init.xavier_uniform_(self.fc_cls.weight)
        nn.init.constant_(self.fc_cls.bias, RARE)

    def forward(self, pooled: Tensor, kernels: Tensor) -> Update:
        """pooled: (B, N, C), sums of the transformed features; kernels: (B, N, C)."""
        with torch.autocast(pooled.device.type, enabled=False):
            k = self.kernel_update_conv(full_precision(pooled), full_precision(kernels))
            k = self.attention_norm(self.attention(k))
            k = self.ffn_norm(self.ffn(k))
            return Update(self.fc_cls(self.cls_fcs(k)), self.fc_mask(self.mask_fcs(k)), k)

    def folded(self, pooled: Tensor, kernels: Tensor) -> Update:
        """The same update, from pooled x₊ and with mask kernels that act on x₊. Both have C + 1 channels."""
        conv = self.feat_transform.conv
        assert conv.bias is not None
        with torch.autocast(pooled.device.type, enabled=False):
            transform = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1)  # T
            update = self(F.linear(full_precision(pooled), transform), kernels)
            return update._replace(mask_kernels=update.mask_kernels @ transform)
