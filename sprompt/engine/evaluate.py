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
    """The metrics of a file of COCO results, or of proposals, on a labelled dataset. Their "class_agnostic" says whether the classes of
    the results had no influence."""
    truth, results = dataset.ground_truth(), read_json(predictions)
    pooled = class_agnostic or evaluator.any_classes
    if isinstance(results, dict):
        if not pooled:
            raise ValueError(
                f"{predictions}: proposals have no classes; give --class-agnostic True, or --evaluator open-world"
            )
        results = proposals_as_results(results, truth, str(predictions))
    if not isinstance(results, list):
        raise ValueError(f"{predictions}: must hold a list of COCO results, got a {type(results).__name__}")
    metrics: dict[str, Any] = EVALUATORS.owner(evaluator)(evaluator).metrics(
        truth, results, class_agnostic=class_agnostic
    )
    return metrics | {"pictures": len(truth["images"]), "results": len(results), "class_agnostic": pooled}


def proposals_as_results(content: dict[str, Any], truth: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """The masks of `sprompt propose` as COCO results, all of the first category. A picture is that of the same file name in the ground
    truth; masks of other pictures are left out."""
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    category = truth["categories"][0]["id"]
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        results = [
            {
                "image_id": ids[names[mask["image_id"]]], "category_id": category, "segmentation": mask["segmentation"],
                "score": mask["score"],
            }
            for mask in content["annotations"]
            if names[mask["image_id"]] in ids
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: must hold a list of COCO results, or the proposals of `sprompt propose`, got a file without {error}"
        ) from None
    if not ids.keys() & set(names.values()):
        raise ValueError(f"{source}: must hold pictures of the labels, got none; the file names must be the same")
    return results
