"""Masks as bits: pack them, query them, compare them."""

import torch

from sprompt import BitMasks
from sprompt.ops import mask_iou

generator = torch.Generator().manual_seed(0)
centre = torch.rand(2, 100, 1, 1, generator=generator) * 400
y, x = torch.arange(480)[:, None], torch.arange(640)
discs = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 90**2  # (100, 480, 640) bool

masks = BitMasks.from_dense(discs)
print(
    f"{discs.nbytes / 2**20:.1f} MiB of bool are {masks.words.nbytes / 2**20:.1f} MiB of bits (float32: {discs.nbytes / 2**18:.0f} MiB)"
)
print("areas of the first three:", masks[:3].area().tolist(), "boxes:", masks[:3].boxes().tolist())

iou = mask_iou(masks)  # (100, 100)
overlap = iou.fill_diagonal_(0).max()
print(f"the two that overlap most have IoU {overlap:.3f}")

mirrored = masks.flip().crop(0, 0, 480, 320)
print("mirrored, left half:", mirrored, "areas:", mirrored[:3].area().tolist())
assert torch.equal(masks.to_dense(), discs)
