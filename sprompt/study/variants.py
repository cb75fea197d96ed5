"""The variants of a study, which are ways to start fine-tuning, and the questions that compare them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """One way to start fine-tuning."""

    title: str
    start: Literal["scratch", "backbone", "pretrained"] = "pretrained"
    proposals: Literal["saliency", "shuffled", "truth"] = "saliency"
    """Masks that pre-training learns: masks of `sprompt propose`, masks of another picture, or true masks."""
    method: dict[str, str] = field(default_factory=dict)
    """Options `--method.…` of `sprompt pretrain` that replace options of the preset. The preset has prompts and kernel
    supervision."""


#: No kernel supervision, so that variants differ in one point. Variants with it take its weight from the preset.
_ALONE = {"kernel-weight": "0"}

#: The variants by name, in the order of the tables.
VARIANTS = {
    "scratch": Variant("from scratch", "scratch"),
    "backbone": Variant("backbone only", "backbone"),
    "pseudo": Variant("pseudo-labels", method=_ALONE | {"assign": "none"}),
    "pseudo-kernel": Variant("pseudo-labels and kernel supervision", method={"assign": "none"}),
    "random": Variant("prompts, random assignment", method=_ALONE | {"assign": "random"}),
    "sequential": Variant("prompts, sequential assignment", method=_ALONE | {"assign": "sequential"}),
    "prompts": Variant("prompts, cosine assignment", method=_ALONE),
    "prompts-kernel": Variant("prompts and kernel supervision"),
    "shuffled-pseudo": Variant("masks of other pictures, pseudo-labels", proposals="shuffled",
                               method=_ALONE | {"assign": "none"}),
    "shuffled-prompts": Variant("masks of other pictures, prompts", proposals="shuffled", method=_ALONE),
    "truth-pseudo": Variant("true masks, pseudo-labels", proposals="truth", method=_ALONE | {"assign": "none"}),
    "truth-prompts": Variant("true masks, prompts", proposals="truth", method=_ALONE),
    "site-late": Variant("matched to the learned kernels, added to the pooled", method=_ALONE | {"site": "late"}),
    "site-proposal": Variant("added to the pooled kernels", method=_ALONE | {"site": "proposal"}),
    "source-plain": Variant("not set against their picture", method=_ALONE | {"contrast": "False"}),
    "source-align": Variant("by RoIAlign of the box", method=_ALONE | {"pooling": "roi_align"}),
    "source-finest": Variant("from the finest map of the pyramid", method=_ALONE | {"level": "P2", "contrast": "False"}),
    "source-coarsest": Variant("from boxes on the coarsest map of the pyramid",
                               method=_ALONE | {"level": "coarsest", "pooling": "box", "contrast": "False"}),
    "dropout-query": Variant("dropped by single kernels", method=_ALONE | {"dropout-of": "query"}),
    "prompts-paper": Variant("prompts as in the paper and its code",
                             method=_ALONE | {"level": "coarsest", "pooling": "box", "contrast": "False",
                                              "dropout-of": "query", "dropout": "0.1"}),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A table: the claim that it tests, and its rows, the variants."""

    title: str
    claim: str
    variants: tuple[str, ...]
    baseline: str
    """The variant that the others are compared with, seed by seed."""


#: Numbers of tables and figures in the titles are those of the paper.
QUESTIONS = {
    "start": Question(
        "Start of fine-tuning (Table 1)",
        "Pre-training with prompts is a better start than a self-supervised backbone.",
        ("scratch", "backbone", "pseudo", "prompts", "prompts-kernel"), "pseudo",
    ),
    "assignment": Question(
        "Assignment of prompts (Table 5)",
        "Cosine beats sequential, sequential beats no prompts, and no prompts beat random ones.",
        ("pseudo", "random", "sequential", "prompts"), "pseudo",
    ),
    "supervision": Question(
        "Kernel supervision (Table 4)",
        "Drawing kernels to the seeds of their masks adds to prompts.",
        ("pseudo", "pseudo-kernel", "prompts", "prompts-kernel"), "prompts",
    ),
    "masks": Question(
        "Quality of the masks (Table 7)",
        "Prompts forgive bad masks: even masks that have nothing to do with the picture become usable.",
        ("shuffled-pseudo", "shuffled-prompts", "pseudo", "prompts", "truth-pseudo", "truth-prompts"), "pseudo",
    ),
    "site": Question(
        "Where prompts are added",
        "The paper adds them to the learned kernels, its public code to the pooled ones.",
        ("prompts", "site-late", "site-proposal"), "prompts",
    ),
    "source": Question(
        "What a prompt is read from",
        "The paper averages the box of a mask on one map of the pyramid; the preset the mask on the map that kernels act on.",
        ("prompts", "source-plain", "source-align", "source-finest", "source-coarsest"), "prompts",
    ),
    "mends": Question(
        "Changes to the prompts of the paper",
        "Prompts as in the paper and its code are enough.",
        ("pseudo", "prompts-paper", "source-coarsest", "dropout-query", "prompts"), "prompts-paper",
    ),
}  # fmt: skip
