"""crop_masks and paste_masks in plain PyTorch. They define the bits exactly."""

import torch
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import pack, unpack

#: The whole weight of the samples of a part, at most. Products of the weights of rows and columns sum up to 2^52 at most.
MOST_WEIGHT = 2**26
#: A coordinate of a crop's box, at most.
FARTHEST = 2.0**24
#: Samples of a part that can give weight to a pixel, at most: they are more than 1/2 apart if they are several, and they reach
#: it from one pixel below to one pixel above. One more on either side allows for rounding.
NEAR = 7


def crop_weights(low: Tensor, high: Tensor, pixels: int, size: int) -> tuple[Tensor, Tensor]:
    """The weight of every pixel of an axis in every part of boxes from `low` to `high` (M,), and the weight of all samples of a
    part: whole numbers as float64, (M, size, pixels) and (M, 1, 1). Zeros for boxes that are not cropped."""
    usable = (low < high) & (low.abs() <= FARTHEST) & (high.abs() <= FARTHEST)
    low, high = (torch.where(usable, x, y)[:, None, None] for x, y in ((low, 0.0), (high, 1.0)))
    extent = high - low
    g = (extent / size).ceil().clamp(min=1)
    step = extent / (size * g)
    mantissa, exponent = torch.frexp(g)
    unit = MOST_WEIGHT / 2.0 ** (exponent - (mantissa == 0.5).int())
    start = low - 0.5
    part = torch.arange(size, dtype=torch.float64, device=low.device)[:, None]
    pixel = torch.arange(pixels, dtype=torch.float64, device=low.device)
    # The first sample that may reach the pixel. A step of 0 gives NaN, and then all samples lie in the same place.
    first = ((pixel - 1 - start) / step - 0.5).floor().nan_to_num(nan=0.0) - 1
    first = first.clamp(min=part * g).clamp(max=size * g)
    total = torch.zeros_like(first)
    for k in range(NEAR):
        sample = first + k
        place = start + (sample + 0.5) * step
        inside = (sample < (part + 1) * g) & (place >= -1) & (place <= pixels)
        place = place.clamp(0, max(pixels - 1, 0))
        lower = place.floor()
        upper_weight = ((place - lower) * unit + 0.5).floor()
        total += torch.where(inside & (lower == pixel), unit - upper_weight, 0)
        total += torch.where(inside & (lower + 1 == pixel), upper_weight, 0)
    return total * usable[:, None, None], g * unit


def crop_masks(a: Args) -> Tensor:
    """Takes some boxes at a time."""
    (B, G), N, size = a.words.shape[:2], a.index.shape[1], a.size
    out = torch.zeros(B * N, size, size, dtype=torch.float32, device=a.words.device)
    words = a.words.flatten(0, 1)
    image = torch.arange(B, device=a.words.device)[:, None]
    of = torch.where((a.index >= 0) & (a.index < G), a.index + image * G, -1).flatten()
    boxes = a.boxes.flatten(0, 1).double()
    step = 1 + (1 << 21) // (1 + size * (a.height + a.width) + a.height * a.width)
    for i in range(0, B * N if len(words) else 0, step):
        x1, y1, x2, y2 = boxes[i : i + step].unbind(1)
        rows, down = crop_weights(y1, y2, a.height, size)
        columns, across = crop_weights(x1, x2, a.width, size)
        mask = of[i : i + step]
        bits = unpack(words[mask.clamp(min=0)], a.height * a.width).unflatten(-1, (a.height, a.width)).double()
        shares = rows @ bits @ columns.mT / (down * across)
        out[i : i + step] = torch.where((mask >= 0)[:, None, None], shares, 0).float()
    return out.reshape(B, N, size, size)


def paste_taps(low: Tensor, high: Tensor, pixels: int, cells: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The two cells under every pixel of an axis and their weights, for boxes from `low` to `high` (N,): lower, upper int64, and
    weights of lower, upper, each (N, pixels). Cells outside of the map have weight 0, and a cell of weight 0 is replaced by the
    other cell."""
    extent = (high - low)[:, None]
    usable = (extent > 0) & extent.isfinite()
    pixel = torch.arange(pixels, dtype=torch.float64, device=low.device)
    place = ((pixel + 0.5) - low[:, None]) * (cells / extent) - 0.5
    place = torch.where(usable & (place > -1) & (place < cells), place, -1)
    floor = place.floor()
    w1 = (place - floor).to(dtype)
    w0 = 1 - w1
    first, second = floor.long(), floor.long() + 1
    w0, w1 = torch.where(first >= 0, w0, 0), torch.where(second < cells, w1, 0)
    first, second = torch.where(w0 > 0, first, second), torch.where(w1 > 0, second, first)
    return first.clamp(0, max(cells - 1, 0)), second.clamp(0, max(cells - 1, 0)), w0, w1


def paste_masks(a: Args) -> Tensor:
    """Takes some masks at a time. Float64 maps are computed in float64, all other maps in float32."""
    masks, s = a.soft.shape[:2]
    words = a.soft.new_empty((masks, words_for(a.height * a.width)), dtype=torch.int32)
    if words.numel() == 0:
        return words
    dtype = torch.float64 if a.soft.dtype == torch.float64 else torch.float32
    largest = 2.0**1023 if dtype == torch.float64 else 2.0**127
    boxes = a.boxes.double()
    step = 1 + (1 << 21) // (a.height * a.width)
    for i in range(0, masks, step):
        cells = a.soft[i : i + step].to(dtype).clamp(-largest, largest)
        x1, y1, x2, y2 = boxes[i : i + step].unbind(1)
        left, right, w_left, w_right = paste_taps(x1, x2, a.width, s, dtype)
        above, below, w_above, w_below = paste_taps(y1, y2, a.height, s, dtype)
        mask = torch.arange(len(cells), device=cells.device)[:, None, None]
        row = torch.arange(s, device=cells.device)[:, None]
        wide = cells[mask, row, left[:, None]] * w_left[:, None] + cells[mask, row, right[:, None]] * w_right[:, None]
        column = torch.arange(a.width, device=cells.device)
        pixels = wide[mask, above[:, :, None], column] * w_above[:, :, None]
        pixels = pixels + wide[mask, below[:, :, None], column] * w_below[:, :, None]
        words[i : i + step] = pack(pixels, a.threshold)
    return words
