"""Synthetic scenes: textured shapes that occlude each other on textured ground, with exact masks.

The class of an object is its shape. Sizes and rotations have the same distribution for all classes. So have colours and
textures, unless `likeness` is above 0. `likeness` is the probability that an object has the colour and texture of its class, as
objects in photographs often have. All values come from uniform random numbers by additions, products and comparisons, so (seed,
index) gives the same picture on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor

from sprompt.atomic import atomic_write
from sprompt.data.errors import DataError
from sprompt.data.pictures import png, read_picture
from sprompt.data.reading import read_json
from sprompt.masks import BitMasks, Size

OBJECTS = (2, 6)  # least and most objects of a scene; a scene has fewer if no place is free for another
RADIUS = (0.10, 0.27)  # smallest and largest, as shares of the shorter side
VISIBLE = 0.55  # lower bound of the visible share of an object's shape
_PLACES = 12  # random places that are tried for each object

Field = np.ndarray  # float64 (h, w)


# -- shapes: whether points of the unit disc, u to the right and v down, lie inside
def _disc(u: Field, v: Field) -> np.ndarray:
    return u * u + v * v < 0.9


def _square(u: Field, v: Field) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) < 0.7


def _triangle(u: Field, v: Field) -> np.ndarray:
    return (v < 0.5) & (0.8660254 * abs(u) - 0.5 * v < 0.5)


def _star(u: Field, v: Field) -> np.ndarray:
    """Five tips: the points beyond at most one side of a regular pentagon."""
    sides = ((0.0, 1.0), (0.95105652, 0.30901699), (0.58778525, -0.80901699))
    beyond = (v > 0.32).astype(np.int8)
    for x, y in sides[1:]:
        beyond += (x * u + y * v > 0.32).astype(np.int8) + (-x * u + y * v > 0.32)
    return beyond <= 1


def _cross(u: Field, v: Field) -> np.ndarray:
    a, b = abs(u), abs(v)
    return (np.minimum(a, b) < 0.3) & (np.maximum(a, b) < 0.92)


def _ring(u: Field, v: Field) -> np.ndarray:
    square = u * u + v * v
    return (square < 0.95) & (square > 0.3)


SHAPES: dict[str, Callable[[Field, Field], np.ndarray]] = {
    "disc": _disc, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "ring": _ring,
}  # fmt: skip
CLASSES = list(SHAPES)
#: Colour of each class for `likeness`; the index of the class is also the kind of its texture.
COLOURS = ((0.85, 0.2, 0.2), (0.2, 0.7, 0.25), (0.25, 0.35, 0.9), (0.9, 0.8, 0.2), (0.75, 0.3, 0.8), (0.2, 0.75, 0.8))


class Scene(NamedTuple):
    image: Tensor  # (3, H, W) uint8
    masks: Tensor  # (G, H, W) bool, the visible part of each object; masks do not overlap
    labels: Tensor  # (G,) int64, indices of CLASSES


def scene(
    seed: int, index: int, size: Size = (160, 160), likeness: float = 0.0, classes: Sequence[str] = CLASSES
) -> Scene:
    """Picture number `index` of the series `seed`.

    Args:
        likeness: the probability that an object looks like its class.
        classes: the classes that objects may have.
    """
    height, width = size
    drawn = _numbers(classes)
    if min(size) < 32:
        raise ValueError(f"scene: size must be at least 32 on each side, got {size}; take a larger size")
    rng = Generator(PCG64(SeedSequence((seed, index))))
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    ground = rng.random(3) * 0.8 + 0.1
    other = np.clip(ground + (rng.random(3) - 0.5) * 0.5, 0, 1)
    picture = _painted(ground, other, _texture(rng, x, y, 0.09 * min(size)))  # (H, W, 3) of 0 to 1
    masks: list[np.ndarray] = []
    full: list[int] = []  # pixels of each whole object, without occlusion
    labels: list[int] = []
    for _ in range(_whole(rng, *OBJECTS)):
        label = drawn[_whole(rng, 0, len(drawn) - 1)]
        radius = _between(rng, *RADIUS) * min(size)
        for _ in range(_PLACES):
            u, v, mask = _placed(rng, CLASSES[label], radius, x, y)
            if mask.sum() >= 24 and all((m & ~mask).sum() >= VISIBLE * n for m, n in zip(masks, full, strict=True)):
                break
        else:
            continue
        masks = [m & ~mask for m in masks] + [mask]
        full.append(int(mask.sum()))
        labels.append(label)
        alike = likeness > 0 and rng.random() < likeness
        candidates = rng.random((4, 3))
        if alike:
            candidates = np.clip(np.array(COLOURS[label]) + 0.3 * (candidates - 0.5), 0, 1)
        first = candidates[abs(candidates - ground).sum(1).argmax()]  # the colour that differs most from the ground
        second = np.clip(first + (rng.random(3) - 0.5) * 0.9, 0, 1)
        period = _between(rng, 0.03, 0.07) * min(size)
        texture = _texture(rng, u[mask] * radius, v[mask] * radius, period, label if alike else None)
        picture[mask] = _painted(first, second, texture)
    light = 1 + 0.3 * (rng.random() - 0.5) * (2 * x / width - 1) + 0.3 * (rng.random() - 0.5) * (2 * y / height - 1)
    grain = (rng.random((height, width, 3)) - 0.5) * _between(rng, 0.02, 0.1)
    pixels = (np.clip(picture * light[..., None] + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
    return Scene(
        torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(stacked), torch.tensor(labels).long()
    )


def write_scenes(
    folder: Path | str, count: int, *, seed: int = 0, size: Size = (160, 160), likeness: float = 0.0,
    classes: Sequence[str] = CLASSES, labelled: Sequence[str] = CLASSES,
) -> None:  # fmt: skip
    """Writes images/000000.png … and instances.json (COCO) of `count` scenes with objects of `classes`.

    instances.json has only the categories `labelled`, and only their objects. The id of a category is its place in CLASSES,
    counted from 1, so files with different categories have the same ids.

    Existing files with the same content are kept, so an interrupted call can be repeated. A file with other content raises
    DataError.
    """
    folder, kept = Path(folder), set(_numbers(labelled))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        made = scene(seed, index, size, likeness, classes)
        name = f"{index:06d}.png"
        _write_picture(folder / "images" / name, made.image)
        images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
        bits = BitMasks.from_dense(made.masks)
        rows = zip(made.labels.tolist(), bits.area().tolist(), bits.boxes().tolist(), bits.rle(), strict=True)
        for label, area, (x1, y1, x2, y2), rle in rows:
            if label not in kept:
                continue
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "iscrowd": 0, "area": area,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": segmentation}
            )  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES) if i in kept]
    info = {"description": "synthetic scenes", "seed": seed}
    data = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    path = folder / "instances.json"
    if not path.exists():
        atomic_write(path, json.dumps(data))
    elif read_json(path) != data:
        raise DataError(f"{path}: holds other labels than those to be written; choose another folder or remove it")


def _numbers(names: Sequence[str]) -> list[int]:
    """Places in CLASSES."""
    if not names or not set(names) <= set(CLASSES):
        raise ValueError(f"scene: classes must be some of {CLASSES}, got {list(names)}")
    return [CLASSES.index(name) for name in names]


def _write_picture(path: Path, image: Tensor) -> None:
    if not path.exists():
        atomic_write(path, png(image))
    elif not torch.equal(read_picture(path), image):
        raise DataError(f"{path}: is another picture than the one to be written; choose another folder or remove it")


# -- drawing
def _placed(rng: Generator, shape: str, radius: float, x: Field, y: Field) -> tuple[Field, Field, np.ndarray]:
    """(u, v, mask) of a shape at a random place of the picture, a little squeezed and rotated: u, v are its own coordinates."""
    height, width = x.shape
    t = 2 * rng.random() - 1  # (1 − t², 2t) / (1 + t²) is a rotation by −90° to 90°, without a sine
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    if rng.random() < 0.5:
        cos, sin = -cos, -sin
    margin = 0.5 * radius
    dx = x - _between(rng, margin, width - margin)
    dy = y - _between(rng, margin, height - margin)
    u = (cos * dx + sin * dy) / radius
    v = (cos * dy - sin * dx) / (radius * _between(rng, 0.8, 1.0))
    return u, v, SHAPES[shape](u, v) & (u * u + v * v < 1)


def _texture(rng: Generator, x: np.ndarray, y: np.ndarray, period: float, kind: int | None = None) -> np.ndarray:
    """Values of 0 to 1 at points, the share of the second colour. `kind` is one of six textures; None draws one."""
    kind = _whole(rng, 0, 5) if kind is None else kind
    slope = 2 * rng.random() - 1
    if rng.random() < 0.5:
        x, y = y, x
    along = (x + slope * y) / period
    across = (y - slope * x) / period
    if kind == 0:  # stripes
        return (along % 1 < 0.5).astype(np.float64)
    if kind == 1:  # checks
        return ((along % 2 < 1) ^ (across % 2 < 1)).astype(np.float64)
    if kind == 2:  # dots
        return ((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.09).astype(np.float64)
    if kind == 3:  # soft waves
        return abs(along % 2 - 1) * 0.6 + abs(across % 2 - 1) * 0.4
    if kind == 4:  # a gradient with grain
        low, high = (along.min(), along.max()) if along.size else (0.0, 1.0)
        return np.clip((along - low) / max(high - low, 1e-6) + (rng.random(x.shape) - 0.5) * 0.5, 0, 1)
    return np.clip(0.7 * _noise(rng, x, y, 2 * period) + 0.5 * _noise(rng, x, y, 0.7 * period) - 0.1, 0, 1)


def _noise(rng: Generator, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Random values on a 32 × 32 lattice of this period, repeated in both directions, with bilinear interpolation."""
    lattice = rng.random((32, 32))
    column, row = np.floor(x / period), np.floor(y / period)
    fx, fy = x / period - column, y / period - row
    left, top = column.astype(np.int64) % 32, row.astype(np.int64) % 32
    right, bottom = (left + 1) % 32, (top + 1) % 32
    upper = lattice[top, left] * (1 - fx) + lattice[top, right] * fx
    lower = lattice[bottom, left] * (1 - fx) + lattice[bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def _painted(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[..., None]


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _whole(rng: Generator, low: int, high: int) -> int:
    """A uniform whole number from low to high, both included. It uses `random`, which is the same in all versions of numpy."""
    return low + int(rng.random() * (high - low + 1))
