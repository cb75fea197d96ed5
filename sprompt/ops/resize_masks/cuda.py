"""resize_masks and BitMasks.resize on their CUDA kernels (csrc/resize_masks/*_cuda.cu)."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.masks.op import rows
from sprompt.ops.resize_masks.op import extent


def resize_masks(a: Args, words: Tensor) -> None:
    if words.numel() == 0:
        return
    maps = a.soft.reshape(-1, *a.soft.shape[-2:])
    scratch = words.new_empty((2 * (a.width + a.height),), dtype=torch.int32)
    native._C.cuda.resize_masks(stream(maps), maps, a.height, a.width, a.threshold, *extent(a), rows(words), scratch)


def resize_bits(a: Args, out: Tensor) -> None:
    if out.numel() > 0:
        native._C.cuda.resize_bits(stream(a.words), rows(a.words), *a[1:], rows(out))


def cover_bits(a: Args, out: Tensor) -> None:
    if out.numel() > 0:
        scratch = out.new_empty((2 * (a.width + a.height),), dtype=torch.int32)
        native._C.cuda.cover_bits(stream(a.words), rows(a.words), *a[1:], rows(out), scratch)
