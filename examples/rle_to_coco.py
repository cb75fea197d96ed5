"""Masks to COCO JSON and back, and their areas by pycocotools from the same file."""

import json

import torch
from pycocotools import mask as coco

from sprompt import BitMasks
from sprompt.ops import rle_decode, rle_encode

y, x = torch.arange(120)[:, None], torch.arange(160)
masks = BitMasks.from_dense(torch.stack([(y - 60) ** 2 + (x - 40 * k) ** 2 < (15 * k) ** 2 for k in (1, 2, 3)]))

annotations = []
for number, (rle, area, (x1, y1, x2, y2)) in enumerate(
    zip(rle_encode(masks), masks.area().tolist(), masks.boxes().tolist(), strict=True), start=1
):
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}  # JSON holds text
    annotations.append(
        {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": area, "bbox": [x1, y1, x2 - x1, y2 - y1],
         "segmentation": segmentation}
    )  # fmt: skip
text = json.dumps({"annotations": annotations})
print(text[:160], "...")

back = rle_decode([annotation["segmentation"] for annotation in json.loads(text)["annotations"]])
assert torch.equal(back.words, masks.words)
assert coco.area([annotation["segmentation"] for annotation in annotations]).tolist() == masks.area().tolist()
print(f"{len(annotations)} masks, the same after the round trip, the same areas in pycocotools")
