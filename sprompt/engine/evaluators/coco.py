"""COCO's average precision and recall, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.table import Table

from sprompt.data.segmentation import outlines
from sprompt.engine.evaluators import results as checked
from sprompt.engine.evaluators.registry import EvaluatorConfig

Kind = Literal["segm", "bbox"]
Engine = Literal["pycocotools", "faster"]

#: Metrics for 100 results a picture. APs is for objects below 32² pixels, APm for objects from 32² to 96² pixels, APl for
#: larger objects.
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SHOWN = NUMBERS[:6]  # columns of a table that fits a terminal; the recall of all results is a further column


@dataclass(frozen=True)
class CocoConfig(EvaluatorConfig):
    """COCO's protocol."""

    engine: Engine = "pycocotools"
    """pycocotools, or faster for faster-coco-eval, which must be installed. Both give the same metrics."""
    max_results: int = 100
    """Largest number of results of a picture that count, at least 1; the best results count (LVIS: 300)."""

    def __post_init__(self) -> None:
        if self.max_results < 1:
            raise ValueError(f"CocoConfig: max_results must be at least 1, got {self.max_results}")


class Coco:
    """COCO metrics of masks, and of their boxes."""

    Config = CocoConfig

    def __init__(self, config: CocoConfig) -> None:
        self.config = config

    def metrics(
        self, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, class_agnostic: bool
    ) -> dict[str, Any]:
        """The metrics of the masks, and under "bbox" the metrics of their boxes; see `coco_metrics`. "APpooled" is the AP of
        the masks with pooled categories. It shows whether a low AP comes from bad masks or from wrong classes."""
        how: dict[str, Any] = {"engine": self.config.engine, "max_results": self.config.max_results}
        metrics = coco_metrics(truth, results, class_agnostic=class_agnostic, **how)
        metrics["bbox"] = coco_metrics(truth, results, kind="bbox", class_agnostic=class_agnostic, **how)
        if not class_agnostic:
            several = len(truth["categories"]) > 1
            pooled = coco_metrics(truth, results, class_agnostic=True, **how) if several else metrics
            metrics["APpooled"] = pooled["AP"]
        return metrics

    def table(self, metrics: Mapping[str, Any]) -> Table:
        return metrics_table({"masks": metrics, "boxes": metrics["bbox"]})


