"""Saliency proposals: maps of seed vectors over feature maps, thresholded to masks, with mask NMS."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.mask_nms.op import batched_mask_nms, matrix_nms
from sprompt.ops.masks.op import mask_boxes
from sprompt.ops.saliency_masks import op
from sprompt.ops.saliency_masks.reference import addresses_of, grids

SIMILARITIES = ("cosine", "dot")
NMS = ("matrix", "matrix_linear", "greedy")


class SaliencyMasks(NamedTuple):
    """Proposals by decreasing score. The first counts[b] of an image's K entries are real, the others are empty (seeds -1)."""

    masks: BitMasks  # (B, K)
    scores: Tensor  # (B, K) float32 (float64 features: float64)
    soft: Tensor | None  # (B, K, H, W), the features' dtype
    seeds: Tensor  # (B, K, 3) int64: scale, row, column
    boxes: Tensor  # (B, K, 4) int64: x1, y1, x2, y2, exclusive ends
    counts: Tensor  # (B,) int64


def saliency_masks(
    features: Tensor,
    *,
    seeds: str | tuple[int, int] = "pyramid",
    similarity: str = "cosine",
    threshold: float = 0.5,
    min_area: int = 2,
    nms: str = "matrix",
    iou_threshold: float = 0.5,
    sigma: float = 2.0,
    max_masks: int = 20,
    valid: Tensor | None = None,
    return_soft: bool = False,
) -> SaliencyMasks:
    """Mask proposals of every image, best first. A proposal is the set of cells most similar to a seed.

    For a seed vector s and the cells x: y = ⟨s, x⟩ / (|s| |x|) ("cosine", norms are at least 1e-12) or ⟨s, x⟩ ("dot"); ỹ = (y -
    min y) / (max y - min y) over the valid cells; mask = [ỹ ≥ threshold]; score = mean of ỹ over the mask. Maps with a range
    below 1e-6, with NaN or infinity, or with fewer than min_area cells are dropped. Then either `matrix_nms` decays the scores,
    or greedy NMS removes masks. The best max_masks are returned.

    Seeds: "pyramid" takes every cell (scale 0), the 2×2 means (scale 1) and the means of the central 2×2 cells of 4×4 blocks
    (scale 2), like a bilinear resize to ½ and ¼. Blocks that the map's border cuts off are left out. (h, w) takes the means
    over the windows of `torch.nn.functional.adaptive_avg_pool2d` (scale 0).

    Args:
        features: (B, D, H, W) float, any strides (contiguous cells are read without a copy).
        seeds: "pyramid" or a grid (h, w).
        similarity: "cosine" or "dot".
        threshold: in (0, 1]; compared with ≥.
        min_area: at least 1 cell.
        nms: "matrix" (gaussian decay), "matrix_linear" or "greedy".
        iou_threshold: for greedy NMS; the comparison is strict.
        sigma: for gaussian matrix NMS, at least 0.
        max_masks: K, at least 1.
        valid: (B, H, W) bool, False for padding; None means all valid. Other cells are neither seeds nor pixels, with any
            values. The whole block of a pyramid seed (1, 2×2, 4×4) must be valid, so that a map padded on the right and
            below gives the same result as the map itself. A grid seed is the mean of the valid cells of its window, and
            needs at least one.
        return_soft: whether to return ỹ of the K proposals as well (0 at cells that are not valid and in padding). At valid
            cells soft ≥ threshold equals the mask, to the bit on the native backend with float32 features.

    Returns: SaliencyMasks (masks, scores, soft, seeds, boxes, counts), each image by decreasing score. Equal scores keep the
    order of the scores before NMS, then the order of the seeds (scale, row, column). NaN or infinity in a valid cell makes
    every map invalid, so the image has no proposals. B, D, H or W of 0 give counts of 0.

    Not differentiable: features are detached. Sums are in float32 (float64 for float64 features, on the reference). So backends
    may differ in a cell whose ỹ is within rounding of the threshold. On one backend, results are the same on every run and for
    every number of threads. Autocast changes nothing. No synchronisation. Masks are never stored as floats.

    >>> features = torch.zeros(1, 2, 4, 8)
    >>> features[:, 0, :, :4] = features[:, 1, :, 4:] = 1
    >>> found = saliency_masks(features, nms="greedy")
    >>> found.counts.tolist(), found.scores[0, :3].tolist(), found.boxes[0, :2].tolist()
    ([2], [1.0, 1.0, 0.0], [[0, 0, 4, 4], [4, 0, 8, 4]])
    """
    name = "saliency_masks"
    _check_features(name, features)
    grid_height, grid_width = _checked_grid(name, seeds)
    checks.choice(name, "similarity", similarity, SIMILARITIES)
    checks.number(name, "threshold", threshold, "lie in (0, 1]", 0, 1)
    if threshold == 0:
        checks.bad_value(name, "threshold", "lie in (0, 1]", threshold)
    checks.whole(name, "min_area", min_area, "be a whole number of at least 1", 1)
    checks.choice(name, "nms", nms, NMS)
    checks.number(name, "iou_threshold", iou_threshold, "lie between 0 and 1", 0, 1)
    checks.number(name, "sigma", sigma, "be a finite number of at least 0", 0, 3.4e38)
    checks.whole(name, "max_masks", max_masks, "be a whole number of at least 1", 1)
    _check_valid(name, valid, features)
    if not isinstance(return_soft, bool):
        checks.bad_type(name, "return_soft", "be True or False", repr(return_soft))

    features = features.detach()
    cosine = similarity == "cosine"
    words, areas, scores = op.saliency_bits(
        features, valid, grid_height, grid_width, cosine, float(threshold), min_area
    )
    size = (features.shape[2], features.shape[3])
    index, best, counts = _best(words, areas, scores, nms, float(iou_threshold), float(sigma), max_masks)
    real = torch.arange(max_masks, device=features.device) < counts[:, None]
    masks = _gathered(words, index, real)
    addresses = torch.where(real[..., None], addresses_of(index, grids(*size, grid_height, grid_width)), -1)
    soft = None
    if return_soft:
        soft = op.saliency_soft(features, valid, grid_height, grid_width, cosine, addresses)
    boxes = mask_boxes(masks, *size)
    return SaliencyMasks(BitMasks(masks, size), torch.where(real, best, 0), soft, addresses, boxes, counts)


