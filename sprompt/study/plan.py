"""The cells of a study, and the commands that run them."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprompt.cli import parse
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
    proposals: dict[str, Path]  # proposal files by kind; "truth" is missing if the true masks are unknown
    longer: int = 1  # length of pre-training as a multiple of the preset's


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
            "pretrain", "--preset", given.settings, "--images", str(given.unlabelled),
            "--proposals", str(given.proposals[variant.proposals]), "--backbone", str(given.backbone),
            "--out", str(folder), "--train.seed", str(self.seed), *method,
        ]  # fmt: skip
        train += _lengthened(train, given.longer)
        test = [
            "evaluate", "--preset", given.settings, "--model", str(folder), "--data.images", str(given.val_images),
            "--data.annotations", str(given.val_annotations), "--class-agnostic", "True", "--out", str(folder / "test"),
        ]  # fmt: skip
        return [train, test]


def _lengthened(command: list[str], times: int) -> list[str]:
    """The options that multiply the epochs of a pre-training, and the epochs of its learning rate drops, by `times`."""
    if times == 1:
        return []
    preset = parse(command[0], command[1:]).train
    drops = [str(times * drop) for drop in preset.drops]
    return ["--train.epochs", str(times * preset.epochs), *(["--train.drops", *drops] if drops else [])]


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
            "pretrained": ["--init", str(self.pretraining.folder(out))],
        }[VARIANTS[self.variant].start]
        return [
            "finetune", "--preset", given.settings, "--data.images", str(given.images), "--data.annotations",
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