def coco_metrics(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    kind: Kind = "segm",
    class_agnostic: bool = False,
    engine: Engine = "pycocotools",
    max_results: int = 100,
) -> dict[str, Any]:
    """Compares COCO results with a COCO ground truth. Returns `NUMBERS`, and "per_class": {name: AP}, all between 0 and 1.

    A metric is −1 if the ground truth has no object that it measures, as in pycocotools. Without results it is 0. The area of a
    mask decides whether it is small, medium or large. (pycocotools itself takes the area of `bbox` if a results file has it.)

    Args:
        truth: the content of a COCO file.
        results: records of image_id, category_id, score and segmentation (RLE). For kind "bbox" they have bbox; if it is
            missing, the box of the mask is taken.
        kind: compare masks (segm) or boxes (bbox).
        class_agnostic: a result of any category matches a label of any category (COCO's useCats=0).
        engine: "faster" is faster-coco-eval, which must be installed. Both engines give the same metrics.
        max_results: largest number of results of a picture that count; the best results count. "AR<max_results>" is the recall
            of all results that count.
    """
    if kind not in ("segm", "bbox"):
        raise ValueError(f"coco_metrics: kind must be segm or bbox, got {kind!r}")
    coco, judge = _engine(engine)
    images = [dict(image) for image in truth["images"]]
    categories = [dict(category) for category in truth["categories"]]
    annotations = [dict(annotation) for annotation in truth["annotations"]]  # pycocotools writes into them
    if kind == "segm":
        _check_polygons(annotations, checked.sizes(truth))
    found = _detections(truth, results, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = judge(
            _indexed(coco, images, categories, annotations), _indexed(coco, images, categories, found), kind
        )
        evaluation.params.maxDets = _numbers_of_results(max_results)
        evaluation.params.useCats = int(not class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
    return _numbers(evaluation, categories, class_agnostic)


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of the metrics of each named row, in per cent. A dash stands for a metric of -1."""
    table = Table()
    table.add_column("")
    shown = (*SHOWN, *(n for n in next(iter(rows.values()), {}) if n.startswith("AR") and n[2:].isdecimal()))
    shown = (*SHOWN, *shown[-1:]) if len(shown) > len(SHOWN) else SHOWN
    for name in shown:
        table.add_column(name, justify="right")
    for title, metrics in rows.items():
        table.add_row(title, *(f"{100 * metrics[n]:.1f}" if metrics[n] >= 0 else "–" for n in shown))
    return table


def _engine(name: str) -> tuple[Any, Any]:
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    if name == "faster":
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError:
            raise ValueError(
                "engine: faster needs faster-coco-eval, which is not installed; type `pip install faster-coco-eval`"
            ) from None
        return COCO, COCOeval_faster
    raise ValueError(f"engine: must be pycocotools or faster, got {name!r}")


def _check_polygons(annotations: Sequence[Mapping[str, Any]], sizes: checked.Sizes) -> None:
    """Raises DataError for polygons that are broken or lie far outside their picture. pycocotools would walk along their edges."""
    for a in annotations:
        if isinstance(a.get("segmentation"), list) and a["image_id"] in sizes:
            outlines(a["segmentation"], sizes[a["image_id"]], f"labels: annotation {a.get('file_id', a['id'])}")


def _indexed(coco: Any, images: list[Any], categories: list[Any], annotations: list[Any]) -> Any:
    index = coco()
    index.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    index.createIndex()
    return index


def _detections(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """Results as annotations, numbered from 1. Their area is that of the mask for kind "segm", and that of the box for kind
    "bbox".
    """
    sizes = checked.sizes(truth)
    known = {category["id"] for category in truth["categories"]}
    detections: list[dict[str, Any]] = []
    masks: dict[Any, list[dict[str, Any]]] = {}  # detections with a mask, by picture
    for place, result in enumerate(results):
        with checked.record(place):
            category, score, image = result["category_id"], float(result["score"]), checked.picture_of(result, sizes)
            if category not in known:
                raise ValueError(
                    f"category_id must be an id of the ground truth, got {category}; give results of a model with its classes"
                )
            found = {"id": place + 1, "image_id": image, "category_id": category, "score": score, "iscrowd": 0}
            if kind == "bbox" and result.get("bbox") is not None:
                x, y, width, height = map(float, result["bbox"])
                found |= {"bbox": [x, y, width, height], "area": width * height}
            else:
                found["segmentation"] = checked.rle_of(result, sizes[image], image)
                masks.setdefault(image, []).append(found)
        detections.append(found)
    for image, own in masks.items():
        decoded = checked.decoded([found["segmentation"] for found in own], sizes[image], image, own[0]["id"] - 1)
        for found, area, (x1, y1, x2, y2) in zip(own, decoded.area().tolist(), decoded.boxes().tolist(), strict=True):
            found |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area if kind == "segm" else (x2 - x1) * (y2 - y1)}
            if kind == "bbox":
                del found["segmentation"]
    return detections


def _numbers(evaluation: Any, categories: list[Any], class_agnostic: bool) -> dict[str, Any]:
    """The metrics, from the arrays precision (IoU, recall, class, size, number of results) and recall (IoU, class, size,
    number of results)."""
    precision, recall = np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])
    metrics: dict[str, Any] = {"AP": _mean(precision[:, :, :, 0, -1])}
    metrics["AP50"], metrics["AP75"] = (_mean(precision[place, :, :, 0, -1]) for place in (0, 5))
    for place, size in enumerate("sml", 1):
        metrics[f"AP{size}"] = _mean(precision[:, :, :, place, -1])
    for place, number in enumerate(evaluation.params.maxDets):
        metrics[f"AR{number}"] = _mean(recall[:, :, 0, place])
    for place, size in enumerate("sml", 1):
        metrics[f"AR{size}"] = _mean(recall[:, :, place, -1])
    if not class_agnostic:
        count = Counter(category["name"] for category in categories)
        names = {c["id"]: c["name"] if count[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}
        metrics["per_class"] = {
            names[own]: _mean(precision[:, :, place, 0, -1]) for place, own in enumerate(evaluation.params.catIds)
        }
    return metrics


def _numbers_of_results(most: int) -> list[int]:
    """The three numbers of results for which pycocotools computes the recall: 1, 10 and `most`, none of them above `most`."""
    return [min(1, most), min(10, most), most]


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0
