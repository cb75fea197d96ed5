"""Draws masks on pictures, and maps as heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from sprompt.masks import BitMasks

RGB = tuple[int, int, int]
Alpha = Callable[[float], float]  # distance from the outline in pixels, positive inside -> 0 to 1

#: Consecutive colours differ in hue and in lightness.
PALETTE: tuple[RGB, ...] = (
    (64, 156, 255), (255, 149, 0), (48, 209, 120), (255, 86, 120), (178, 120, 255), (255, 214, 10),
    (20, 200, 215), (240, 90, 220), (150, 210, 50), (255, 120, 60), (120, 130, 255), (0, 190, 150),
)  # fmt: skip
TRUE, FALSE, MISSED, IGNORED = (0, 200, 150), (255, 110, 40), (255, 95, 200), (160, 165, 175)

BADGES = 24  # masks of a picture with a text; more texts would hide it

_HEAT = ((10, 12, 34), (52, 24, 96), (120, 28, 109), (187, 55, 84), (237, 105, 37), (251, 180, 44), (252, 250, 190))
_INK: RGB = (12, 14, 18)
_SHORTEST, _LONGEST = 900, 1280  # bounds of the long side of a drawn picture, so that outlines are fine


@dataclass(frozen=True)
class Mark:
    """How one mask is drawn."""

    colour: RGB
    name: str = ""  # on a badge inside the mask
    style: str = "solid"  # "hatched" hatches the fill; "dashed" dashes the outline and makes the fill fainter
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels of the picture, exclusive ends
    seed: tuple[float, float] | None = None  # x, y in pixels of the picture


def colour(index: int) -> RGB:
    """The colour of an instance by its index in a list. The colours repeat after `PALETTE`."""
    return PALETTE[index % len(PALETTE)]


def hexadecimal(rgb: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def scaled(picture: Image.Image) -> Image.Image:
    """The picture, resized to the size of a drawn picture."""
    longest = max(picture.size)
    factor = min(max(longest, _SHORTEST), _LONGEST) / longest
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def overlay(picture: Image.Image, masks: BitMasks, marks: Sequence[Mark]) -> Image.Image:
    """The picture, `scaled`, with masks (G,) of its size drawn on it, one mark for each. Larger masks are drawn below smaller
    ones."""
    if (len(masks), masks.size) != (len(marks), (picture.height, picture.width)):
        size = f"{picture.height}x{picture.width}"
        raise ValueError(f"overlay: masks must be {len(marks)} of {size} pixels, got {masks}; one mark for each mask")
    drawn = scaled(picture)
    ratio = (drawn.width / picture.width, drawn.height / picture.height)
    boxes = masks.boxes().tolist()
    order = sorted(range(len(marks)), key=lambda i: -int(masks[i].area()))
    badges = []
    for i in order:
        if boxes[i][2] > boxes[i][0]:
            place = _draw_mask(drawn, masks[i].to_dense().numpy(), boxes[i], ratio, marks[i])
            badges.append((place, marks[i]))
    for mark in marks:
        if mark.box is not None:
            _draw_box(drawn, mark.box, ratio, mark)
    for mark in marks:
        if mark.seed is not None:
            _draw_seed(drawn, mark.seed, ratio, mark.colour, max(drawn.size) / (100 if len(marks) <= 24 else 220))
    for place, mark in badges:
        if mark.name:
            _draw_badge(drawn, place, mark)
    return drawn


def draw_picture(
    picture: Image.Image, masks: BitMasks, scores: Tensor, labels: Tensor, names: Sequence[str]
) -> Image.Image:
    """The picture, `scaled`, with the masks of a prediction: fill and outline, the name of the class and the score.

    The mask with the k-th best score has the k-th colour. The best `BADGES` masks have a name and a score, the others would hide
    them. Empty masks are not drawn.

    Args:
        masks: (N,) of the picture's size.
        scores: (N,), any order.
        labels: (N,) places in `names`.
        names: of the classes. With a single class, only scores are written.
    """
    if not len(masks) == len(scores) == len(labels):
        got = f"{len(masks)}, {len(scores)} and {len(labels)}"
        raise ValueError(
            f"draw_picture: masks, scores and labels must be of one number, got {got}; pass those of one prediction"
        )
    marks = [Mark(_INK)] * len(masks)
    values, classes = scores.tolist(), labels.tolist()
    for rank, i in enumerate(sorted(range(len(marks)), key=lambda i: -values[i])):
        if not 0 <= classes[i] < len(names):
            raise ValueError(f"draw_picture: labels must lie in [0, {len(names)}), the classes, got {classes[i]}")
        said = f"{names[classes[i]]} {values[i]:.2f}" if len(names) > 1 else f"{values[i]:.2f}"
        marks[i] = Mark(colour(rank), said if rank < BADGES else "")
    return overlay(picture, masks.to("cpu"), marks)


def heat_map(values: np.ndarray, low: float | None = None, high: float | None = None) -> Image.Image:
    """Values (H, W) as colours, from dark (`low`) to light (`high`). By default these are the least and largest finite
    value."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"heat_map: values must be (H, W) with at least one cell, got {values.shape}; take one map")
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if low is None and finite.size else low or 0.0
    high = float(finite.max()) if high is None and finite.size else high or 0.0
    share = np.zeros_like(values) if high <= low else (np.nan_to_num(values, nan=low) - low) / (high - low)
    table = np.array(_HEAT, np.float64)
    stops = np.linspace(0, 1, len(table))
    colours = np.stack([np.interp(share.clip(0, 1), stops, table[:, c]) for c in range(3)], -1)
    return Image.fromarray((colours + 0.5).astype(np.uint8))


