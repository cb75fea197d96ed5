"""From the last stage to the masks of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import Size
from sprompt.models.protocol import Prediction
from sprompt.models.queryinst.heads import MASK_CELLS, MaskHead
from sprompt.nn.conv import full_precision
from sprompt.ops import paste_masks, roi_align

if TYPE_CHECKING:
    from sprompt.models.queryinst.model import Outputs

_TOGETHER = 32  # boxes that the mask head computes together: the maps of more do not stay in a cache
_STRIDE = 8  # of `mask_logits`
_OUTSIDE = 1e-6  # the probability of a pixel outside of a query's box, in `mask_logits`


def predictions(
    outputs: Outputs, head: MaskHead, sizes: Sequence[Size], original_sizes: Sequence[Size], threshold: float,
    max_per_image: int,
) -> list[Prediction]:  # fmt: skip
    """The best max_per_image pairs of a query and a class of every image, with the mask at the picture's own size.

    Scores are the class probabilities; pairs of equal score keep the order of query, then class. The mask head runs once for each query
    of a pair, and makes the masks of its pairs only. Images are computed one after the other, so the peak of memory is that of one image.

    Args:
        head: the mask head of the last stage.
        sizes: the size of every image before padding. original_sizes: the size of every picture.
    """
    last, batch = outputs.stages[-1], len(outputs.scale)
    if not len(sizes) == len(original_sizes) == batch:
        raise ValueError(
            f"QueryInst.predictions: sizes and original_sizes must have one entry an image, {batch}, got {len(sizes)} and "
            f"{len(original_sizes)}"
        )
    number = last.classes.shape[2]
    scores, order = full_precision(last.classes).sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
    results = []
    for image, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        best = order[image, :max_per_image]
        labels = best % number
        queries, place = torch.unique(best // number, return_inverse=True)  # a query can appear with several classes
        soft = _soft(outputs, head, image, queries, place, labels)
        across, down = original[1] / size[1], original[0] / size[0]
        boxes = last.boxes[image, queries[place]] * last.boxes.new_tensor([across, down, across, down])
        masks = paste_masks(soft, boxes, original, threshold)
        results.append(Prediction(masks, scores[image, :max_per_image].float(), labels))
    return results


def mask_logits(outputs: Outputs, head: MaskHead) -> Tensor:
    """(B, N, h, w) of stride 8: the mask of each query's likeliest class, in its box."""
    boxes, classes = outputs.stages[-1].boxes, outputs.stages[-1].classes.argmax(-1)
    queries = torch.arange(boxes.shape[1], device=boxes.device)
    soft = [_soft(outputs, head, image, queries, queries, classes[image]) for image in range(len(boxes))]
    axes = []
    for axis, cells in ((0, outputs.maps[1].shape[3]), (1, outputs.maps[1].shape[2])):
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        place = (torch.arange(cells, device=boxes.device) + 0.5) * _STRIDE
        axes.append((2 * (place - low) / (high - low).clamp(min=1e-6) - 1).flatten(0, 1))
    across, down = axes
    shape = (len(across), down.shape[1], across.shape[1])
    grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)
    pasted = F.grid_sample(torch.cat(soft)[:, None].to(grid.dtype), grid, mode="bilinear", align_corners=False)
    return pasted[:, 0].logit(_OUTSIDE).unflatten(0, boxes.shape[:2])


def _soft(outputs: Outputs, head: MaskHead, image: int, queries: Tensor, place: Tensor, classes: Tensor) -> Tensor:
    """Probabilities (P, 28, 28) of pairs of a query, queries[place], and a class, of one image."""
    last, maps = outputs.stages[-1], [each[image : image + 1] for each in outputs.maps]
    repeats = torch.bincount(place, minlength=len(queries))
    order = place.argsort(stable=True)
    rank = torch.empty_like(place)  # of a pair among those of its query
    rank[order] = torch.arange(len(place), device=place.device) - (repeats.cumsum(0) - repeats)[place[order]]
    wanted = classes.new_zeros(len(queries), int(repeats.max()) if len(queries) else 0)
    wanted[place, rank] = classes
    logits = [
        head(roi_align(maps, last.boxes[image : image + 1, some], MASK_CELLS)[0], last.attended[image, some], kinds)
        for some, kinds in zip(queries.split(_TOGETHER), wanted.split(_TOGETHER), strict=True)
    ]
    return full_precision(torch.cat(logits)[place, rank]).sigmoid()
