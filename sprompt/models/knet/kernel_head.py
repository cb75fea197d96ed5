"""The kernel head: mask features, the learned kernels, and dense class logits for an auxiliary loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sprompt.nn.conv import ConvGN
from sprompt.nn.query_layers import RARE
from sprompt.nn.semantic_fpn import SemanticFPN


class KernelHead(nn.Module):
    """Pyramid maps -> (loc, sem), both of stride 8. Kernels act on the features loc. The features sem tell classes apart."""

    def __init__(self, channels: int, kernels: int, num_classes: int) -> None:
        super().__init__()
        self.localization_fpn = SemanticFPN(channels)
        self.init_kernels = nn.Conv2d(channels, kernels, 1, bias=False)
        self.loc_convs = nn.ModuleList([ConvGN(channels, channels)])
        self.seg_convs = nn.ModuleList([ConvGN(channels, channels)])
        for module in (*self.loc_convs.modules(), *self.seg_convs.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.normal_(self.init_kernels.weight, std=1.0)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        like = self.init_kernels.weight
        self.conv_seg = nn.Conv2d(like.shape[1], num_classes, 1, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.constant_(self.conv_seg.bias, RARE)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        loc, sem = self.localization_fpn(maps)
        return self.loc_convs[0](loc), self.seg_convs[0](sem)

    def kernels(self, batch: int) -> Tensor:
        """The learned kernels K⁰ for every image, (B, N, C)."""
        return self.init_kernels.weight.flatten(1).expand(batch, -1, -1)