# -- parts
@lru_cache(maxsize=64)
def _table(sigma: float, alpha: Alpha) -> list[int]:
    """The alpha, 0 to 255, of each of the 256 levels of a mask blurred by sigma.

    At distance d from a straight edge the level of the blurred mask is Φ(d / σ).
    """
    levels = (NormalDist().inv_cdf((level + 0.5) / 256) * sigma for level in range(256))
    return [round(255 * min(max(alpha(d), 0.0), 1.0)) for d in levels]


@lru_cache(maxsize=64)
def _alphas(width: float) -> tuple[Alpha, Alpha, Alpha]:
    """The alphas of the fill, of the outline and of the dark line around it. Edges fade over one pixel."""
    return (
        lambda d: d + 0.5,
        lambda d: width / 2 + 0.5 - abs(d),
        lambda d: 0.6 * (width / 2 + 1.5 - abs(d)),
    )


def _draw_mask(
    drawn: Image.Image, mask: np.ndarray, box: list[int], ratio: tuple[float, float], mark: Mark
) -> tuple[int, int]:
    """Draws a mask, in the window around it only. Returns the place of its badge."""
    width = max(drawn.size) / 380
    sigma = round(max(1.2, 0.6 * max(ratio)), 1)
    pad = math.ceil(3 * sigma + width)
    window = (
        max(0, math.floor(box[0] * ratio[0]) - pad), max(0, math.floor(box[1] * ratio[1]) - pad),
        min(drawn.width, math.ceil(box[2] * ratio[0]) + pad), min(drawn.height, math.ceil(box[3] * ratio[1]) + pad),
    )  # fmt: skip
    size = (window[2] - window[0], window[3] - window[1])
    source = tuple(edge / ratio[k % 2] for k, edge in enumerate(window))
    source = (source[0], source[1], min(source[2], mask.shape[1]), min(source[3], mask.shape[0]))
    level = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR, box=source)
    level = level.filter(ImageFilter.GaussianBlur(sigma))
    most = level.getextrema()[1]
    if isinstance(most, (int, float)) and most < 160:  # thinner than the blur: it must stay visible
        level = level.point([min(255, round(230 * v / max(most, 1))) for v in range(256)])
    fill, line, casing = (level.point(_table(sigma, alpha)) for alpha in _alphas(width))
    period = max(5, round(4 * width))
    if mark.style == "hatched":
        fill = ImageChops.multiply(fill, _pattern(size, window, period, checks=False).point([90, *[0] * 254, 255]))
    if mark.style == "dashed":
        checks = _pattern(size, window, period, checks=True)
        line, casing = ImageChops.multiply(line, checks), ImageChops.multiply(casing, checks)
    strength = {"solid": 0.42, "hatched": 0.62, "dashed": 0.3}[mark.style]
    drawn.paste(mark.colour, window, fill.point([round(strength * v) for v in range(256)]))
    drawn.paste(_INK, window, casing)
    drawn.paste(mark.colour, window, line)
    if min(size) - 2 * pad < 2.5 * _badge_height(drawn):  # a badge would hide a mask as small as this
        return window[2] - pad // 2, window[1] + pad // 2
    return _innermost(level, window)


