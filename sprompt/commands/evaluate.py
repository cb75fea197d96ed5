"""`sprompt evaluate`: metrics of a model on labelled pictures."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from sprompt.commands import run_folder
from sprompt.commands.labelled_data import LabelledData
from sprompt.commands.prediction import Prediction
from sprompt.data.coco import CocoDataset
from sprompt.engine.evaluators.coco import CocoConfig
from sprompt.engine.evaluators.registry import EVALUATORS, EvaluatorConfig
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import ModelConfig
from sprompt.nn.distributed import is_first


@dataclasses.dataclass
class Evaluate:
    """Measures a model on labelled pictures: AP and AR of its masks and their boxes, by pycocotools. --evaluator open-world
    measures the recall of masks without classes, for groups of categories.

    Writes OUT/predictions.json (COCO results) and OUT/metrics.json. With --results it measures a file of COCO results instead
    of a model.
    """

    data: LabelledData = dataclasses.field(default_factory=lambda: LabelledData(split="val"))
    """Pictures to measure on."""
    checkpoint: Path | None = None
    """Trained model: a run folder, or a file."""
    results: Path | None = None
    """File of COCO results, or of proposals, to measure instead of a model. Proposals have no classes: give --class-agnostic True,
    or --evaluator open-world."""
    out: Path = Path("runs/evaluate")
    """Run folder."""
    class_agnostic: bool = False
    """Pool the categories: an object matches a label of any class. A model of `pretrain` needs it."""
    cpu: bool = False
    """Do not use a GPU."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network in --checkpoint. Give it only if the file does not name its network, such as an official release."""
    test: Prediction = dataclasses.field(default_factory=Prediction)
    """Settings of the prediction."""
    evaluator: EvaluatorConfig = dataclasses.field(default_factory=CocoConfig)
    """Comparison of predictions with labels."""

    def run(self) -> None:
        from sprompt.engine.trained import load

        if (self.checkpoint is None) == (self.results is None):
            raise ValueError("--checkpoint: give either a trained model or --results")
        if self.evaluator.any_classes and self.class_agnostic:
            raise ValueError("--class-agnostic: must be left out; this evaluator never looks at the classes of results")
        if self.checkpoint is None:
            self._results(self.data.open("data", keep_empty=True))
            return
        trained = load(self.checkpoint, self.model, "cpu")
        run_folder.say(trained.about)
        number = len(trained.names)
        dataset = self.data.open("data", keep_empty=True, class_agnostic=self.class_agnostic and number == 1)
        if not self.evaluator.any_classes:
            self._check_classes(trained.classes or dataset.classes, dataset.classes, number)
        self.evaluator.check(dataset.categories)
        run_folder.say_lost(dataset)
        with run_folder.begun(self.out, self) as text:
            report(
                trained.model, dataset, self.out, self.test.sized(trained.size), evaluator=self.evaluator,
                class_agnostic=self.class_agnostic, cpu=self.cpu,
            )  # fmt: skip
            run_folder.write_config(self.out, text)

    def _check_classes(self, own: list[str], wanted: list[str], number: int) -> None:
        if number == len(wanted) and own == wanted:
            return
        if number == 1 != len(wanted):
            advice = "--class-agnostic True pools the classes of the data"
        else:
            advice = "the order counts: classes are sorted by category id"
        raise ValueError(f"--checkpoint: must have the classes of the data, {wanted}, got {own}; {advice}")

    def _results(self, dataset: CocoDataset) -> None:
        from sprompt.engine.evaluate import compare

        assert self.results is not None
        results = run_folder.existing(self.results, "results", folder=False)
        run_folder.say_lost(dataset)
        with run_folder.begun(self.out, self) as text:
            metrics = compare(dataset, results, self.evaluator, class_agnostic=self.class_agnostic)
            run_folder.write_metrics(self.out, metrics)
            run_folder.write_config(self.out, text)
            show(self.out, metrics, self.evaluator)


def report(
    model: nn.Module, dataset: CocoDataset, out: Path, test: dict[str, Any], *, evaluator: EvaluatorConfig, cpu: bool = False,
    quiet: bool = False, class_agnostic: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a model and writes the results into the run folder. Prints the metrics unless `quiet`."""
    from sprompt.engine.evaluate import evaluate

    metrics = evaluate(
        model, dataset, out, evaluator=evaluator, class_agnostic=class_agnostic, cpu=cpu, progress=not quiet, **test
    )
    if not quiet:
        show(out, metrics, evaluator)
    return metrics


def show(out: Path, metrics: dict[str, Any], evaluator: EvaluatorConfig) -> None:
    """Prints the evaluator's table, and the AP of each class if there are 2 to 20 classes."""
    from rich.console import Console

    if not is_first():
        return
    Console().print(EVALUATORS.owner(evaluator)(evaluator).table(metrics))
    per_class = metrics.get("per_class", {})
    if 1 < len(per_class) <= 20:
        print(
            "AP of each class: " + ", ".join(f"{n} {100 * v:.1f}" if v >= 0 else f"{n} –" for n, v in per_class.items())
        )
    print(f"{out / run_folder.METRICS}")
