"""The cells of a study, and the commands that run them."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprompt.study.variants import VARIANTS


@dataclass(frozen=True)
class Inputs:
    """The inputs that all cells share."""

    settings: str  # preset of the commands
    unlabelled: Path  # folder of the pictures for pre-training
    images: Path  # folder of the labelled pictures
    annotations: Path  # their COCO file
    val_images: Path
    val_annotations: Path
    backbone: Path
    proposals: dict[str, Path]  # by kind; "truth" is missing where nobody knows it
    digest: str = ""  # of the preset's content
    lengthened: tuple[str, ...] = ()  # options of `pretrain` that make it longer than in the preset
    model: tuple[str, ...] = ()  # option of the commands that chooses another model than the preset's


@dataclass(frozen=True, order=True)
class Pretraining:
    """One pre-training. The cells of all fractions start from it."""

    seed: int
    variant: str

    def folder(self, out: Path) -> Path:
        return out / "pretrain" / f"{self.variant}-s{self.seed}"

    def commands(self, out: Path, given: Inputs) -> list[list[str]]:
        """The commands of pre-training, and of a test of the pre-trained model without prompts. Empty for other starts."""
        variant, folder = VARIANTS[self.variant], self.folder(out)
        if variant.start != "pretrained":
            return []
        method = itertools.chain.from_iterable((f"--method.{name}", value) for name, value in variant.method.items())
        train = [
            "pretrain", "--preset", given.settings, *given.model, "--images", str(given.unlabelled),
            "--proposals", str(given.proposals[variant.proposals]), "--backbone", str(given.backbone),
            "--out", str(folder), "--train.seed", str(self.seed), *method,
        ]  # fmt: skip
        train += given.lengthened
        test = [
            "evaluate", "--preset", given.settings, *given.model, "--checkpoint", str(folder),
            "--data.images", str(given.val_images), "--data.annotations", str(given.val_annotations),
            "--class-agnostic", "True", "--out", str(folder / "test"),
        ]  # fmt: skip
        return [train, test]


@dataclass(frozen=True)
class Cell:
    """One fine-tuning and its test."""

    pretraining: Pretraining
    fraction: float

    @property
    def variant(self) -> str:
        return self.pretraining.variant

    @property
    def seed(self) -> int:
        return self.pretraining.seed

    def __str__(self) -> str:
        return f"{self.variant}, {100 * self.fraction:g} %, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "finetune" / f"{self.variant}-{100 * self.fraction:g}%-s{self.seed}"

    def command(self, out: Path, given: Inputs, every: int) -> list[str]:
        """The command of fine-tuning; `every` is the number of epochs between tests.

        The seed also chooses the labelled pictures, so they are the same for all variants.
        """
        start = {
            "scratch": [],
            "backbone": ["--backbone", str(given.backbone)],
            "pretrained": ["--checkpoint", str(self.pretraining.folder(out))],
        }[VARIANTS[self.variant].start]
        return [
            "finetune", "--preset", given.settings, *given.model, "--data.images", str(given.images), "--data.annotations",
            str(given.annotations), "--data.fraction", str(self.fraction), "--data.subset-seed", str(self.seed),
            "--val.images", str(given.val_images), "--val.annotations", str(given.val_annotations), *start,
            "--out", str(self.folder(out)), "--train.seed", str(self.seed), "--evaluate-every", str(every),
        ]  # fmt: skip


def chains(
    variants: Sequence[str], fractions: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[Pretraining, list[Cell]]]:
    """Pairs of a pre-training and the cells that start from it, seed by seed: an interrupted study then has complete seeds."""
    for seed, variant in itertools.product(seeds, variants):
        pretraining = Pretraining(seed, variant)
        yield pretraining, [Cell(pretraining, fraction) for fraction in fractions]


def typed(command: Sequence[str]) -> str:
    """The command as a line of a shell."""
    return shlex.join(["sprompt", *command])
