"""`sprompt evaluate`: COCO metrics on labelled pictures."""

import dataclasses
import json
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
        dataset = self.data.open("data", keep_empty=True, class_agnostic=self.class_agnostic and self.results is None)
        runs.begin(self.out, self)
        if self.model is not None:
            model, classes, said = runs.open_model(self.model, KNetConfig())
            runs.say(said)
            if len(classes) != len(dataset.classes):
                raise ValueError(
                    f"--model: must have the {len(dataset.classes)} classes of the data, got {len(classes)}; "
                    "was it trained on other labels? (--class-agnostic True pools them for a pre-trained model)"
                )
            report(
                model,
                dataset,
                self.test,
                self.out,
                cpu=self.cpu,
                class_agnostic=self.class_agnostic,
                engine=self.engine,
            )
            return
        self._results(dataset)

    def _results(self, dataset: CocoDataset) -> None:
        from sprompt.data.files import read_json
        from sprompt.engine.evaluate import coco_metrics

        assert self.results is not None
        results = read_json(runs.existing(self.results, "results", folder=False))
        if not isinstance(results, list):
            raise ValueError(f"{self.results}: must hold a list of COCO results, got a {type(results).__name__}")
        metrics = coco_metrics(
            dataset.ground_truth(), results, class_agnostic=self.class_agnostic, engine=self.engine
        ) | {"results": len(results)}
        runs.write_metrics(self.out, metrics)
        show(self.out, metrics)


def report(
    model: nn.Module,
    dataset: CocoDataset,
    test: Testing,
    out: Path,
    *,
    cpu: bool = False,
    quiet: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Evaluates a model into the run folder, and shows the numbers."""
    from sprompt.engine.evaluate import evaluate

    metrics = evaluate(model, dataset, out, cpu=cpu, progress=not quiet, **how, **dataclasses.asdict(test))
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
            print("AP of each class: " + json.dumps({name: round(100 * value, 1) for name, value in per_class.items()}))
        print(f"{out / runs.METRICS}")
