"""Changes of a sample before a network sees it: resize, flip, rotation, crop. `collate` then makes a batch of samples.

Pixels are cells: pixel i covers the interval from i to i + 1. In a picture w pixels wide, a point at p moves to p · w′ / w if
the picture is resized to w′ pixels, and to w − p if it is mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.data.sample import Batch, Sample
from sprompt.masks import BitMasks, Size
from sprompt.normalisation import MEAN, STD


def resized_size(size: Size, short: float, long: float) -> Size:
    """The (h, w) of a resized picture: the shorter side is `short`, or less if the longer side would exceed `long`.

    The aspect ratio is kept up to rounding.

    >>> resized_size((480, 640), 800, 1333), resized_size((100, 1000), 800, 1333)
    ((800, 1067), (133, 1333))
    """
    scale = min(short / min(size), long / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


@dataclass(frozen=True)
class Augment:
    """Resizes a sample to a fixed or random size, then flips, rotates and crops it at random.

    A mask that loses all its pixels is removed, with its label and seed.
    Pictures are resized bilinearly with antialias, masks by `BitMasks.resize`. A rotation is about the centre and keeps the
    size; empty corners get the mean colour and no mask. After a crop, a seed may lie outside of the picture although its mask
    does not.
    """

    short: int | tuple[int, int]
    """Length of the shorter side in pixels, at least 1. Two numbers, low and high, draw it uniformly, both ends included."""
    long: int
    """Upper bound of the longer side in pixels, at least 1. It takes precedence over `short`."""
    flip: float = 0.5
    """Probability, from 0 to 1, that a picture is mirrored left to right."""
    rotate_probability: float = 0.0
    """Probability, from 0 to 1, that a picture is rotated."""
    rotate_degrees: float = 0.0
    """Largest angle of a rotation in degrees, from 0 to 180. The angle is uniform between minus and plus this value."""
    crop: Size | None = None
    """Height and width in pixels, at least 1, of a window at a random place. A shorter side is kept. None does not crop."""
    scale: tuple[float, float] | None = None
    """Large-scale jitter: low and high of a factor on `short` and `long`, above 0 and at most 10. It is drawn uniformly for each
    picture. None: a factor of 1."""
    keep_ratio: bool = True
    """True keeps the aspect ratio. False stretches every picture to a width of `long` and a height of `short` pixels."""

    def __post_init__(self) -> None:
        low, high = self.shorts
        if not 0 < low <= high:
            raise ValueError(f"Augment: short must be at least 1, and low <= high, got {self.short}")
        if self.long < 1:
            raise ValueError(f"Augment: long must be at least 1, got {self.long}")
        for name in ("flip", "rotate_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Augment: {name} must be a chance between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.rotate_degrees <= 180:
            raise ValueError(f"Augment: rotate_degrees must be between 0 and 180, got {self.rotate_degrees}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 10:
            raise ValueError(f"Augment: scale must be above 0 and at most 10, and low <= high, got {self.scale}")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"Augment: crop must be at least 1 on each side, got {self.crop}")

    @property
    def shorts(self) -> tuple[int, int]:
        return self.short if isinstance(self.short, tuple) else (self.short, self.short)

    def mirrors(self, generator: torch.Generator) -> bool:
        """Whether a call with this generator mirrors its picture."""
        return _draws(generator)[1] < self.flip

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        draws = _draws(generator)
        sample = resize(sample, self._resized(_size(sample), draws[0], draws[6]))
        if draws[1] < self.flip:
            sample = flip(sample)
        if draws[2] < self.rotate_probability:
            sample = rotate(sample, (2 * draws[3] - 1) * self.rotate_degrees)
        if self.crop is not None:
            (h, w), (height, width) = self.crop, _size(sample)
            h, w = min(h, height), min(w, width)
            sample = crop(sample, int(draws[4] * (height - h + 1)), int(draws[5] * (width - w + 1)), h, w)
        seen = sample.masks.area() > 0
        return sample if bool(seen.all()) else sample.kept(seen)

    def _resized(self, size: Size, short_draw: float, scale_draw: float) -> Size:
        """The (h, w) after the resize, for two random numbers from 0 to 1. No side exceeds `long` times the highest factor."""
        low, high = self.shorts
        short = low + int(short_draw * (high - low + 1))
        least, most = self.scale or (1.0, 1.0)
        factor = least + scale_draw * (most - least)
        if self.keep_ratio:
            return resized_size(size, factor * short, factor * self.long)
        return max(1, int(factor * short + 0.5)), max(1, int(factor * self.long + 0.5))


def _draws(generator: torch.Generator) -> list[float]:
    """The seven random numbers of a call. All are always drawn, so that one option does not change the numbers of the others."""
    return torch.rand(7, generator=generator, dtype=torch.float64).tolist()


# -- one step each; empty masks stay
def resize(sample: Sample, size: Size) -> Sample:
    old = _size(sample)
    if size == old:
        return sample
    image = F.interpolate(sample.image[None], size=size, mode="bilinear", antialias=True)[0]
    matrix = ((size[1] / old[1], 0.0, 0.0), (0.0, size[0] / old[0], 0.0))
    return replace(sample, image=image, masks=sample.masks.resize(size), seeds=_moved(sample.seeds, matrix))


def flip(sample: Sample) -> Sample:
    """Mirrored left to right."""
    matrix = ((-1.0, 0.0, float(_size(sample)[1])), (0.0, 1.0, 0.0))
    return replace(sample, image=sample.image.flip(2), masks=sample.masks.flip(), seeds=_moved(sample.seeds, matrix))


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """The window at (top, left)."""
    image = sample.image[:, top : top + height, left : left + width].contiguous()
    matrix = ((1.0, 0.0, -float(left)), (0.0, 1.0, -float(top)))
    masks = sample.masks.crop(top, left, height, width)
    return replace(sample, image=image, masks=masks, seeds=_moved(sample.seeds, matrix))


def rotate(sample: Sample, degrees: float) -> Sample:
    """Rotates counter-clockwise about the centre, bilinearly. A mask pixel is set where its interpolated value exceeds ½."""
    height, width = _size(sample)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # from a pixel of the result to the picture, in coordinates of -1 to 1 on each side
    back = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], dtype=torch.float64)
    grid = F.affine_grid(back[None], [1, 1, height, width], align_corners=False).float()
    mean = torch.tensor(MEAN)[:, None, None]
    image = F.grid_sample((sample.image - mean)[None], grid, align_corners=False)[0] + mean  # outside is 0: the mean
    masks = [
        BitMasks.from_dense(
            F.grid_sample(sample.masks[i : i + 8].to_dense(torch.float32)[None], grid, align_corners=False)[0]
        )
        for i in range(0, len(sample.masks), 8)  # in parts: as floats they are 32 times as large
    ]
    cx, cy = width / 2, height / 2
    matrix = ((cos, sin, cx - cos * cx - sin * cy), (-sin, cos, cy + sin * cx - cos * cy))
    return replace(
        sample,
        image=image.add(0.5).clamp(0, 255).to(torch.uint8),
        masks=BitMasks.cat(masks) if masks else sample.masks,
        seeds=_moved(sample.seeds, matrix),
    )


def collate(
    samples: Sequence[Sample], divisor: int = 32, pad_to: Size | None = None, max_masks: int | None = None
) -> Batch:
    """Normalises pictures by MEAN and STD, and pads them with 0 on the right and below to one size.

    That size is the largest height and the largest width of the batch, each rounded up to a multiple of `divisor`. Without
    samples the batch is empty.

    Args:
        pad_to: (H, W) of every batch, in place of that size. No picture may exceed it.
        max_masks: G of every batch, in place of the most masks of a sample. Of a sample with more masks the first G are taken.
    """
    sizes = [_size(s) for s in samples]
    if pad_to is None:
        height, width = (max((-(-s[i] // divisor) * divisor for s in sizes), default=divisor) for i in (0, 1))
    else:
        height, width = pad_to
        for sample, (h, w) in zip(samples, sizes, strict=True):
            if h > height or w > width:
                raise ValueError(
                    f"collate: pictures must fit into pad_to={pad_to}, got {h}x{w} from {sample.name}; enlarge pad_to"
                )
    counts = [len(s.masks) if max_masks is None else min(len(s.masks), max_masks) for s in samples]
    most = max(counts, default=0) if max_masks is None else max_masks
    with_seeds = {s.seeds is not None for s in samples}
    if len(with_seeds) > 1:
        raise ValueError("collate: either all samples must have seeds or none, got both; take them from one dataset")
    images = torch.zeros(len(samples), 3, height, width)
    words = torch.zeros(len(samples), most, (height * width + 31) // 32, dtype=torch.int32)
    labels = torch.zeros(len(samples), most, dtype=torch.int64)
    seeds = torch.zeros(len(samples), most, 3) if with_seeds == {True} else None
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for b, (sample, (h, w), count) in enumerate(zip(samples, sizes, counts, strict=True)):
        images[b, :, :h, :w] = (sample.image - mean) / std
        words[b, :count] = sample.masks[:count].pad(0, width - w, 0, height - h).words
        labels[b, :count] = sample.labels[:count]
        if seeds is not None and sample.seeds is not None:
            seeds[b, :count] = sample.seeds[:count]
    return Batch(
        images=images,
        masks=BitMasks(words, (height, width)),
        labels=labels,
        counts=torch.tensor(counts, dtype=torch.int64),
        sizes=sizes,
        image_ids=[s.image_id for s in samples],
        names=[s.name for s in samples],
        original_sizes=[s.size for s in samples],
        seeds=seeds,
    )


def _size(sample: Sample) -> Size:
    return sample.image.shape[1], sample.image.shape[2]


def _moved(
    seeds: Tensor | None, matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
) -> Tensor | None:
    """Seeds (G, 3) with x, y moved by the affine matrix; the scale is kept."""
    if seeds is None:
        return None
    m = torch.tensor(matrix, dtype=torch.float64)
    points = seeds[:, :2].double() @ m[:, :2].T + m[:, 2]
    return torch.cat((points.float(), seeds[:, 2:]), 1)
