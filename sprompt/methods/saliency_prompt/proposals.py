"""Saliency mask proposals of pictures, from the maps of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sprompt.data.sample import Batch, Sample
from sprompt.data.transforms import resize, resized_size
from sprompt.masks import BitMasks, Size
from sprompt.methods.saliency_prompt.config import STRIDES, Level, ProposalConfig
from sprompt.methods.saliency_prompt.precision import exact_products
from sprompt.methods.saliency_prompt.seeds import pooled_at, windows_at
from sprompt.ops import resize_masks, saliency_masks

DIVISOR = 32  # the sides of the input of a backbone with four maps are multiples of it


class Searched(NamedTuple):
    """The map of a backbone that is searched."""

    place: int  # in the list of the backbone's maps, counted from its end: -1 is the last
    stride: int
    divisor: int  # the sides of the backbone's input are multiples of it


class Proposals(NamedTuple):
    """The L proposals of one picture, by decreasing score."""

    masks: BitMasks  # (L,) of the picture's own size
    scores: Tensor  # (L,) float32
    seeds: Tensor  # (L, 3) int64: scale, row, column in the map of the view
    vectors: Tensor | None = None  # (L, D) feature vectors of the seeds


def searched(backbone: nn.Module, level: Level) -> Searched:
    """The map of this level. C5 is the last map of every backbone, C4 the map before it."""
    strides: Sequence[int] = cast(Any, backbone).strides
    place = list(STRIDES).index(level) - len(STRIDES)
    if -place > len(strides):
        raise ValueError(f"ProposalConfig: level must be C5 for a backbone with one map, got {level}")
    return Searched(place, strides[place], max(strides))


def view_size(size: Size, config: ProposalConfig) -> Size:
    """The size that a picture of this size is resized to."""
    return resized_size(size, config.short, config.long) if config.keep_ratio else (config.short, config.long)


def view(sample: Sample, config: ProposalConfig) -> Sample:
    """The picture as the backbone sees it, before it is normalised and padded by `collate`."""
    return resize(sample, view_size(sample.size, config))


def padded_size(size: Size, divisor: int = DIVISOR) -> Size:
    height, width = size
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def valid_cells(sizes: Sequence[Size], cells: Size, stride: int) -> Tensor:
    """(B, H, W) bool: true for cells of a map with their centre in the image, of size sizes[b] before padding."""
    heights, widths = torch.tensor(sizes).reshape(-1, 2).unbind(1)
    rows = (torch.arange(cells[0]) + 0.5) * stride < heights[:, None]
    columns = (torch.arange(cells[1]) + 0.5) * stride < widths[:, None]
    return rows[:, :, None] & columns[:, None, :]


@torch.no_grad()
def propose(backbone: nn.Module, batch: Batch, config: ProposalConfig, *, vectors: bool = False) -> list[Proposals]:
    """Proposals of every picture of a batch, on the CPU.

    Args:
        backbone: images -> maps of its `strides`; in eval mode.
        batch: the result of `collate([view(sample, config), ...], divisor)`, with the divisor of `searched`.
        vectors: whether to return the feature vectors of the seeds too.
    """
    place, stride, _ = searched(backbone, config.level)
    with exact_products(batch.images.device):
        maps = backbone(batch.images)[place].float()
        valid = valid_cells(batch.sizes, (maps.shape[2], maps.shape[3]), stride).to(maps.device)
        found = saliency_masks(
            maps,
            seeds=config.seeds,
            similarity=config.similarity,
            threshold=config.threshold,
            min_area=config.min_area,
            nms=config.nms,
            iou_threshold=config.iou_threshold,
            sigma=config.sigma,
            max_masks=config.max_masks,
            valid=valid,
            return_soft=True,
        )
    assert found.soft is not None
    return [
        _of_picture(
            found.soft[number, :count], found.scores[number, :count], found.seeds[number, :count],
            maps[number], valid[number], batch.sizes[number], batch.original_sizes[number], stride, config, vectors,
        )
        for number, count in enumerate(found.counts.tolist())
    ]  # fmt: skip


def _of_picture(
    soft: Tensor, scores: Tensor, seeds: Tensor, features: Tensor, valid: Tensor, size: Size, original: Size,
    stride: int, config: ProposalConfig, vectors: bool,
) -> Proposals:  # fmt: skip
    """The masks, at the picture's own size, that pass the filters. The padding is cut off before the resize."""
    below = float(
        np.nextafter(np.float32(config.threshold), np.float32(0))
    )  # resize_masks uses >, but the threshold means >=
    crop = tuple(side / stride for side in size)
    masks = resize_masks(_continued(soft, valid), original, threshold=below, crop=(crop[0], crop[1]))
    keep = image_level(masks, scores, config)
    read = seed_vectors(features, valid, seeds[keep], config).cpu() if vectors else None
    return Proposals(masks[keep].to("cpu"), scores[keep].cpu(), seeds[keep].cpu(), read)


