"""The declaration of mean_field."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op

#: The 1e-6 that is added to F + G.
EPSILON = 1e-6


class Numbers(NamedTuple):
    """What a backend computes with. It rounds each to float32 (float64 on the reference for float64)."""

    factor: float  #: −1 / (2 scale²)
    low: float
    high: float
    least: float  #: log(low / (1 − low))
    most: float  #: log(high / (1 − high))
    epsilon: float  #: log 1e-6


def numbers(a: Args) -> Numbers:
    least, most = (math.log(x) - math.log1p(-x) for x in (a.low, a.high))
    return Numbers(-0.5 / a.scale**2, a.low, a.high, least, most, math.log(EPSILON))


@op("cuda")
def mean_field(
    images: Tensor, start: Tensor, boxes: Tensor, iterations: int, scale: float, low: float, high: float
) -> Tensor:
    return new(images, images.shape[0], words_for(images.shape[2] * images.shape[3]), dtype=torch.int32)


@mean_field.native
def _(a: Args, words: Tensor) -> None:
    maps = (native.rows(x) for x in (a.images, a.start, a.boxes))
    native._C.mean_field(*maps, a.iterations, *numbers(a), words, native.threads())
