"""`sprompt evaluate`: COCO metrics on labelled pictures."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sprompt.commands import runs
from sprompt.commands.labels import Labels
from sprompt.commands.testing import Testing
from sprompt.data.coco import CocoDataset
from sprompt.models.knet import KNetConfig


@dataclasses.dataclass
class Evaluate:
    """Measures a model on labelled pictures: AP and AR of its masks and their boxes, by pycocotools.

    Writes OUT/predictions.json (COCO results), OUT/metrics.json. With --results a file of COCO results is measured instead.
    """

    data: Labels = dataclasses.field(default_factory=lambda: Labels(split="val"))
    """Pictures to measure on."""
    model: Path | None = None
    """Run folder or model file."""
    results: Path | None = None
    """COCO results to measure, instead of a model."""
    out: Path = Path("runs/evaluate")
    """Run folder."""
    class_agnostic: bool = False
    """Pool the categories: any object matches any label. Needed for a model of `pretrain`."""
    engine: Literal["pycocotools", "faster"] = "pycocotools"
    """faster: faster-coco-eval, if it is installed; the numbers are the same."""
    cpu: bool = False
    """Do not use a GPU."""
    test: Testing = dataclasses.field(default_factory=Testing)
    """How pictures are predicted."""

    def run(self) -> None:
        if (self.model is None) == (self.results is None):
            raise ValueError("--model: give either a model or --results")
        if self.model is None:
            self._results(self.data.open("data", keep_empty=True))
            return
        model, classes, size, said = runs.open_model(self.model, KNetConfig())
        runs.say(said)
        dataset = self.data.open("data", keep_empty=True, class_agnostic=self.class_agnostic and model.num_classes == 1)
        self._check_classes(classes or dataset.classes, dataset.classes, model.num_classes)
        text = runs.begin(self.out, self)
        report(
            model, dataset, self.out, self.test.sized(size), cpu=self.cpu, class_agnostic=self.class_agnostic,
            engine=self.engine,
        )  # fmt: skip
        runs.keep(self.out, text)

    def _check_classes(self, own: list[str], wanted: list[str], number: int) -> None:
        if number == len(wanted) and own == wanted:
            return
        if number == 1 != len(wanted):
            advice = "--class-agnostic True pools the classes of the data"
        else:
            advice = "the order counts: it is that of the category ids"
        raise ValueError(f"--model: must have the classes of the data, {wanted}, got {own}; {advice}")

    def _results(self, dataset: CocoDataset) -> None:
        from sprompt.data.files import read_json
        from sprompt.engine.evaluate import coco_metrics

        assert self.results is not None
        text = runs.begin(self.out, self)
        results = read_json(runs.existing(self.results, "results", folder=False))
        if not isinstance(results, list):
            raise ValueError(f"{self.results}: must hold a list of COCO results, got a {type(results).__name__}")
        metrics = coco_metrics(
            dataset.ground_truth(), results, class_agnostic=self.class_agnostic, engine=self.engine
        ) | {"results": len(results)}
        runs.write_metrics(self.out, metrics)
        runs.keep(self.out, text)
        show(self.out, metrics)


def report(
    model: nn.Module, dataset: CocoDataset, out: Path, test: dict[str, Any], *, cpu: bool = False, quiet: bool = False,
    **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a model into the run folder, and shows the numbers."""
    from sprompt.engine.evaluate import evaluate

    metrics = evaluate(model, dataset, out, cpu=cpu, progress=not quiet, **how, **test)
    if not quiet:
        show(out, metrics)
    return metrics


def show(out: Path, metrics: dict[str, Any]) -> None:
    from rich.console import Console

    from sprompt.engine.evaluate import metrics_table

    if runs.first():
        rows = {"masks": metrics} | ({"boxes": metrics["bbox"]} if "bbox" in metrics else {})
        Console().print(metrics_table(rows))
        per_class = metrics.get("per_class", {})
        if 1 < len(per_class) <= 20:
            print(
                "AP of each class: "
                + ", ".join(f"{n} {100 * v:.1f}" if v >= 0 else f"{n} –" for n, v in per_class.items())
            )
        print(f"{out / runs.METRICS}")
