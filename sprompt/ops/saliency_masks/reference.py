"""Saliency proposals in plain PyTorch, in the features' own precision (half types: float32). No op has a gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import pack

#: Lower bound of the norms, and the range below which a map is flat.
SMALLEST = 1e-12
FLAT = 1e-6


def wide(x: Tensor) -> Tensor:
    """The tensor in the precision of the sums, contiguous: the rounding of a product may depend on the strides of its
    factors."""
    return (x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()).contiguous()


def grids(height: int, width: int, grid_height: int, grid_width: int) -> list[tuple[int, int]]:
    """Sizes of the seed grids, in order. grid_height = 0 means the pyramid."""
    if grid_height > 0:
        return [(grid_height, grid_width)]
    return [(height >> scale, width >> scale) for scale in range(3)]


def cells_valid(features: Tensor, valid: Tensor | None) -> Tensor:
    """(B, H, W) bool."""
    batch, _, height, width = features.shape
    return features.new_ones((batch, height, width), dtype=torch.bool) if valid is None else valid


def pyramid_seeds(features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds (B, M, D) of the scales 1, 1/2, 1/4, and which seeds are valid, (B, M). The whole block of a valid seed is
    valid."""
    seeds, usable = [features.flatten(2)], [valid.flatten(1)]
    for side, inner in ((2, slice(0, 2)), (4, slice(1, 3))):
        height, width = valid.shape[1] // side, valid.shape[2] // side
        blocks = (
            features[..., : height * side, : width * side].unflatten(-1, (width, side)).unflatten(-3, (height, side))
        )
        seeds.append(blocks[:, :, :, inner, :, inner].mean((3, 5)).flatten(2))
        whole = valid[..., : height * side, : width * side].unflatten(-1, (width, side)).unflatten(-3, (height, side))
        usable.append(whole.all(4).all(2).flatten(1))
    return torch.cat(seeds, 2).mT, torch.cat(usable, 1)


def grid_seeds(features: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Means over the valid cells of the windows of adaptive pooling, (B, M, D), and which windows have a valid cell."""
    sides = []
    for size, pieces in zip(valid.shape[1:], grid, strict=True):
        piece, cell = torch.arange(pieces, device=valid.device)[:, None], torch.arange(size, device=valid.device)
        start = torch.div(piece * size, pieces, rounding_mode="floor")
        end = torch.div((piece + 1) * size + pieces - 1, pieces, rounding_mode="floor")
        sides.append(((cell >= start) & (cell < end)).to(features.dtype))
    rows, columns = sides
    count = rows @ valid.to(features.dtype) @ columns.mT
    total = rows @ torch.where(valid[:, None], features, 0) @ columns.mT
    return (total / count.clamp(min=1)[:, None]).flatten(2).mT, (count > 0).flatten(1)


def normalised_maps(
    features: Tensor, valid: Tensor, seeds: Tensor, usable: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Norm(maps) (B, M, P) of seeds (B, M, D), 0 outside, and which maps are good, (B, M). A good map is not flat, has no NaN
    or infinity, a usable seed, and a valid cell."""
    with torch.autocast(features.device.type, enabled=False):
        inside = valid.flatten(1)[:, None]
        pixels = torch.where(inside, features.flatten(2), 0)
        maps = seeds.contiguous() @ pixels.contiguous()
        scale = maps.new_ones(())
        if cosine:  # Norm cancels the seed's norm, so only the test for flatness needs it
            maps = maps / pixels.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
            scale = seeds.norm(dim=2).clamp(min=SMALLEST)
    if maps.shape[-1] == 0:
        return maps, maps.new_zeros(maps.shape[:-1], dtype=torch.bool)
    low = torch.where(inside, maps, torch.inf).amin(-1)
    extent = torch.where(inside, maps, -torch.inf).amax(-1) - low
    good = extent.isfinite() & (extent / scale >= FLAT) & inside.any(-1)
    if usable is not None:
        good = good & usable
    norm = (maps - low[..., None]) / torch.where(good, extent, 1)[..., None]
    return torch.where(good[..., None] & inside, norm, 0), good


def _seeds(features: Tensor, valid: Tensor, grid_height: int, grid_width: int) -> tuple[Tensor, Tensor]:
    if grid_height > 0:
        with torch.autocast(features.device.type, enabled=False):
            return grid_seeds(features, valid, (grid_height, grid_width))
    return pyramid_seeds(features, valid)


def saliency_bits(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    features, inside = wide(a.features), cells_valid(a.features, a.valid)
    maps, good = normalised_maps(features, inside, *_seeds(features, inside, a.grid_height, a.grid_width), a.cosine)
    bits = (maps >= a.threshold) & good[..., None]
    area = bits.sum(-1)
    kept = area >= a.min_area
    bits, area = bits & kept[..., None], torch.where(kept, area, 0)
    score = (maps * bits).sum(-1, dtype=torch.float64) / area.clamp(min=1)
    return pack(bits[..., None, :], 0.5), area, score.to(features.dtype)


def saliency_soft(a: Args) -> Tensor:
    features, addresses, inside = wide(a.features), a.addresses, cells_valid(a.features, a.valid)
    height, width = features.shape[2:]
    if height * width == 0:
        return a.features.new_zeros((*addresses.shape[:2], height, width))
    seeds, usable = _seeds(features, inside, a.grid_height, a.grid_width)
    index = indices(addresses, grids(height, width, a.grid_height, a.grid_width))
    chosen = seeds.gather(1, index[..., None].expand(*index.shape, seeds.shape[2]))
    usable = usable.gather(1, index) & (addresses[..., 0] >= 0)
    maps, _ = normalised_maps(features, inside, chosen, usable, a.cosine)
    return maps.unflatten(-1, (height, width)).to(a.features.dtype)


def saliency_maps(a: Args) -> Tensor:
    features = wide(a.features)
    maps, _ = normalised_maps(features, cells_valid(features, a.valid), wide(a.seeds), None, a.cosine)
    return maps.unflatten(-1, tuple(features.shape[2:])).to(a.features.dtype)


def indices(addresses: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Addresses (..., 3) of scale, row, column -> places in the concatenated grids, 0 for the scale -1."""
    scale, row, column = addresses.unbind(-1)
    index, start = torch.zeros_like(scale), 0
    for number, (height, width) in enumerate(sizes):
        index = torch.where(scale == number, start + row * width + column, index)
        start += height * width
    return index


def addresses_of(index: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The inverse of `indices`: (...) -> (..., 3)."""
    out, start = [torch.zeros_like(index) for _ in range(3)], 0
    for number, (height, width) in enumerate(sizes):
        if height * width > 0:
            here, at = index >= start, index - start
            place = (torch.full_like(at, number), torch.div(at, width, rounding_mode="floor"), at % width)
            out = [torch.where(here, new, old) for new, old in zip(place, out, strict=True)]
        start += height * width
    return torch.stack(out, -1)
