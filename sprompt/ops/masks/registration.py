"""Fake kernels and backends of the masks ops."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.library import register_op
from sprompt.ops.masks import reference

#: dtypes that the compiled packs read as they are.
PACKED = (torch.bool, torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16)


def rows(x: Tensor) -> Tensor:
    """(..., n) -> (R, n) with last stride 1."""
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)


def _pack_masks(masks: Tensor, threshold: float) -> Tensor:
    pixels = masks.flatten(-2)
    if pixels.dtype not in PACKED:
        pixels = pixels > threshold if pixels.is_floating_point() else pixels != 0
    words = masks.new_empty((*pixels.shape[:-1], words_for(pixels.shape[-1])), dtype=torch.int32)
    native._C.pack_masks(rows(pixels), threshold, rows(words), native.threads())
    return words


def _pack_masks_fake(masks: Tensor, threshold: float) -> Tensor:
    return masks.new_empty((*masks.shape[:-2], words_for(masks.shape[-2] * masks.shape[-1])), dtype=torch.int32)


def _unpack_masks(words: Tensor, pixels: int) -> Tensor:
    dense = words.new_empty((*words.shape[:-1], pixels), dtype=torch.bool)
    native._C.unpack_masks(rows(words), rows(dense), native.threads())
    return dense


def _unpack_masks_fake(words: Tensor, pixels: int) -> Tensor:
    return words.new_empty((*words.shape[:-1], pixels), dtype=torch.bool)


def _mask_area(words: Tensor) -> Tensor:
    area = words.new_empty(words.shape[:-1], dtype=torch.int64)
    native._C.mask_area(rows(words), area.reshape(-1), native.threads())
    return area


def _mask_area_fake(words: Tensor) -> Tensor:
    return words.new_empty(words.shape[:-1], dtype=torch.int64)


def _mask_boxes(words: Tensor, height: int, width: int) -> Tensor:
    boxes = words.new_empty((*words.shape[:-1], 4), dtype=torch.int64)
    native._C.mask_boxes(rows(words), width, rows(boxes), native.threads())
    return boxes


def _mask_boxes_fake(words: Tensor, height: int, width: int) -> Tensor:
    return words.new_empty((*words.shape[:-1], 4), dtype=torch.int64)


def _mask_iou(a: Tensor, b: Tensor | None, width: int) -> Tensor:
    batch = a.shape[:-2].numel()
    flat_a = a.reshape(batch, *a.shape[-2:]).contiguous()
    flat_b = None if b is None else b.reshape(batch, *b.shape[-2:]).contiguous()
    columns = (a if b is None else b).shape[-2]
    iou = a.new_empty((*a.shape[:-1], columns), dtype=torch.float32)
    extents = a.new_empty((batch, a.shape[-2] + (0 if b is None else columns), 5), dtype=torch.int64)
    native._C.mask_iou(flat_a, flat_b, width, extents, iou.view(batch, a.shape[-2], columns), native.threads())
    return iou


def _mask_iou_fake(a: Tensor, b: Tensor | None, width: int) -> Tensor:
    return a.new_empty((*a.shape[:-1], (a if b is None else b).shape[-2]), dtype=torch.float32)


def _window_masks(
    words: Tensor, height: int, width: int, top: int, left: int, out_height: int, out_width: int, flip: bool
) -> Tensor:
    out = words.new_empty((*words.shape[:-1], words_for(out_height * out_width)), dtype=torch.int32)
    native._C.window_masks(
        rows(words), height, width, top, left, out_height, out_width, flip, rows(out), native.threads()
    )
    return out


def _window_masks_fake(
    words: Tensor, height: int, width: int, top: int, left: int, out_height: int, out_width: int, flip: bool
) -> Tensor:
    return words.new_empty((*words.shape[:-1], words_for(out_height * out_width)), dtype=torch.int32)


register_op("pack_masks", fake=_pack_masks_fake, reference=reference.pack_masks, native_kernel=_pack_masks, gpu="cuda")
register_op(
    "unpack_masks", fake=_unpack_masks_fake, reference=reference.unpack_masks, native_kernel=_unpack_masks, gpu="cuda"
)
register_op("mask_area", fake=_mask_area_fake, reference=reference.mask_area, native_kernel=_mask_area, gpu="cuda")
register_op("mask_boxes", fake=_mask_boxes_fake, reference=reference.mask_boxes, native_kernel=_mask_boxes, gpu="cuda")
register_op("mask_iou", fake=_mask_iou_fake, reference=reference.mask_iou, native_kernel=_mask_iou, gpu="cuda")
register_op(
    "window_masks", fake=_window_masks_fake, reference=reference.window_masks, native_kernel=_window_masks, gpu="cuda"
)
