"""Proposals as a COCO-style file, merged from parts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.masks import Size
from sprompt.methods.parts import PART_BYTES, compact, write_entries, written
from sprompt.methods.saliency_prompt.proposals import Proposals


def image_record(image_id: int, file_name: str, size: Size) -> dict[str, Any]:
    return {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}


def annotation_records(image_id: int, proposals: Proposals) -> list[dict[str, Any]]:
    """Annotations without ids; `merge` numbers them."""
    masks = proposals.masks
    return [
        {
            "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            "score": round(score, 6), "seed": seed,
        }
        for (x1, y1, x2, y2), area, rle, score, seed in zip(
            masks.boxes().tolist(), masks.area().tolist(), masks.rle(),
            proposals.scores.tolist(), proposals.seeds.tolist(), strict=True,
        )
    ]  # fmt: skip


def merge(parts: list[Path], out: Path, info: dict[str, Any]) -> None:
    """Writes the file of all parts, in order, with annotations numbered from 1. Only one part is in memory at a time."""
    skipped = [entry for part in parts for entry in read_json(part, PART_BYTES)["skipped"]]
    with written(out, parts[0].parent) as file:
        file.write(b'{"info":' + compact({**info, "skipped": skipped}) + b',\n"images":[')
        write_entries(file, (image for part in parts for image in read_json(part, PART_BYTES)["images"]))
        file.write(b'],\n"annotations":[')
        every = (annotation for part in parts for annotation in read_json(part, PART_BYTES)["annotations"])
        write_entries(file, ({"id": number, **annotation} for number, annotation in enumerate(every, start=1)))
        file.write(b'],\n"categories":[{"id":1,"name":"object"}]}\n')


def merge_vectors(parts: list[Path], out: Path) -> None:
    """Writes a safetensors file with "vectors" (n, D) float16 and "annotation_ids" (n,) int64, the annotation of each row.

    Each part holds a "vectors" of its own. Only one part is in memory at a time.
    """
    headers = [_header(part) for part in parts]
    rows = sum(shape[0] for _, shape in headers)
    width = max((shape[1] for _, shape in headers), default=0)
    size = 2 * rows * width
    text = compact(
        {
            "annotation_ids": {"dtype": "I64", "shape": [rows], "data_offsets": [0, 8 * rows]},
            "vectors": {"dtype": "F16", "shape": [rows, width], "data_offsets": [8 * rows, 8 * rows + size]},
        }
    )
    text += b" " * (-len(text) % 8)
    with written(out, parts[0].parent) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(b"".join(struct.pack("<q", number) for number in range(1, rows + 1)))
        for part, (start, (number, own)) in zip(parts, headers, strict=True):
            if number and own != width:
                raise DataError(f"{part}: vectors must have {width} channels as in the other parts, got {own}")
            with open(part, "rb") as source:
                source.seek(start)
                file.write(source.read(2 * number * own))


def _header(part: Path) -> tuple[int, tuple[int, int]]:
    """(offset of the data of a part in bytes, shape of its vectors)."""
    with open(part, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(min(length, 1 << 16)))["vectors"]
    rows, width = entry["shape"]
    return 8 + length, (rows, width)