def _continued(soft: Tensor, valid: Tensor) -> Tensor:
    """Soft maps (L, h, w) with the last valid row and column repeated beyond the valid cells, which lie at the top left.

    The picture may cover up to half of a cell that is not valid; there a mask continues with the values of the last valid
    cells.
    """
    rows, columns = (int(valid.any(axis).sum()) for axis in (1, 0))
    if rows == 0 or columns == 0 or len(soft) == 0:
        return soft
    beyond = (0, soft.shape[2] - columns, 0, soft.shape[1] - rows)
    return pad(soft[None, :, :rows, :columns], beyond, mode="replicate")[0]


def image_level(masks: BitMasks, scores: Tensor, config: ProposalConfig) -> Tensor:
    """Indices (int64) of the masks that pass the filters: not empty, below the top, narrower than the picture, not along its border, of a
    high score.

    The width of a mask is the width of its tight box. The released code counts the columns that the mask occupies instead.
    """
    height, width = masks.size
    boxes = masks.boxes()
    found = masks.area() > 0
    good = found & (boxes[:, 2] - boxes[:, 0] < config.max_width * width) & (scores >= config.min_score)
    for place in good.nonzero().flatten().tolist():  # one by one: only one dense mask is in memory
        dense = masks[place].to_dense()
        rows = dense.any(1).nonzero().flatten()
        good[place] = rows.double().mean() > config.centre * height
        if config.border > 0:
            good[place] &= ~_along_border(dense, config.border)
    if config.keep_best and not good.any():
        return found.nonzero().flatten()[:1]  # masks are sorted by decreasing score
    return good.nonzero().flatten()


def _along_border(dense: Tensor, border: float) -> Tensor:
    """Whether a mask (H, W) touches the border of the picture and has more than half of its pixels in the band along it. A pixel is in
    the band if its centre is nearer to the border than `border` times the shorter side."""
    height, width = dense.shape
    depth = max(0, math.ceil(border * min(height, width) - 0.5))  # rows, and columns, of the band
    inside = dense[depth : max(depth, height - depth), depth : max(depth, width - depth)].sum()
    touches = dense[0].any() | dense[-1].any() | dense[:, 0].any() | dense[:, -1].any()
    return touches & (2 * inside < dense.sum())


def seed_vectors(features: Tensor, valid: Tensor, seeds: Tensor, config: ProposalConfig) -> Tensor:
    """Feature vectors (L, D) of the seeds at these addresses (L, 3) in a map (D, H, W); `valid` (H, W) marks its valid
    cells."""
    if config.seeds == "pyramid":
        points = (seeds[:, [2, 1]] + 0.5) * 2.0 ** seeds[:, :1]
        return pooled_at(features[None], points[None], seeds[None, :, 0])[0]
    points = seeds[:, [2, 1]] + 0.5
    height, width = config.seeds
    scale = features.new_tensor([features.shape[2] / width, features.shape[1] / height])
    extent = torch.tensor([features.shape[1:]], device=features.device)
    return windows_at(features[None], points[None] * scale, config.seeds, extent, valid[None])[0]
