"""The declarations of the saliency ops, and the scratch memory of the native ones. B images, M or K seeds, P cells."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.saliency_masks.reference import grids

#: Columns that every level's panels divide, and rows that one chunk of a product has (csrc/saliency_masks/panels.h).
_LINE, _GROUP = 96, 48
#: Up to this many cells the pyramid keeps the whole Gram matrix (64 MB) and computes half of it; beyond, stripes.
_GRAM = 4096
#: Elements of the stripes and blocks of products (16 MB).
_BLOCK = 1 << 22


def _line(columns: int) -> int:
    return (columns + _LINE - 1) // _LINE * _LINE


def _cells(a: Args) -> tuple[Tensor, Tensor | None]:
    """features (B, D, P) and valid (B, P) with last stride 1; features are copied only where their cells are not one run."""
    x, valid = a.features, a.valid
    height, width = x.shape[2:]
    if x.stride(3) != 1 or (height > 1 and x.stride(2) != width):
        x = x.contiguous()
    x = x.as_strided((*x.shape[:2], height * width), (*x.stride()[:2], 1))
    return x, None if valid is None else valid.flatten(1).contiguous()


def _scratch(features: Tensor, columns: int, rows: int = 0) -> tuple[Tensor, ...]:
    """packed, packed_seeds (for `columns` seed vectors), products, lines; as saliency_masks.h has them. rows of products at a
    time, 0: as many as a block holds."""
    depth, line, seed_line = features.shape[1], _line(features.shape[2] * features.shape[3]), _line(columns)
    rows = rows or min(seed_line, max(_BLOCK // max(line, 1) // _GROUP, 1) * _GROUP)
    sizes = (depth, line), (depth, seed_line), (rows, line), (3 + native.threads(), max(line, seed_line))
    return tuple(native.scratch(*size, slot=slot) for slot, size in enumerate(sizes))


def _pyramid_rows(height: int, width: int) -> int:
    line = _line(height * width)
    if line <= _GRAM:
        return line
    return _line(4 * width * max(_BLOCK // line // (4 * width), 1)) + 2 * _LINE


@op("triton")
def saliency_bits(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, threshold: float, min_area: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Words, areas and scores of all M seeds; those of the pyramid if grid_height is 0."""
    B, _, H, W = features.shape
    M = sum(height * width for height, width in grids(H, W, grid_height, grid_width))
    sums = torch.float64 if features.dtype == torch.float64 else torch.float32
    words = new(features, B, M, words_for(H * W), dtype=torch.int32)
    return words, new(features, B, M, dtype=torch.int64), new(features, B, M, dtype=sums)


@saliency_bits.native
def _(a: Args, words: Tensor, areas: Tensor, scores: Tensor) -> None:
    if words.numel() == 0:
        areas.zero_(), scores.zero_()
        return
    size = a.features.shape[2:]
    scratch = _scratch(a.features, words.shape[1]) if a.grid_height else _scratch(a.features, 0, _pyramid_rows(*size))
    native._C.saliency_bits(*_cells(a), *size, *a[2:], *scratch, words, areas, scores, native.threads())


@op("triton")
def saliency_soft(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, addresses: Tensor
) -> Tensor:
    """Maps of the seeds at addresses (B, K, 3)."""
    return new(features, *addresses.shape[:2], *features.shape[2:])


@saliency_soft.native
def _(a: Args, maps: Tensor) -> None:
    if maps.numel() == 0:
        return
    columns = maps.shape[1] if a.grid_height else 4 * maps.shape[1]
    scratch = _scratch(a.features, columns, 0 if a.grid_height else _line(columns))
    call = *_cells(a), *maps.shape[2:], *a[2:5], a.addresses.contiguous(), *scratch
    native._C.saliency_soft(*call, maps.flatten(2), native.threads())


@op("triton")
def saliency_maps(features: Tensor, seeds: Tensor, valid: Tensor | None, cosine: bool) -> Tensor:
    return new(features, *seeds.shape[:2], *features.shape[2:])


@saliency_maps.native
def _(a: Args, maps: Tensor) -> None:
    if maps.numel() == 0:
        return
    call = *_cells(a), native.rows(a.seeds), a.cosine, *_scratch(a.features, maps.shape[1])
    native._C.saliency_maps(*call, maps.flatten(2), native.threads())
