"""Settings of proposals, and of pre-training on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sprompt.methods.registry import MethodConfig
from sprompt.settings import check_choices

Level = Literal["C2", "C3", "C4", "C5"]
#: Stride of the maps of a backbone that has four.
STRIDES = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}


@dataclass(frozen=True)
class ProposalConfig:
    """How saliency masks are found in a picture, and which masks are kept."""

    short: int = 800
    """Short side, in pixels, of the resized picture that the backbone sees; at least 1. Without keep_ratio: its height."""
    long: int = 1333
    """Upper bound of the long side of that picture in pixels, at least `short`. Without keep_ratio: its width, at least 1."""
    keep_ratio: bool = True
    """True keeps the aspect ratio. False stretches every picture to a width of `long` and a height of `short` pixels."""
    level: Level = "C5"
    """The backbone's map that is searched. C2 to C5 have strides 4, 8, 16 and 32; finer maps than C5 suit small pictures. The only map
    of a ViT is C5, with the stride of its patches."""
    seeds: Literal["pyramid"] | tuple[int, int] = "pyramid"
    """The seeds: features that are compared with all cells of the map. "pyramid": every cell, and the averages of the map at
    half and quarter scale. Two whole numbers, height and width, at least 1: the averages of a grid of height x width
    windows."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Similarity of a seed and a cell: cosine, or dot product."""
    threshold: float = 0.5
    """Lower bound, above 0 and at most 1, of the normalised similarity of the cells or pixels in a mask."""
    min_area: int = 2
    """Lower bound of a mask's size in cells of the map, at least 1."""
    nms: Literal["matrix", "matrix_linear", "greedy"] = "matrix"
    """Suppression of overlapping masks. "matrix" and "matrix_linear" lower the scores by a gaussian or linear function of the
    overlap; "greedy" removes masks."""
    iou_threshold: float = 0.5
    """With nms "greedy": a mask is removed if its IoU with a better mask exceeds this value, from 0 to 1."""
    sigma: float = 2.0
    """With nms "matrix": strength of the gaussian decay, at least 0. Larger values lower the scores of overlapping masks
    more."""
    max_masks: int = 20
    """Upper bound of the masks of a picture, at least 1. The filters centre, max_width, border and min_score come after it."""
    centre: float = 0.2
    """The mean of the rows that a mask occupies must exceed this share of the picture's height, from the top; at least 0. This
    removes the sky."""
    max_width: float = 0.95
    """A mask's tight box must be narrower than this share of the picture's width; at least 0. The released code counts the
    columns that the mask occupies instead: the box also includes the gaps between them."""
    border: float = 0.0
    """Width, as a share of the picture's shorter side, of a band along its border; from 0 to 0.5. A mask that touches the border is
    removed if more than half of its pixels lie in the band. This removes strips and frames that are no objects. 0 removes nothing;
    neither the paper nor its code has this filter."""
    min_score: float = 0.7
    """Lower bound of a mask's score after suppression, from 0 to 1."""
    keep_best: bool = False
    """Keep the mask with the best score if the filters remove all masks of a picture."""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"ProposalConfig: {name} must {rule}, got {getattr(self, name)!r}")

        if isinstance(self.seeds, list):
            object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("short", "long", "min_area", "max_masks"):
            check(name, _whole(getattr(self, name)), "be a whole number of at least 1")
        check("long", self.long >= self.short or not self.keep_ratio, f"be at least short = {self.short}")
        check_choices(type(self), vars(self))
        grid = isinstance(self.seeds, tuple) and len(self.seeds) == 2 and all(map(_whole, self.seeds))
        check("seeds", self.seeds == "pyramid" or grid, 'be "pyramid" or a grid of two whole numbers')
        check("threshold", _number(self.threshold) and 0 < self.threshold <= 1, "lie in (0, 1]")
        for name in ("iou_threshold", "min_score"):
            check(name, _number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, "lie between 0 and 1")
        check("border", _number(self.border) and 0 <= self.border <= 0.5, "lie between 0 and 0.5")
        for name in ("sigma", "centre", "max_width"):
            check(name, _number(getattr(self, name)) and getattr(self, name) >= 0, "be a number of at least 0")

    @property
    def stride(self) -> int:
        return STRIDES[self.level]

    def record(self) -> dict[str, Any]:
        """The entry `info.proposals` of a proposal file. `border` is in it only if it is above 0, so that files written before it was a
        setting are resumed."""
        values = dataclasses.asdict(self)
        if not self.border:
            del values["border"]
        return {"version": 1, "stride": self.stride} | values

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ProposalConfig:
        """The settings of a proposal file, from its `info.proposals`; other entries are ignored."""
        names = {field.name for field in dataclasses.fields(ProposalConfig)}
        return ProposalConfig(**{name: value for name, value in record.items() if name in names})