def _best(
    words: Tensor, areas: Tensor, scores: Tensor, nms: str, iou_threshold: float, sigma: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places (B, most) of the best masks after NMS, their scores, and the number of real masks. Dropped maps are empty masks of
    score 0. They overlap with no other mask and come last."""
    missing = max(most - words.shape[1], 0)
    if nms == "greedy":
        keep, counts = batched_mask_nms(words, scores, iou_threshold, None, most)
        index = keep.clamp(min=0)
        if words.shape[1] == 0:
            return index, scores.new_zeros(index.shape), counts
        return index, scores.gather(1, index), counts
    kernel = "linear" if nms == "matrix_linear" else "gaussian"
    decayed = matrix_nms(words, scores, kernel, sigma, None, None)
    key = torch.where(areas > 0, decayed, -1)
    # Two stable sorts: equal decayed scores keep the order of the scores before the decay.
    order = scores.argsort(dim=1, descending=True, stable=True)
    best = key.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = torch.nn.functional.pad(order.gather(1, best.indices[:, :most]), (0, missing))
    values = torch.nn.functional.pad(best.values[:, :most], (0, missing))
    return index, values, (areas > 0).sum(1).clamp(max=most)


def _gathered(words: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Words (B, K, n) of the masks at index (B, K), empty where not real."""
    if words.shape[1] == 0:
        return words.new_zeros((*index.shape, words.shape[2]))
    chosen = words.gather(1, index[..., None].expand(*index.shape, words.shape[2]))
    return torch.where(real[..., None], chosen, 0)


def saliency_maps(
    features: Tensor, seeds: Tensor, *, similarity: str = "cosine", valid: Tensor | None = None
) -> Tensor:
    """Normalised maps of arbitrary seed vectors over the features of their image.

    y = ⟨s, x⟩ / (|s| |x|) ("cosine") or ⟨s, x⟩ ("dot", the 1×1 convolution); ỹ = (y - min y) / (max y - min y) over the valid
    cells. `saliency_masks` thresholds these maps; here the caller gives the seeds.

    Args:
        features: (B, D, H, W) float.
        seeds: (B, M, D) float. Mixed dtypes are promoted to the wider dtype.
        similarity: "cosine" or "dot".
        valid: (B, H, W) bool. Cells where it is False have no influence and are 0 in the result. None means all valid.

    Returns: (B, M, H, W) in [0, 1], in the inputs' dtype. A map is zeros if it is flat (range below 1e-6) or has NaN or
    infinity. Sums are in float32. Any size may be 0.
    Not differentiable: features and seeds are detached. Deterministic for every number of threads. Autocast changes nothing.

    >>> features = torch.tensor([[[[1.0, 0.0, 0.6]], [[0.0, 1.0, 0.8]]]])
    >>> saliency_maps(features, torch.tensor([[[2.0, 0.0]]])).squeeze().tolist()
    [1.0, 0.0, 0.6000000238418579]
    """
    name = "saliency_maps"
    _check_features(name, features)
    checks.tensor(name, "seeds", seeds, checks.FLOATS)
    checks.shape(
        name,
        "seeds",
        seeds,
        "(B, M, D)",
        (features.shape[0], None, features.shape[1]),
        "give vectors of the features' length",
    )
    checks.choice(name, "similarity", similarity, SIMILARITIES)
    _check_valid(name, valid, features)
    checks.same_device(name, features=features, seeds=seeds)
    dtype = torch.promote_types(features.dtype, seeds.dtype)
    return op.saliency_maps(features.to(dtype), seeds.to(dtype), valid, similarity == "cosine")


def _check_features(op: str, features: Any) -> None:
    checks.tensor(op, "features", features, checks.FLOATS)
    checks.shape(op, "features", features, "(B, D, H, W)", (None,) * 4, "add a batch dimension with [None]")


def _check_valid(op: str, valid: Any, features: Tensor) -> None:
    if valid is None:
        return
    checks.tensor(op, "valid", valid, (torch.bool,), "True marks cells that are not padding")
    checks.shape(op, "valid", valid, "(B, H, W)", (features.shape[0], *features.shape[2:]))
    checks.same_device(op, features=features, valid=valid)


def _checked_grid(op: str, seeds: Any) -> tuple[int, int]:
    """The grid of seeds. (0, 0) means the pyramid."""
    if isinstance(seeds, str):
        checks.choice(op, "seeds", seeds, ("pyramid",))
        return 0, 0
    if not isinstance(seeds, (tuple, list)) or len(seeds) != 2:
        checks.bad_type(op, "seeds", 'be "pyramid" or a grid (h, w)', repr(seeds))
    for side in seeds:
        checks.whole(op, "seeds", side, "be two whole numbers of at least 1", 1)
    return seeds[0], seeds[1]
