"""resize_masks and BitMasks.resize in plain PyTorch. It defines the bits exactly, and the sums up to rounding."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import areas, pack, unpack
from sprompt.ops.resize_masks.op import extent

Via = tuple[int | None, int | None]


class Taps(NamedTuple):
    """The cells that every output coordinate of one axis is a sum of, in the order of the sum, and their weights, each (taps,
    size)."""

    cells: Tensor
    weights: Tensor


def places(x: Tensor, step: float, cells: int) -> tuple[Tensor, Tensor]:
    """The lower cell of every coordinate x, and the weight of the next cell, in float64."""
    place = ((x + 0.5) * step - 0.5).clamp(0, cells - 1)
    floor = place.floor()
    return floor.long(), place - floor


def taps(size: int, cells: int, extent: float, dtype: torch.dtype, device: torch.device) -> Taps:
    """Coordinates in float64, weights rounded to dtype. A cell of weight 0 is replaced by its neighbour, which has weight 1."""
    low, fraction = places(torch.arange(size, dtype=torch.float64, device=device), extent / size, cells)
    w1 = fraction.to(dtype)
    w0 = 1 - w1
    first, second = torch.where(w0 > 0, low, low + 1), torch.where(w1 > 0, low + 1, low)
    return Taps(torch.stack((first, second)), torch.stack((w0, w1)))


def taps_via(size: int, via: int, cells: int, extent: float, dtype: torch.dtype, device: torch.device) -> Taps:
    """Of two maps in a row, from `cells` cells to `via` cells, of which the first `extent` become `size` pixels.

    A pixel has two via cells, and each of these has two cells: up to four cells, with products of weights in float64. A cell
    that comes twice counts at its first place, with the sum of both weights. The weights are then rounded to dtype. A cell of
    weight 0 is replaced by the first cell, which always has weight."""
    low, fraction = places(torch.arange(size, dtype=torch.float64, device=device), extent / size, int(extent))
    found, weights = [], []
    for via_cell, outer in ((low, 1 - fraction), (low + 1, fraction)):
        cell, inner = places(via_cell.double(), cells / via, cells)
        found += [cell, cell + 1]
        weights += [outer * (1 - inner), outer * inner]
    for later in (2, 3):
        for earlier in (0, 1):
            same = found[later] == found[earlier]
            weights[earlier] = weights[earlier] + weights[later] * same
            weights[later] = weights[later] * ~same
    weight = torch.stack(weights)
    return Taps(torch.where(weight > 0, torch.stack(found), found[0]), weight.to(dtype))


def axis(size: int, cells: int, extent: float, via: int | None, like: Tensor) -> Taps:
    if via is None:
        return taps(size, cells, extent, like.dtype, like.device)
    return taps_via(size, via, cells, extent, like.dtype, like.device)


def interpolate(soft: Tensor, height: int, width: int, extent: tuple[float, float], via: Via = (None, None)) -> Tensor:
    """(M, height, width) <- (M, h, w): along rows first, then along columns."""
    x = axis(width, soft.shape[2], extent[1], via[1], soft)
    y = axis(height, soft.shape[1], extent[0], via[0], soft)
    wide = soft[:, :, x.cells[0]] * x.weights[0]
    for cells, weights in zip(x.cells[1:], x.weights[1:], strict=True):
        wide = wide + soft[:, :, cells] * weights
    pixels = wide[:, y.cells[0]] * y.weights[0][:, None]
    for cells, weights in zip(y.cells[1:], y.weights[1:], strict=True):
        pixels = pixels + wide[:, cells] * weights[:, None]
    return pixels


def resized(
    soft: Tensor, height: int, width: int, threshold: float, extent: tuple[float, float], via: Via = (None, None)
) -> tuple[Tensor, Tensor]:
    """words (..., n) and sums float64 (...) of the set pixels' probabilities <- soft (..., h, w). Takes some masks at a time.

    The first `extent` cells per axis become the image: of the map, or of `via`, to which the map is resized first."""
    *batch, h, w = soft.shape
    n = words_for(height * width)
    words = soft.new_empty((torch.Size(batch).numel(), n), dtype=torch.int32)
    sums = soft.new_zeros(len(words), dtype=torch.float64)
    if words.numel() == 0:
        return words.reshape(*batch, n), sums.reshape(batch)
    dtype = torch.float64 if soft.dtype == torch.float64 else torch.float32
    level = torch.tensor(threshold, dtype=dtype).item()
    largest = 2.0**1023 if dtype == torch.float64 else 2.0**127
    cells = soft.reshape(-1, h, w)
    step = 1 + (1 << 22) // (height * width)
    for i in range(0, len(words), step):
        held = cells[i : i + step].to(dtype).clamp(-largest, largest)
        pixels = interpolate(held, height, width, extent, via)
        words[i : i + step] = pack(pixels, threshold)
        sums[i : i + step] = torch.where(pixels > level, pixels.sigmoid(), 0).flatten(1).sum(1, dtype=torch.float64)
    return words.reshape(*batch, n), sums.reshape(batch)


def resize_masks(a: Args) -> Tensor:
    """Float64 maps are computed in float64, all other maps in float32."""
    return resized(a.soft, a.height, a.width, a.threshold, extent(a))[0]


def resize_masks_general(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    via = a.via_height, a.via_width
    words, sums = resized(a.soft, a.height, a.width, a.threshold, extent(a, via), via)
    if a.sums:
        return words, sums.float(), areas(words)
    return words, words.new_empty((0,), dtype=torch.float32), words.new_empty((0,), dtype=torch.int64)


def resize_bits(a: Args) -> Tensor:
    """Resizes cells of 0 and 1. Takes some masks at a time."""
    return _some_at_a_time(a, lambda cells: resized(cells.float(), a.height, a.width, a.threshold, (a.h, a.w))[0])


def windows(size: int, cells: int, nearest: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first cell under every pixel of one axis, and the cell behind the last. `nearest`: one cell, in float32."""
    x = torch.arange(size, device=device)
    if not nearest:
        return x * cells // size, ((x + 1) * cells + size - 1) // size
    scale = torch.tensor(cells, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    first = (x.float() * scale.item()).floor().long().clamp(max=cells - 1)
    return first, first + 1


def cover_bits(a: Args) -> Tensor:
    """Sets a pixel where a cell under it is set. Takes some masks at a time."""

    def covered(cells: Tensor) -> Tensor:
        top, bottom = windows(a.height, a.h, a.nearest, cells.device)
        left, right = windows(a.width, a.w, a.nearest, cells.device)
        # Number of set cells above and left of every corner.
        before = torch.nn.functional.pad(cells.int(), (1, 0, 1, 0)).cumsum(1).cumsum(2)
        rows = before[:, bottom] - before[:, top]
        return pack(rows[:, :, right] - rows[:, :, left] > 0, 0.5)

    return _some_at_a_time(a, covered)


def _some_at_a_time(a: Args, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Resizes a.words of a.h x a.w cells to a.height x a.width pixels by words (m, n) <- cells bool (m, h, w)."""
    batch = a.words.shape[:-1]
    n = words_for(a.height * a.width)
    out = a.words.new_empty((batch.numel(), n), dtype=torch.int32)
    if out.numel() == 0:
        return out.reshape(*batch, n)
    flat = a.words.reshape(-1, a.words.shape[-1])
    step = 1 + (1 << 22) // (a.height * a.width + a.h * a.w)
    for i in range(0, len(flat), step):
        out[i : i + step] = resize(unpack(flat[i : i + step], a.h * a.w).unflatten(-1, (a.h, a.w)))
    return out.reshape(*batch, n)
