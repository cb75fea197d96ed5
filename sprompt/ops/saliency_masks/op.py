"""The declarations of the saliency ops. B images, M or K seeds, P cells."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.saliency_masks.reference import grids

#: Products that a native call holds at a time (16 MB). A whole Gram matrix may have up to four times as many.
_HELD = 1 << 22


def _cells(a: Args) -> tuple[Tensor, Tensor | None]:
    """features (B, D, P) and valid (B, P) with last stride 1. Features are copied only if their cells are not contiguous."""
    x, valid = a.features, a.valid
    height, width = x.shape[2:]
    if x.stride(3) != 1 or (height > 1 and x.stride(2) != width):
        x = x.contiguous()
    x = x.as_strided((*x.shape[:2], height * width), (*x.stride()[:2], 1))
    return x, None if valid is None else valid.flatten(1).contiguous()


@op("triton")
def saliency_bits(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, threshold: float, min_area: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Words, areas and scores of all M seeds. If grid_height is 0, the seeds are those of the pyramid."""
    B, _, H, W = features.shape
    M = sum(height * width for height, width in grids(H, W, grid_height, grid_width))
    sums = torch.float64 if features.dtype == torch.float64 else torch.float32
    words = new(features, B, M, words_for(H * W), dtype=torch.int32)
    return words, new(features, B, M, dtype=torch.int64), new(features, B, M, dtype=sums)


@saliency_bits.native
def _(a: Args, *out: Tensor) -> None:
    native._C.saliency_bits(*_cells(a), *a.features.shape[2:], *a[2:], _HELD, *out, native.threads())


@op("triton")
def saliency_soft(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, addresses: Tensor
) -> Tensor:
    """Maps of the seeds at addresses (B, K, 3)."""
    return new(features, *addresses.shape[:2], *features.shape[2:])


@saliency_soft.native
def _(a: Args, maps: Tensor) -> None:
    call = *_cells(a), *maps.shape[2:], *a[2:5], a.addresses.contiguous()
    native._C.saliency_soft(*call, _HELD, maps.flatten(2), native.threads())


@op("triton")
def saliency_maps(features: Tensor, seeds: Tensor, valid: Tensor | None, cosine: bool) -> Tensor:
    return new(features, *seeds.shape[:2], *features.shape[2:])


@saliency_maps.native
def _(a: Args, maps: Tensor) -> None:
    native._C.saliency_maps(*_cells(a), native.rows(a.seeds), a.cosine, _HELD, maps.flatten(2), native.threads())
