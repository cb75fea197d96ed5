"""The masks ops on their CUDA kernels (csrc/masks/masks_cuda.cu)."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.masks.op import lists, pixel_rows, rows


def pack_masks(a: Args, words: Tensor) -> None:
    native._C.cuda.pack_masks(stream(words), pixel_rows(a.masks), a.threshold, rows(words))


def unpack_masks(a: Args, dense: Tensor) -> None:
    native._C.cuda.unpack_masks(stream(dense), rows(a.words), rows(dense))


def mask_area(a: Args, area: Tensor) -> None:
    native._C.cuda.mask_area(stream(area), rows(a.words), area.view(-1))


def mask_boxes(a: Args, boxes: Tensor) -> None:
    native._C.cuda.mask_boxes(stream(boxes), rows(a.words), a.width, rows(boxes))


def window_masks(a: Args, out: Tensor) -> None:
    native._C.cuda.window_masks(stream(out), rows(a.words), *a[1:], rows(out))


def mask_iou(a: Args, iou: Tensor) -> None:
    x, y = lists(a.a), None if a.b is None else lists(a.b)
    areas = x.new_empty((x.shape[0], x.shape[1] + (0 if y is None else y.shape[1])), dtype=torch.int64)
    native._C.cuda.mask_iou(stream(iou), x, y, areas, lists(iou))
