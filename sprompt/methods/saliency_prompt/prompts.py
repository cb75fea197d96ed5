"""Prompts: means of one of the model's own maps over each proposal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.masks import BitMasks, Size
from sprompt.methods.saliency_prompt.config import SaliencyPromptConfig
from sprompt.models.protocol import Features
from sprompt.ops import mask_mean, region_mean

FINEST = 56.0  # pixels: with level "auto", boxes below twice this side are read from P2


class Prompts(NamedTuple):
    vectors: Tensor  # (B, L, C), without gradient to the map; zeros for empty masks
    counts: Tensor  # (B,) int64, number of real prompts of each image


def prompts_of(
    batch: Batch, features: Features, config: SaliencyPromptConfig, layer: nn.Module | None = None
) -> Callable[[Tensor | None], Prompts]:
    """A function that gives the prompts of a batch. It takes the map that queries act on, which level "features" reads; the other levels
    read the maps in `features`. Level "C5" needs `layer`, from the width of that map to the width of the queries.
    """

    def read(acted_on: Tensor | None) -> Prompts:
        maps = features.maps
        if config.level == "C5":
            maps = features.backbone[-1:]
        elif config.level == "features":
            if acted_on is None:
                raise ValueError(
                    'level: "features" needs a model that hands its prompter the map that queries act on; choose another level'
                )
            maps = [acted_on]
        prompts = read_prompts(maps, batch.masks, batch.counts, config, batch.sizes)
        if config.level != "C5":
            return prompts
        if layer is None:
            raise ValueError('level: "C5" needs the linear layer of the pre-training, got none; choose another level')
        there = (batch.masks.area() > 0)[..., None]
        return prompts._replace(vectors=torch.where(there, layer(prompts.vectors), 0))

    return read


@torch.no_grad()
def read_prompts(
    maps: Sequence[Tensor], masks: BitMasks, counts: Tensor, config: SaliencyPromptConfig, sizes: Sequence[Size] = ()
) -> Prompts:
    """One prompt for each mask: the mean of a map over the cells of its box, or over the mask.

    In a map of stride s, a box (x1, y1, x2, y2) in pixels covers the columns ⌊x1/s⌋ to max(⌈x2/s⌉, ⌊x1/s⌋ + 1), and rows
    likewise. With pooling "release" it covers the columns ⌊x1/s⌋ to ⌊x2/s⌋, or two columns if these are equal.

    Args:
        maps: maps (B, C, h, w) of the padded images, P2 first; for the levels "features" and "C5" only the map of that name.
        masks: (B, L), of the size of the padded images.
        counts: (B,), number of real masks of each image.
        sizes: sizes of the images before padding, for `contrast`. By default the mean includes the padding.
    """
    boxes = masks.boxes()
    if config.level == "auto":
        vectors = _by_size(maps, masks, boxes, counts, config, sizes)
    else:
        vectors = _from_map(_level(maps, config.level), masks, boxes, counts, config, sizes)
    there = boxes[..., 2:3] > boxes[..., 0:1]
    return Prompts(torch.where(there, vectors, 0), counts)


def _level(maps: Sequence[Tensor], level: str) -> Tensor:
    if level in ("coarsest", "features", "C5"):
        return maps[-1]
    number = int(level[1:]) - 2
    if number >= len(maps):
        raise ValueError(
            f'level: must be one of P2 to P{len(maps) + 1}, the maps of this model, got {level}; take "coarsest"'
        )
    return maps[number]


def _by_size(
    maps: Sequence[Tensor],
    masks: BitMasks,
    boxes: Tensor,
    counts: Tensor,
    config: SaliencyPromptConfig,
    sizes: Sequence[Size],
) -> Tensor:
    """Prompts from P(2 + k) with k = ⌊log₂(√area / 56)⌋ of the box, clamped to the levels of the pyramid."""
    sides = (boxes[..., 2:] - boxes[..., :2]).float()
    level = (sides.prod(-1).clamp(min=1).sqrt() / FINEST).log2().floor().clamp(0, len(maps) - 1)
    vectors = _from_map(maps[0], masks, boxes, counts, config, sizes)
    for number, x in enumerate(maps[1:], start=1):
        own = _from_map(x, masks, boxes, counts, config, sizes)
        vectors = torch.where((level == number)[..., None], own, vectors)
    return vectors


def _from_map(
    x: Tensor, masks: BitMasks, boxes: Tensor, counts: Tensor, config: SaliencyPromptConfig, sizes: Sequence[Size]
) -> Tensor:
    cells = (x.shape[2], x.shape[3])
    stride = [pixels / n for pixels, n in zip(masks.size, cells, strict=True)]  # rows, columns
    x1, y1, x2, y2 = boxes.unbind(-1)
    cellwise = torch.stack([x1 / stride[1], y1 / stride[0], x2 / stride[1], y2 / stride[0]], -1)
    if config.pooling == "roi_align":
        means = roi_align(x, cellwise)
    elif config.pooling == "release":
        start, end = cellwise.floor().split(2, -1)
        means = region_mean(x, torch.cat([start, torch.where(end == start, start + 2, end)], -1), counts)
    else:
        means = region_mean(x, cellwise, counts)
    if config.pooling == "mask":
        inside = bits_at_centres(masks, cells)
        means = torch.where(inside.flatten(2).any(2, keepdim=True), mask_mean(x, inside), means)
    return contrasted(means, _picture_mean(x, stride, sizes)) if config.contrast else means


def _picture_mean(x: Tensor, stride: list[float], sizes: Sequence[Size]) -> Tensor:
    """(B, 1, C): the mean over the cells that the image covers at least in part, without its padding."""
    if not sizes:
        return x.mean((2, 3))[:, None]
    ends = [[0.0, 0.0, width / stride[1], height / stride[0]] for height, width in sizes]
    whole = torch.tensor(ends, dtype=torch.float32).to(x.device, non_blocking=True)[:, None]
    return region_mean(x, whole, torch.ones(len(x), dtype=torch.int64, device=x.device))


def contrasted(vectors: Tensor, mean: Tensor) -> Tensor:
    """v − μ ‖v‖/‖μ‖ for vectors (B, L, C) and mean (B, 1, C).

    Its product with x is above 0 if the angle of x to v is smaller than to μ. A μ of 0 leaves v unchanged.
    """
    scale = vectors.float().norm(dim=2, keepdim=True) / mean.float().norm(dim=2, keepdim=True).clamp(min=1e-8)
    return (vectors - scale * mean).to(vectors.dtype)


def roi_align(x: Tensor, boxes: Tensor) -> Tensor:
    """RoIAlign with one bin: map (B, C, H, W), boxes (B, L, 4) in cells -> (B, L, C).

    The result is the mean of ⌈height⌉ × ⌈width⌉ bilinear samples, evenly spread over each box. Each bilinear weight is the
    product of a row weight and a column weight, so a prompt is a weighted sum over rows and then over columns.
    """
    x1, y1, x2, y2 = boxes.to(torch.float32).unbind(-1)
    rows, columns = _sample_weights(y1, y2, x.shape[2]), _sample_weights(x1, x2, x.shape[3])
    return torch.einsum("bchw,blh,blw->blc", x.float(), rows, columns).to(x.dtype)


def _sample_weights(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """(B, L, cells): the mean weight that the samples of the intervals (B, L) give to each cell."""
    number = (end - start).ceil().clamp(min=1)
    place = torch.arange(
        cells + 1, device=start.device
    )  # a box has at most as many samples as the map has cells; one more because of rounding
    at = start[..., None] + (end - start)[..., None] * (place + 0.5) / number[..., None] - 0.5
    at = at.clamp(0, cells - 1)  # beyond the map the outermost cells are repeated
    weight = (1 - (at[..., None] - torch.arange(cells, device=start.device)).abs()).clamp(min=0)
    real = place < number[..., None]
    return (weight * real[..., None]).sum(-2) / number[..., None]


def bits_at_centres(masks: BitMasks, cells: tuple[int, int]) -> Tensor:
    """Bool (..., h, w): whether the pixel at the centre of each cell of a coarser map is set. No dense mask is made."""
    rows, columns = (
        ((torch.arange(n, device=masks.device) + 0.5) * (pixels / n)).floor().long()
        for pixels, n in zip(masks.size, cells, strict=True)
    )
    pixel = rows[:, None] * masks.size[1] + columns
    words = masks.words[..., pixel.flatten() // 32].unflatten(-1, cells)
    return (words >> (pixel % 32).int()) & 1 != 0