def _pattern(size: tuple[int, int], window: tuple[int, ...], period: int, checks: bool) -> Image.Image:
    """Checks or diagonal stripes of 0 and 255. The pattern is fixed to the picture, not to the window."""
    x, y = np.arange(size[0])[None, :] + window[0], np.arange(size[1])[:, None] + window[1]
    field = x // period + y // period if checks else (x + y) // period
    return Image.fromarray((field % 2 * 255).astype(np.uint8))


def _innermost(level: Image.Image, window: tuple[int, ...]) -> tuple[int, int]:
    """A point well inside the mask, for its badge."""
    shrink = max(1.0, max(level.size) / 96)
    small = level.resize((max(1, round(level.width / shrink)), max(1, round(level.height / shrink))))
    reach = max(2, min(small.size) // 3)
    framed = ImageOps.expand(small, reach)  # the mask ends at the border of the picture
    blurred = np.asarray(framed.filter(ImageFilter.GaussianBlur(reach / 2)), np.float64)
    row, column = divmod(int(np.argmax(blurred * (np.asarray(framed) > 127))), framed.width)
    return round(window[0] + (column - reach + 0.5) * shrink), round(window[1] + (row - reach + 0.5) * shrink)


def _badge_height(drawn: Image.Image) -> int:
    return max(16, round(max(drawn.size) / 25))


def _draw_box(drawn: Image.Image, box: tuple[float, ...], ratio: tuple[float, float], mark: Mark) -> None:
    x1, y1, x2, y2 = (edge * ratio[k % 2] for k, edge in enumerate(box))
    width = max(2, round(max(drawn.size) / 380))
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
    draw = ImageDraw.Draw(drawn, "RGBA")
    if min(x2 - x1, y2 - y1) > 2:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(*_INK, 150), width=width + 2)
    draw.rectangle((x1, y1, x2, y2), outline=mark.colour, width=width)


def _draw_seed(
    drawn: Image.Image, seed: tuple[float, float], ratio: tuple[float, float], inner: RGB, radius: float
) -> None:
    x, y = seed[0] * ratio[0], seed[1] * ratio[1]
    draw = ImageDraw.Draw(drawn)
    for r, shade in ((radius * 1.2, _INK), (radius, (255, 255, 255)), (radius * 0.55, inner)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=shade)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _draw_badge(drawn: Image.Image, place: tuple[int, int], mark: Mark) -> None:
    height = _badge_height(drawn)
    font = _font(round(height * 0.72))
    draw = ImageDraw.Draw(drawn)
    left, top, right, bottom = draw.textbbox((0, 0), mark.name, font=font)
    width = max(height, right - left + round(0.6 * height))
    x = min(max(place[0] - width / 2, 1), drawn.width - width - 1)
    y = min(max(place[1] - height / 2, 1), drawn.height - height - 1)
    draw.rounded_rectangle((x, y, x + width, y + height), height * 0.3, fill=_INK, outline=mark.colour, width=2)
    spot = (x + (width - (right - left)) / 2 - left, y + (height - (bottom - top)) / 2 - top)
    draw.text(spot, mark.name, font=font, fill=(255, 255, 255))
