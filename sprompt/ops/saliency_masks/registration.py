"""Fake kernels and backends of the saliency ops, and the scratch memory of the native ones."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.library import register_op
from sprompt.ops.saliency_masks import reference

#: Columns that every level's panels divide, and rows that one chunk of a product has (csrc/saliency_masks/panels.h).
_LINE, _GROUP = 96, 48
#: Up to this many cells the pyramid keeps the whole Gram matrix (64 MB) and computes half of it; beyond, stripes.
_GRAM = 4096
#: Elements of the stripes and blocks of products (16 MB).
_BLOCK = 1 << 22


def seed_count(features: Tensor, grid_height: int, grid_width: int) -> int:
    sizes = reference.grids(features.shape[2], features.shape[3], grid_height, grid_width)
    return sum(height * width for height, width in sizes)


def _line(columns: int) -> int:
    return (columns + _LINE - 1) // _LINE * _LINE


def _flat(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, P) with last stride 1; only where the cells are not one run is there a copy."""
    height, width = x.shape[-2:]
    if x.stride(-1) != 1 or (height > 1 and x.stride(-2) != width):
        x = x.contiguous()
    return x.flatten(-2) if x.dim() == 3 else x.as_strided((*x.shape[:2], height * width), (*x.stride()[:2], 1))


def _pixels(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.flatten(1).contiguous()


def _scratch(features: Tensor, columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed, packed_seeds (for `columns` seed vectors), products of `rows` rows, lines; as saliency_masks.h has them."""
    depth, line, seed_line = features.shape[1], _line(features.shape[2] * features.shape[3]), _line(columns)

    def empty(height: int, width: int) -> Tensor:
        return features.new_empty((height, width), dtype=torch.float32)

    lines = empty(3 + native.threads(), max(line, seed_line))
    return empty(depth, line), empty(depth, seed_line), empty(rows, line), lines


def _block_rows(features: Tensor, seeds: int) -> int:
    """Rows of products at a time for seeds that are vectors."""
    line = _line(features.shape[2] * features.shape[3])
    return min(_line(seeds), max(_BLOCK // max(line, 1) // _GROUP, 1) * _GROUP)


def _pyramid_rows(height: int, width: int) -> int:
    line = _line(height * width)
    if line <= _GRAM:
        return line
    return _line(4 * width * max(_BLOCK // line // (4 * width), 1)) + 2 * _LINE


def _saliency_bits(
    features: Tensor,
    valid: Tensor | None,
    grid_height: int,
    grid_width: int,
    cosine: bool,
    threshold: float,
    min_area: int,
) -> tuple[Tensor, Tensor, Tensor]:
    words, areas, scores = _saliency_bits_fake(features, valid, grid_height, grid_width, cosine, threshold, min_area)
    height, width = features.shape[2:]
    if words.numel() == 0:
        return words, areas.zero_(), scores.zero_()
    seeds = words.shape[1] if grid_height > 0 else 0
    rows = _block_rows(features, seeds) if grid_height > 0 else _pyramid_rows(height, width)
    native._C.saliency_bits(
        _flat(features), _pixels(valid), height, width, grid_height, grid_width, cosine, threshold, min_area,
        *_scratch(features, seeds, rows), words, areas, scores, native.threads(),
    )  # fmt: skip
    return words, areas, scores


def _saliency_bits_fake(
    features: Tensor,
    valid: Tensor | None,
    grid_height: int,
    grid_width: int,
    cosine: bool,
    threshold: float,
    min_area: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (features.shape[0], seed_count(features, grid_height, grid_width))
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    words = features.new_empty((*shape, words_for(features.shape[2] * features.shape[3])), dtype=torch.int32)
    return words, features.new_empty(shape, dtype=torch.int64), features.new_empty(shape, dtype=dtype)


def _saliency_soft(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, addresses: Tensor
) -> Tensor:
    maps = _saliency_soft_fake(features, valid, grid_height, grid_width, cosine, addresses)
    if maps.numel() == 0:
        return maps
    columns = addresses.shape[1] * (1 if grid_height > 0 else 4)
    rows = _block_rows(features, columns) if grid_height > 0 else _line(columns)
    native._C.saliency_soft(
        _flat(features), _pixels(valid), features.shape[2], features.shape[3], grid_height, grid_width, cosine,
        addresses.contiguous(), *_scratch(features, columns, rows), maps.flatten(2), native.threads(),
    )  # fmt: skip
    return maps


def _saliency_soft_fake(
    features: Tensor, valid: Tensor | None, grid_height: int, grid_width: int, cosine: bool, addresses: Tensor
) -> Tensor:
    return features.new_empty((*addresses.shape[:2], *features.shape[2:]))


def _saliency_maps(features: Tensor, seeds: Tensor, valid: Tensor | None, cosine: bool) -> Tensor:
    maps = _saliency_maps_fake(features, seeds, valid, cosine)
    if maps.numel() == 0:
        return maps
    vectors = seeds if seeds.stride(-1) == 1 else seeds.contiguous()
    native._C.saliency_maps(
        _flat(features), _pixels(valid), vectors, cosine,
        *_scratch(features, seeds.shape[1], _block_rows(features, seeds.shape[1])), maps.flatten(2), native.threads(),
    )  # fmt: skip
    return maps


def _saliency_maps_fake(features: Tensor, seeds: Tensor, valid: Tensor | None, cosine: bool) -> Tensor:
    return features.new_empty((*seeds.shape[:2], *features.shape[2:]))


register_op(
    "saliency_bits", fake=_saliency_bits_fake, reference=reference.saliency_bits, native_kernel=_saliency_bits, gpu="triton"
)  # fmt: skip
register_op(
    "saliency_soft", fake=_saliency_soft_fake, reference=reference.saliency_soft, native_kernel=_saliency_soft, gpu="triton"
)  # fmt: skip
register_op(
    "saliency_maps", fake=_saliency_maps_fake, reference=reference.saliency_maps, native_kernel=_saliency_maps, gpu="triton"
)  # fmt: skip
