"""A small data set on disk: four pictures, labels, proposals, predictions, two runs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sprompt.masks import BitMasks
from sprompt.report.prompts import Matches


@dataclass
class Disk:
    images: Path
    labels: Path
    proposals: Path
    predictions: Path
    runs: list[Path]
    matches: list[Matches]


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def block(size: tuple[int, int], x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return rle(mask)


def dump(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


SIZES = {1: (40, 64), 2: (64, 40), 3: (48, 48), 7: (40, 64)}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i, (h, w) in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(images / f"p{i}.png")
    pictures = [{"id": i, "file_name": f"p{i}.png", "height": h, "width": w} for i, (h, w) in SIZES.items()]
    categories = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]

    def one(n: int, image: int, place: tuple[int, int, int, int], category: int, **more: Any) -> dict[str, Any]:
        return {"id": n, "image_id": image, "category_id": category, "iscrowd": 0,
                "segmentation": block(SIZES[image], *place), **more}  # fmt: skip

    labels = [one(1, 1, (4, 4, 20, 20), 3), one(2, 1, (30, 10, 60, 30), 5), one(3, 2, (5, 5, 30, 30), 3)]
    predictions = [
        one(1, 1, (4, 4, 20, 19), 3, score=0.9),  # found
        one(2, 1, (30, 10, 60, 30), 3, score=0.8),  # right place, wrong class: false, and the dog is missed
        one(3, 2, (6, 5, 30, 30), 3, score=0.7),  # found
        one(4, 3, (6, 5, 30, 30), 3, score=0.05),  # false, with a much lower score
    ]
    info = {"proposals": {"version": 1, "short": 80, "long": 160, "stride": 32, "seeds": "pyramid", "level": "C5"}}
    proposals = [
        one(1, 1, (4, 4, 20, 20), 1, score=0.95, seed=[0, 0, 1]),
        one(2, 2, (5, 5, 30, 30), 1, score=0.8, seed=[0, 1, 0]),
    ]
    runs = []
    for n in range(2):
        run = tmp_path / "runs" / f"run{n}"
        run.mkdir(parents=True)
        lines = [
            {"step": s, "epoch": s // 10, "loss": 5 * math.exp(-s / 20) + n, "stage0/dice": 1.0 / s, "lr": 1e-4}
            for s in range(1, 61)
        ]
        lines[10]["loss"] = None
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
        dump(run / "metrics.json", {"segm": {"AP": 0.25 + n / 10, "APs": -1.0}, "pictures": 4})
        (run / "config.yaml").write_text(f"model: {{kernels: 100}}\nmethod: {{assign: {['cosine', 'none'][n]}}}\n")
        runs.append(run)
    labels_file = {"images": pictures, "categories": categories, "annotations": labels}
    proposal_file = {
        "images": pictures,
        "categories": [{"id": 1, "name": "object"}],
        "annotations": proposals,
        "info": info,
    }
    return Disk(
        images,
        dump(tmp_path / "labels.json", labels_file),
        dump(tmp_path / "proposals.json", proposal_file),
        dump(tmp_path / "predictions.json", predictions),
        runs,
        [
            Matches(
                "p1.png",
                Image.new("RGB", (64, 40)),
                BitMasks.from_rle([a["segmentation"] for a in labels[:2]]),
                [0, 1, 1, -1, 1],
            )
        ],
    )
