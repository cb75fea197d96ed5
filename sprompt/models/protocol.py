"""What a training method asks of a query-based model. A model that has these methods works with every method as it is.

features = model.encode(images)
outputs = model.decode(features, prompter)      # prompter sees the queries at each of the model's sites, and may add to them
losses = model.losses(outputs, masks, labels, counts)
losses.terms, losses.matched                    # weighted terms, and which query every target was matched to, stage by stage
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from sprompt.masks import BitMasks, Size


class Features(NamedTuple):
    """Maps of a batch of images, finest first."""

    backbone: list[Tensor]  # C2, C3, C4, C5 of strides 4, 8, 16, 32; each with its own width
    maps: list[Tensor]  # P2, P3, P4, P5 of the same strides, of the width of the queries


class Prompter(Protocol):
    """A model calls it at each of its `sites`, in their order, with the queries as they are there, and goes on with what it
    returns."""

    def __call__(self, site: str, queries: Tensor, features: Tensor | None = None, /) -> Tensor:
        """queries (B, N, C) -> (B, N, C). `features` (B, C, h, w): the map whose products with the queries are masks there, if the
        model has one; the prompter does not change it."""


class Matched(NamedTuple):
    """One decoder stage: its output kernels, and the kernel that each target was matched to."""

    kernels: Tensor  # (B, N, C), with gradient
    rows: Tensor  # (B, G) int64, -1 where there is none


class Losses(NamedTuple):
    terms: dict[str, Tensor]  # scalars, weighted; the loss is their sum
    matched: list[Matched]  # a decoder stage each, in order


class Prediction(NamedTuple):
    """Results of one image by decreasing score."""

    masks: BitMasks  # (K,) of the picture's size
    scores: Tensor  # (K,) float32
    labels: Tensor  # (K,) int64


@runtime_checkable
class QueryModel(Protocol):
    sites: Sequence[str]  # where queries can be prompted, in the order of the forward pass, e.g. ("kernel", "proposal")
    channels: int  # width of the queries and of `Features.maps`
    num_classes: int
    backbone: nn.Module  # the first part of `encode`; `backbone.channels` are the widths of `Features.backbone`

    def encode(self, images: Tensor) -> Features:
        """Backbone and neck of images (B, 3, H, W), normalised, H and W multiples of 32."""

    def decode(self, features: Features, prompter: Prompter | None = None) -> Any:
        """The model's outputs, in whatever form its `losses` and `predictions` take."""

    def losses(self, outputs: Any, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        """Loss terms against masks (B, G) of the size of the images, labels (B, G) and counts (B,)."""

    def predictions(
        self, outputs: Any, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        """Results at the pictures' own sizes, from images padded to input_size that were `sizes` before."""
