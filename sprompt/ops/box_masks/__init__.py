"""Masks in boxes: crops of masks to a square, and soft squares pasted into pictures."""

import torch
from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.ops import checks
from sprompt.ops.box_masks import op
from sprompt.ops.masks import as_bits
from sprompt.ops.resize_masks import checked_size


def crop_masks(masks: BitMasks | Tensor, boxes: Tensor, index: Tensor, size: int) -> Tensor:
    """The share of set pixels in each of size × size equal parts of a box (RoIAlign of the bits, with all samples).

    On each axis a box from x1 to x2 has size · g samples, g = ⌈(x2 − x1) / size⌉. Sample j lies at
    x1 − ½ + (j + ½)·(x2 − x1)/(size · g), where pixel k has its centre at k. A sample that lies below −1 or beyond the number of
    pixels is 0. Other samples are moved to the nearest pixel centre of the mask if they lie beyond all of them, and then
    interpolate the bits bilinearly. Part p of an axis has the samples from p · g to (p + 1)·g. out[b, n, i, j] is the mean of the
    g · g' samples of part i of the rows and part j of the columns.

    Args:
        masks: BitMasks (B, G), or dense (B, G, H, W), packed by `pack_masks`.
        boxes: (B, N, 4) float, any strides: x1, y1, x2, y2 in pixels of the masks.
        index: (B, N) int64: the mask of each box, or −1 for none. On a CPU any other number outside of [0, G) raises ValueError.
            On a GPU it counts as −1.
        size: number of parts on each axis, from 1 to 2¹⁵.

    Returns: (B, N, size, size) float32. Zeros where index is −1, where a side of the box is not > 0, and where a coordinate is NaN
    or lies beyond ±2²⁴. A box may leave the picture: its samples outside are 0. They cost no time, so a caller clips boxes only if
    the mean is to be over the inside. B, N, G, H or W of 0 are allowed.
    Positions are in float64. A sample gives its upper pixel the fraction of its position as a weight, and its lower pixel the
    rest. Weights are whole numbers of the smallest power of 2 that is at least g·2⁻²⁶. So sums of products of the weights of rows
    and columns are exact, and every backend gives the same bits. A sum is divided in float64, and rounded once to float32. The
    result differs from real arithmetic by at most (g + g')·2⁻²⁶ + 2⁻²⁵, besides the rounding of positions. This
    rounding decides about samples at −1 and at the number of pixels, which only boxes that leave the picture have.
    Not differentiable. Autocast changes nothing.

    >>> masks = torch.tensor([[[[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]]])
    >>> crop_masks(masks, torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), torch.tensor([[0]]), 2).tolist()
    [[[[0.25, 0.5], [0.5, 1.0]]]]
    """
    name = "crop_masks"
    bits = as_bits(name, "masks", masks)
    if len(bits.shape) != 2:
        checks.bad_value(name, "masks", "have batch dimensions (B, G)", tuple(bits.shape), "give one list per image")
    checks.tensor(name, "boxes", boxes, checks.FLOATS)
    checks.shape(name, "boxes", boxes, "(B, N, 4)", (bits.shape[0], None, 4), "one image: index it with [None]")
    checks.tensor(name, "index", index, (torch.int64,), "say which mask each box belongs to, or -1")
    checks.shape(name, "index", index, "(B, N)", (bits.shape[0], boxes.shape[1]), "give one mask per box")
    checks.whole(name, "size", size, f"be a whole number from 1 to {op.MOST_PARTS}", 1, op.MOST_PARTS)
    checks.same_device(name, masks=bits.words, boxes=boxes, index=index)
    return op.crop_masks(bits.words, boxes, index, *bits.size, size)


def paste_masks(soft: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> BitMasks:
    """Stretches each soft square over its box in a picture, and thresholds it, without storing the float picture.

    Pixel (y, x) is set where the map, interpolated bilinearly at row (y + ½ − y1)·(s / (y2 − y1)) − ½ and column
    (x + ½ − x1)·(s / (x2 − x1)) − ½, is > threshold. Cells outside of the map are 0. So the values fade within half a cell
    around the box, and are 0 beyond. This is `grid_sample(soft, grid, padding_mode="zeros", align_corners=False) > threshold`
    over the whole picture, except for values within rounding of the threshold.

    Args:
        soft: (N, s, s) float, any strides: probabilities.
        boxes: (N, 4) float, any strides: x1, y1, x2, y2 in pixels of the picture. They may leave it.
        size: (H, W), whole numbers, at most 2³¹ − 1 pixels.
        threshold: at least 0, compared strictly.

    Returns: BitMasks of shape (N,) and size (H, W). A mask is empty where a side of its box is NaN, infinite or not > 0. No masks,
    H = 0 or W = 0 give masks without words. An empty map (s = 0) can only become an empty picture.
    A pixel that gives weight to a NaN cell is not set. ±inf counts as ±2¹²⁷. Only pixels within reach of the box are computed.
    The bits are exact on every backend: coordinates are in float64, weights are rounded to float32, and float32 arithmetic runs
    along rows, then along columns. Float64 maps are computed in float64, by the reference.
    Not differentiable. Autocast changes nothing.

    >>> soft = torch.tensor([[[0.9, 0.2], [0.9, 0.9]]])
    >>> paste_masks(soft, torch.tensor([[1.0, 0.0, 5.0, 4.0]]), (4, 6)).to_dense().int().tolist()
    [[[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]]
    """
    name = "paste_masks"
    checks.tensor(name, "soft", soft, checks.FLOATS)
    checks.shape(name, "soft", soft, "(N, s, s)", (None,) * 3, "one mask: index it with [None]")
    checks.shape(name, "soft", soft, "(N, s, s)", (soft.shape[0], soft.shape[1], soft.shape[1]))
    checks.tensor(name, "boxes", boxes, checks.FLOATS)
    checks.shape(name, "boxes", boxes, "(N, 4)", (soft.shape[0], 4), "give one box per mask")
    height, width = checked_size(name, size, (soft.shape[1], soft.shape[2]))
    checks.number(name, "threshold", threshold, "be a number, at least 0", 0)
    checks.same_device(name, soft=soft, boxes=boxes)
    return BitMasks(op.paste_masks(soft, boxes, height, width, float(threshold)), (height, width))
