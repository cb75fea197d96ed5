"""The row of `benchmarks.programs` on open-world recall: from labels and a list of results to the numbers.

The time of both rivals grows with the number of pictures. There are few, because the other one takes a second for each.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.rivals import Program, Rivals
from sprompt.engine.evaluators.open_world import NUMBERS, OpenWorld, OpenWorldConfig
from sprompt.masks import Size
from sprompt.ops import pack_masks
from sprompt.testing.spec import blobs, random

Rows = list[dict[str, Any]]


class EveryCategory(COCOeval):  # type: ignore[misc]  # pycocotools has no types
    """COCO's evaluation, in which every category has all detections of a picture, as the released tool does it: it visits each
    category of each picture, and computes the IoUs of each category anew."""

    def _prepare(self) -> None:
        super()._prepare()
        of_picture = {image: found for (image, _), found in self._dts.items()}
        self._dts = defaultdict(list)
        for image in self.params.imgIds:
            for category in self.params.catIds:
                self._dts[image, category] = of_picture.get(image, [])


def recall(
    device: torch.device,
    *,
    pictures: int,
    size: Size = (480, 640),
    categories: int = 1203,
    present: int = 60,
    each: int = 12,
    best: int = 100,
) -> Rivals:
    """`present` of the categories have objects: `each` of them in a picture, with 2 objects. A detection is an object whose
    edge moved, or anything."""
    g = random(0)
    labels: Rows = []
    results: Rows = []
    for image in range(1, pictures + 1):
        objects = 2 * each
        soft = blobs(objects + best, *size, image)
        soft[objects : objects + objects] = soft[:objects] * (0.6 + 0.8 * torch.rand(objects, 1, 1, generator=g))
        masks = pack_masks(soft, 0.5)
        rles = [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in masks.rle()]
        own = (torch.randperm(present, generator=g)[:each] + 1).tolist() * 2
        for category, rle, area in zip(own, rles, masks.area().tolist(), strict=False):
            labels.append(
                {
                    "id": len(labels) + 1,
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": 0,
                    "area": area,
                    "segmentation": rle,
                }
            )
        for rle, score in zip(rles[objects:], torch.rand(best, generator=g).tolist(), strict=True):
            results.append({"image_id": image, "category_id": 1, "score": score, "segmentation": rle})
    truth = {
        "images": [{"id": i + 1, "file_name": "", "height": size[0], "width": size[1]} for i in range(pictures)],
        "categories": [{"id": i + 1, "name": f"{i}"} for i in range(categories)],
        "annotations": labels,
    }

    def ours() -> dict[str, Any]:
        return OpenWorld(OpenWorldConfig()).metrics(truth, results, class_agnostic=False)

    def released() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            ground = COCO()
            ground.dataset = truth | {"info": {}, "annotations": [dict(a) for a in labels]}
            ground.createIndex()
            judge = EveryCategory(ground, ground.loadRes([dict(r) for r in results]), "segm")
            judge.params.maxDets = [best]
            judge.evaluate()
            judge.accumulate()
        return judge.eval["recall"][..., 0]  # (thresholds, categories, ranges)

    def check() -> str:
        metrics, expected = ours(), released()
        for place, name in enumerate(NUMBERS):
            there = expected[..., place][expected[..., place] > -1]
            wanted = float(there.mean()) if there.size else -1.0
            assert abs(metrics[name] - wanted) < 1e-12, f"{name} {metrics[name]!r}, released {wanted!r}"
        own = [category["AR100"] for category in metrics["per_category"].values()]
        assert np.allclose(own, [r for r in expected[..., 0].mean(0) if r >= 0], rtol=0, atol=1e-12), (
            "categories differ"
        )
        return f"{len(labels)} objects; AR100 {metrics['AR100']:.3f}; ours has the merged protocol too"

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "released": released}
    return Rivals(calls, check)


OPEN_WORLD = [
    Program(
        "Open-world recall",
        "10 of 480x640, 100 detections, 60 of 1203 categories",
        partial(recall, pictures=10),
        partial(recall, pictures=2, size=(60, 80), categories=9, present=5, each=3, best=12),
        {"time": 100},
        10,
    )
]