@dataclass(frozen=True)
class SaliencyPromptConfig(MethodConfig):
    """How proposals teach a model. Prompts are added to its queries; kernel supervision pulls kernels to the seeds of
    proposals."""

    level: Literal["coarsest", "auto", "P2", "P3", "P4", "P5", "features", "C5"] = "coarsest"
    """The map that prompts are read from. "P2" to "P5" and "coarsest" are maps of the pyramid. "auto" chooses a map of the
    pyramid by the size of the box. "features" is the map that the model multiplies by its queries to get masks. "C5" is the
    backbone's last map: a linear layer with a bias, which is trained too and not needed afterwards, brings its means to the width of
    the queries. The public code has it for Mask2Former."""
    pooling: Literal["box", "mask", "roi_align", "release"] = "box"
    """How a proposal becomes a prompt. "box": mean over the cells of its box. "mask": mean over the cells with a centre in the
    mask. "roi_align": RoIAlign of the box with one bin. "release": the box as in the first public code, without the last,
    partly covered cell."""
    contrast: bool = False
    """Remove from each prompt v the mean μ of the picture on the same map: v − μ ‖v‖/‖μ‖. The product of a prompt and a cell is
    then above 0 if the angle between cell and proposal is smaller than the angle between cell and picture."""
    site: str = "first"
    """Place in the model where queries take prompts: "first", the model's first site; the name of a site (K-Net: kernel, proposal); or
    "late", which matches at the first site and adds at the second."""
    assign: Literal["cosine", "sequential", "random", "none"] = "cosine"
    """Which prompt a query takes. "cosine": the most similar. "sequential": by place, in turn. "random": by a permutation drawn
    every step. "none": no prompt, so proposals serve as labels only."""
    ratio: float | None = None
    """Length of the prompts, in units of the mean length of the queries that they are added to; above 0. None keeps their
    length."""
    dropout: float = 0.1
    """Probability, from 0 to 1, that a query takes no prompt; see dropout_of."""
    dropout_of: Literal["query", "image"] = "query"
    """Whether dropout draws for each query, or once for all queries of an image."""
    kernel_weight: float = 1.0
    """Weight of the kernel supervision in the loss, at least 0; 0 switches it off."""
    projection: Literal["linear", "linear_nobias", "frozen_orthogonal", "pca"] = "linear_nobias"
    """How seed features are brought to the width of kernels. "linear" and "linear_nobias" are trained, "frozen_orthogonal" is a
    fixed random rotation, and "pca" holds principal components fitted to the first batch."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether the kernel supervision is the mean or the sum over all matched pairs."""
    release_pairing: bool = False
    """Pair the matched kernels with the seeds by their order, not by their match, as the first public code does. It is wrong;
    use it for comparisons only."""
    freeze_backbone: bool = True
    """Keep the backbone's weights fixed and train all others."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        if not (_number(self.dropout) and 0 <= self.dropout <= 1):
            raise ValueError(f"SaliencyPromptConfig: dropout must lie between 0 and 1, got {self.dropout!r}")
        if self.ratio is not None and not (_number(self.ratio) and self.ratio > 0):
            raise ValueError(f"SaliencyPromptConfig: ratio must be above 0, or none, got {self.ratio!r}")
        if not (_number(self.kernel_weight) and self.kernel_weight >= 0):
            raise ValueError(f"SaliencyPromptConfig: kernel_weight must be at least 0, got {self.kernel_weight!r}")

    @property
    def uses_seeds(self) -> bool:
        """Whether the seeds of proposals teach. Only kernel supervision reads them: prompts are means over proposals, of the
        model's own maps."""
        return self.kernel_weight > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
