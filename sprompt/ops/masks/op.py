"""The declarations of the masks ops. Words are int32 (..., n); kernels read them as rows."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op

#: dtypes that the compiled kernels of pack_masks read without conversion.
PACKED = (torch.bool, torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16)


def rows(x: Tensor) -> Tensor:
    """(..., n) -> (R, n), contiguous. A contiguous tensor gives a view."""
    if x.dim() == 2 and x.is_contiguous():
        return x
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)


def pixel_rows(masks: Tensor) -> Tensor:
    """(..., H, W) -> (R, P) in a dtype of PACKED. float64 never gets here, because it runs on the reference."""
    return rows((masks if masks.dtype in PACKED else masks != 0).flatten(-2))


def lists(x: Tensor) -> Tensor:
    """(..., N, n) -> (B, N, n), contiguous. A contiguous tensor gives a view."""
    if x.dim() == 3 and x.is_contiguous():
        return x
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).contiguous()


@op("cuda")
def pack_masks(masks: Tensor, threshold: float) -> Tensor:
    return new(masks, *masks.shape[:-2], words_for(masks.shape[-2] * masks.shape[-1]), dtype=torch.int32)


@op("cuda")
def unpack_masks(words: Tensor, pixels: int) -> Tensor:
    return new(words, *words.shape[:-1], pixels, dtype=torch.bool)


@op("cuda")
def mask_area(words: Tensor) -> Tensor:
    return new(words, *words.shape[:-1], dtype=torch.int64)


@op("cuda")
def mask_boxes(words: Tensor, height: int, width: int) -> Tensor:
    return new(words, *words.shape[:-1], 4, dtype=torch.int64)


@op("cuda")
def window_masks(
    words: Tensor, height: int, width: int, top: int, left: int, out_height: int, out_width: int, flip: bool
) -> Tensor:
    """The window of out_height x out_width pixels at (top, left). It is 0 outside of the masks. `flip` mirrors its columns."""
    return new(words, *words.shape[:-1], words_for(out_height * out_width), dtype=torch.int32)


@op("cuda")
def mask_iou(a: Tensor, b: Tensor | None, width: int, double: bool) -> Tensor:
    """a (..., N, n), b (..., M, n) -> (..., N, M) in float32, or in float64 if `double`. If b is None, a is used for it."""
    return new(a, *a.shape[:-1], (a if b is None else b).shape[-2], dtype=torch.float64 if double else torch.float32)


# -- CPU kernels

pack_masks.native(lambda a, out: native._C.pack_masks(pixel_rows(a.masks), a.threshold, rows(out), native.threads()))
unpack_masks.native(lambda a, out: native._C.unpack_masks(rows(a.words), rows(out), native.threads()))
mask_area.native(lambda a, out: native._C.mask_area(rows(a.words), out.view(-1), native.threads()))
mask_boxes.native(lambda a, out: native._C.mask_boxes(rows(a.words), a.width, rows(out), native.threads()))
window_masks.native(lambda a, out: native._C.window_masks(rows(a.words), *a[1:], rows(out), native.threads()))


@mask_iou.native
def _(a: Args, iou: Tensor) -> None:
    native._C.mask_iou(lists(a.a), None if a.b is None else lists(a.b), a.width, lists(iou), native.threads())
