"""Evaluation of a model on labelled pictures: its predictions, and their comparison with the labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from torch import nn

from sprompt.atomic import atomic_write
from sprompt.data.reading import read_json
from sprompt.engine.evaluators.coco import CocoConfig
from sprompt.engine.evaluators.registry import EVALUATORS, EvaluatorConfig
from sprompt.engine.predict import predict_to_file
from sprompt.engine.processes import processes
from sprompt.models.protocol import QueryModel
from sprompt.nn.distributed import is_first


def evaluate(
    model: nn.Module,
    dataset: Any,
    out: Path,
    *,
    evaluator: EvaluatorConfig | None = None,
    class_agnostic: bool = False,
    cpu: bool = False,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Writes predictions of a labelled dataset to out/predictions.json, compares them with the labels, and writes
    out/metrics.json.

    Args:
        dataset: a CocoDataset with `keep_empty`, so that pictures without objects count too.
        evaluator: settings of the comparison; None: COCO's protocol.
        class_agnostic: pool the categories.
        settings: arguments of `sprompt.engine.predict.predict`.

    Returns: the metrics, in every process. A picture that cannot be read raises DataError, because metrics without it are not
    comparable with other metrics.
    """
    path = out / "predictions.json"
    evaluator = evaluator or CocoConfig()
    ids = range(1, cast(QueryModel, model).num_classes + 1) if evaluator.any_classes else dataset.category_ids
    predict_to_file(model, dataset, path, ids, cpu=cpu, progress=progress, **settings)
    state = processes(cpu)
    metrics: dict[str, Any] | None = None
    if is_first():
        metrics = compare(dataset, path, evaluator, class_agnostic=class_agnostic)
        atomic_write(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    if state.num_processes > 1:
        (metrics,) = broadcast_object_list([metrics])
    assert metrics is not None
    return metrics


def compare(dataset: Any, predictions: Path, evaluator: EvaluatorConfig, *, class_agnostic: bool) -> dict[str, Any]:
    """The metrics of a file of COCO results on a labelled dataset. Their "class_agnostic" says whether the classes of the results had
    no influence."""
    truth, results = dataset.ground_truth(), read_json(predictions)
    if not isinstance(results, list):
        raise ValueError(f"{predictions}: must hold a list of COCO results, got a {type(results).__name__}")
    metrics: dict[str, Any] = EVALUATORS.owner(evaluator)(evaluator).metrics(
        truth, results, class_agnostic=class_agnostic
    )
    pooled = class_agnostic or evaluator.any_classes
    return metrics | {"pictures": len(truth["images"]), "results": len(results), "class_agnostic": pooled}
