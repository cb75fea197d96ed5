"""Mask Auto-Labeler in eager PyTorch and NumPy, written as in the released code: a rival in `benchmarks.programs`.

It runs on the parameters of a `sprompt.nn.mask_labeler.MaskLabeler`. It differs from this library in these points:

- attention makes the matrix of all pairs of tokens;
- a map is resized before the convolutions of the pixel head;
- the refinement unfolds its state in every iteration, on the whole map;
- losses are dense, and the teacher follows weight by weight;
- each label decodes its picture again, and is a float picture that pycocotools encodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sprompt.data.boxes import Box
from sprompt.data.colour import normalised
from sprompt.data.pictures import read_picture
from sprompt.methods.auto_labeler.config import AutoLabelerConfig
from sprompt.methods.auto_labeler.samples import LABEL_MARGINS, CropBatch, Window, window_of
from sprompt.nn.mask_labeler import FACTORS, MASK_STRIDE, MaskLabeler, size_class
from sprompt.nn.vit import Attention, Vit, resized_positions
from sprompt.testing.specs.mean_field import unfolding

# -- the network


def encoded(encoder: nn.Module, crops: Tensor) -> Tensor:
    """The map (B, D, S/16, S/16). An encoder that is no Vit holds given maps."""
    if not isinstance(encoder, Vit):
        return encoder(crops)[-1]
    patches = encoder.patch_embed(crops)
    height, width = patches.shape[2:]
    x = torch.cat((encoder.cls_token.expand(len(crops), -1, -1), patches.flatten(2).mT), 1)
    x = x + resized_positions(encoder.pos_embed, height, width)
    block: Any  # a Block, which a ModuleList does not say
    for block in encoder.blocks:
        x = x + attended(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[:, 1:].mT.unflatten(2, (height, width))


def attended(attention: Attention, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    parts = attention.qkv(x).view(batch, tokens, 3, attention.heads, width // attention.heads).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    pairs = (query @ key.mT * query.shape[3] ** -0.5).softmax(3)
    return attention.proj((pairs @ value).transpose(1, 2).reshape(batch, tokens, width))


def mask_logits(network: MaskLabeler, crops: Tensor, classes: Sequence[int]) -> Tensor:
    """(B, S/4, S/4)."""
    features, side = encoded(network.backbone, crops), crops.shape[2] // MASK_STRIDE
    objects = network.instance_head(features.mean((2, 3)))
    kinds = torch.tensor(classes, device=crops.device)
    found = features.new_zeros(len(crops), side, side)
    for kind, factor in enumerate(FACTORS):
        own = kinds == kind
        if not own.any():
            continue
        x = interpolate(features[own], scale_factor=factor, mode="bilinear")
        for conv in network.pixel_head.before:
            x = conv(x).relu()
        x = network.pixel_head.after(interpolate(x, scale_factor=2.0, mode="bilinear")).relu()
        product = (objects[own, :, None, None] * x).sum(1, keepdim=True)
        found[own] = interpolate(product, size=(side, side), mode="bilinear")[:, 0]
    return found


# -- training


def losses(config: AutoLabelerConfig, batch: CropBatch, logits: Tensor, taught: Tensor) -> dict[str, Tensor]:
    """The two terms with their full weights, from the logits of student and teacher."""
    masks = logits.sigmoid()
    with torch.no_grad():
        colours = interpolate(batch.student, size=masks.shape[1:], mode="bilinear")
        refined = (unfolding(colours, (masks + taught.sigmoid()) / 2, batch.boxes) > 0.5).float()
    projections = sum(dice(masks.max(axis).values, batch.boxes.max(axis).values) for axis in (1, 2))
    return {
        "mil": config.mil_weight * projections.mean(),
        "crf": config.crf_weight * dice(masks.flatten(1), refined.flatten(1)).mean(),
    }


def dice(masks: Tensor, targets: Tensor) -> Tensor:
    return 1 - 2 * (masks * targets).sum(1) / ((masks**2).sum(1) + (targets**2).sum(1) + 0.002)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.copy_(momentum * old + (1 - momentum) * new)


# -- labels


@torch.no_grad()
def float_pictures(
    network: MaskLabeler, path: Path, boxes: Sequence[Box], side: int, batch: int
) -> Iterator[np.ndarray]:
    """The probabilities (H, W) of each object, float64 pictures."""
    for start in range(0, len(boxes), batch):
        own = boxes[start : start + batch]
        read = [crop(read_picture(path), box, side) for box in own]
        images = normalised(torch.stack([image for _, image, _ in read]).float() / 255)
        logits = mask_logits(network, images, [size_class(box.area) for box in own])
        soft = interpolate(logits[:, None], size=(side, side), mode="bilinear")[:, 0].sigmoid()
        soft = soft * torch.stack([mask for _, _, mask in read])
        height, width = read_picture(path).shape[1:]
        for (window, _, _), map_ in zip(read, soft, strict=True):
            size = (window.y2 - window.y1, window.x2 - window.x1)
            part = interpolate(map_[None, None], size=size, mode="bilinear")[0, 0].numpy()
            picture = np.zeros((height, width))
            y1, x1, y2, x2 = max(0, window.y1), max(0, window.x1), min(height, window.y2), min(width, window.x2)
            picture[y1:y2, x1:x2] = part[y1 - window.y1 : y2 - window.y1, x1 - window.x1 : x2 - window.x1]
            yield picture


def crop(image: Tensor, box: Box, side: int) -> tuple[Window, Tensor, Tensor]:
    """The window of a box, its pixels (3, side, side) uint8, and the mask of the box there (side, side) uint8."""
    _, height, width = image.shape
    window = window_of(box, LABEL_MARGINS)
    rows, columns = np.arange(window.y1, window.y2), np.arange(window.x1, window.x2)
    pixels = image.permute(1, 2, 0).numpy()[np.ix_(rows % height, columns % width)]
    mask = np.zeros((height, width), np.uint8)
    mask[int(box.y1) : int(box.y2) + 1, int(box.x1) : int(box.x2) + 1] = 1
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    mask = np.where(inside, mask[np.ix_(rows % height, columns % width)], 0).astype(np.uint8)
    resized = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in (pixels, mask)]
    small, small_mask = (torch.from_numpy(np.array(each)) for each in resized)
    return window, small.permute(2, 0, 1), small_mask


def labels(
    network: MaskLabeler, path: Path, boxes: Sequence[Box], side: int, batch: int, threshold: float
) -> list[dict[str, Any]]:
    """RLEs."""
    from pycocotools import mask as coco

    return [
        coco.encode(np.asfortranarray((picture > threshold).astype(np.uint8)))
        for picture in float_pictures(network, path, boxes, side, batch)
    ]
