"""The masks ops on their CUDA kernels (csrc/masks/masks_cuda.cu)."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.masks import words_for
from sprompt.ops.masks.registration import PACKED, rows


def pack_masks(masks: Tensor, threshold: float) -> Tensor:
    pixels = masks.flatten(-2)
    if pixels.dtype not in PACKED:
        pixels = pixels > threshold if pixels.is_floating_point() else pixels != 0
    words = masks.new_empty((*pixels.shape[:-1], words_for(pixels.shape[-1])), dtype=torch.int32)
    native._C.cuda.pack_masks(stream(masks), rows(pixels), threshold, rows(words))
    return words


def unpack_masks(words: Tensor, pixels: int) -> Tensor:
    dense = words.new_empty((*words.shape[:-1], pixels), dtype=torch.bool)
    native._C.cuda.unpack_masks(stream(words), rows(words), rows(dense))
    return dense


def mask_area(words: Tensor) -> Tensor:
    area = words.new_empty(words.shape[:-1], dtype=torch.int64)
    native._C.cuda.mask_area(stream(words), rows(words), area.reshape(-1))
    return area


def mask_boxes(words: Tensor, height: int, width: int) -> Tensor:
    boxes = words.new_empty((*words.shape[:-1], 4), dtype=torch.int64)
    native._C.cuda.mask_boxes(stream(words), rows(words), width, rows(boxes))
    return boxes


def mask_iou(a: Tensor, b: Tensor | None, width: int) -> Tensor:
    batch = a.shape[:-2].numel()
    flat_a = a.reshape(batch, *a.shape[-2:]).contiguous()
    flat_b = None if b is None else b.reshape(batch, *b.shape[-2:]).contiguous()
    columns = (a if b is None else b).shape[-2]
    iou = a.new_empty((*a.shape[:-1], columns), dtype=torch.float32)
    areas = a.new_empty((batch, a.shape[-2] + (0 if b is None else columns)), dtype=torch.int64)
    native._C.cuda.mask_iou(stream(a), flat_a, flat_b, areas, iou.view(batch, a.shape[-2], columns))
    return iou


def window_masks(
    words: Tensor, height: int, width: int, top: int, left: int, out_height: int, out_width: int, flip: bool
) -> Tensor:
    out = words.new_empty((*words.shape[:-1], words_for(out_height * out_width)), dtype=torch.int32)
    native._C.cuda.window_masks(
        stream(words), rows(words), height, width, top, left, out_height, out_width, flip, rows(out)
    )
    return out
