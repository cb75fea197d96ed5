"""What can be set about proposals and about pre-training on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sprompt.methods.registry import MethodConfig

Level = Literal["C2", "C3", "C4", "C5"]
#: Stride of the backbone's maps.
STRIDES = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}


@dataclass(frozen=True)
class ProposalConfig:
    """How saliency masks are found in a picture, and which are kept."""

    short: int = 800
    """Short side of the picture that the backbone sees, in pixels; with keep_ratio off, its height."""
    long: int = 1333
    """Its long side at most; with keep_ratio off, its width."""
    keep_ratio: bool = True
    """Off: every picture is stretched to long x short pixels."""
    level: Level = "C5"
    """The backbone's map that is searched, of stride 32; C4 and C3 (16 and 8) suit small pictures."""
    seeds: Literal["pyramid"] | tuple[int, int] = "pyramid"
    """"pyramid": cells and their means at half and quarter scale. Or a grid, height and width, of window means."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Of a seed with the cells."""
    threshold: float = 0.5
    """A cell or pixel belongs to a mask where its normalised similarity is at least this."""
    min_area: int = 2
    """Cells that a mask has at least."""
    nms: Literal["matrix", "matrix_linear", "greedy"] = "matrix"
    """Matrix NMS lets scores decay by overlap, along a gaussian or a line; greedy NMS removes masks."""
    iou_threshold: float = 0.5
    """Greedy NMS removes masks that overlap by more."""
    sigma: float = 2.0
    """Gaussian matrix NMS: more of it suppresses more."""
    max_masks: int = 20
    """Masks a picture, before the filters below."""
    centre: float = 0.2
    """A mask's rows must have their mean below this share of the height, which drops the sky."""
    max_width: float = 0.95
    """A mask's box must be narrower than this share of the width."""
    min_score: float = 0.7
    """Score after NMS that a mask must have."""
    keep_best: bool = False
    """Keep the best mask of a picture where the filters leave none."""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"ProposalConfig: {name} must {rule}, got {getattr(self, name)!r}")

        if isinstance(self.seeds, list):
            object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("short", "long", "min_area", "max_masks"):
            check(name, _whole(getattr(self, name)), "be a whole number of at least 1")
        check("long", self.long >= self.short or not self.keep_ratio, f"be at least short = {self.short}")
        for name, choices in (
            ("level", tuple(STRIDES)), ("similarity", ("cosine", "dot")), ("nms", ("matrix", "matrix_linear", "greedy")),
        ):  # fmt: skip
            check(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")
        grid = isinstance(self.seeds, tuple) and len(self.seeds) == 2 and all(map(_whole, self.seeds))
        check("seeds", self.seeds == "pyramid" or grid, 'be "pyramid" or a grid of two whole numbers')
        check("threshold", _number(self.threshold) and 0 < self.threshold <= 1, "lie in (0, 1]")
        for name in ("iou_threshold", "min_score"):
            check(name, _number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, "lie between 0 and 1")
        for name in ("sigma", "centre", "max_width"):
            check(name, _number(getattr(self, name)) and getattr(self, name) >= 0, "be a number of at least 0")

    @property
    def stride(self) -> int:
        return STRIDES[self.level]

    def record(self) -> dict[str, Any]:
        """What a proposal file says of itself under `info.proposals`."""
        return {"version": 1, "stride": self.stride} | dataclasses.asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ProposalConfig:
        """The settings that a proposal file was made with, from its `info.proposals`; other entries are passed over."""
        names = {field.name for field in dataclasses.fields(ProposalConfig)}
        return ProposalConfig(**{name: value for name, value in record.items() if name in names})


@dataclass(frozen=True)
class SaliencyPromptConfig(MethodConfig):
    """How proposals teach a model: prompts added to its queries, and kernels drawn to the seeds of their proposals."""

    level: Literal["coarsest", "auto", "P2", "P3", "P4", "P5", "features"] = "coarsest"
    """The map that prompts are read from: one of the pyramid, by the size of the box ("auto"), or that which queries themselves are
    multiplied with to give masks ("features")."""
    pooling: Literal["box", "mask", "roi_align", "release"] = "box"
    """A prompt is the mean over the cells of a proposal's box, or over those whose centre is in the mask, or RoIAlign of the box
    with one bin; "release" takes the cells of the first public code, which leaves out the last one that a box covers in part."""
    contrast: bool = False
    """Take from each prompt v what it has in common with its picture: v − μ ‖v‖/‖μ‖ with the picture's mean μ on the same map. Its
    product with a cell is above 0 where the cell is nearer in angle to the proposal than to the picture."""
    site: str = "first"
    """Place in the model where queries take prompts: "first", the model's first site; the name of a site (K-Net: kernel, proposal); or
    "late", which matches at the first site and adds at the second."""
    assign: Literal["cosine", "sequential", "random", "none"] = "cosine"
    """Which prompt a query takes: the most similar, by place, by a permutation drawn every step, or none (labels only)."""
    ratio: float | None = None
    """Length of the prompts, in mean lengths of the queries that they are added to; none adds them as they are."""
    dropout: float = 0.1
    """Chance that no prompt is taken,"""
    dropout_of: Literal["query", "image"] = "query"
    """by each query of each image for itself, or by all queries of an image."""
    kernel_weight: float = 1.0
    """Weight of the kernel supervision; 0 leaves it out."""
    projection: Literal["linear", "linear_nobias", "frozen_orthogonal", "pca"] = "linear_nobias"
    """From seed features to the width of kernels: trained (two kinds), a fixed random rotation, or principal components fitted to
    the first batch."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of the kernel supervision over matched pairs."""
    release_pairing: bool = False
    """Pair kernels in their own order with seeds in theirs, as the first public code does. It is wrong; for comparisons only."""
    freeze_backbone: bool = True
    """Train everything but the backbone."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("level", ("coarsest", "auto", "P2", "P3", "P4", "P5", "features")),
            ("pooling", ("box", "mask", "roi_align", "release")), ("dropout_of", ("query", "image")),
            ("assign", ("cosine", "sequential", "random", "none")), ("reduction", ("mean", "sum")),
            ("projection", ("linear", "linear_nobias", "frozen_orthogonal", "pca")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"SaliencyPromptConfig: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not (_number(self.dropout) and 0 <= self.dropout <= 1):
            raise ValueError(f"SaliencyPromptConfig: dropout must lie between 0 and 1, got {self.dropout!r}")
        if self.ratio is not None and not (_number(self.ratio) and self.ratio > 0):
            raise ValueError(f"SaliencyPromptConfig: ratio must be above 0, or none, got {self.ratio!r}")
        if not (_number(self.kernel_weight) and self.kernel_weight >= 0):
            raise ValueError(f"SaliencyPromptConfig: kernel_weight must be at least 0, got {self.kernel_weight!r}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
