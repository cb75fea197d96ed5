"""mean_field on its CUDA kernel (csrc/mean_field/mean_field_cuda.cu): one launch, one block per crop."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.mean_field.op import numbers


def scratch_bytes(h: int, w: int) -> int:
    """Bytes per crop of the weights and the states (9 planes of float32), and of the flags of pieces of 32 pixels."""
    planes, flags = 9 * 4 * (h + 2) * (w + 2), 2 * (h + 2) * (-(-w // 32) + 2)
    return planes + -(-flags // 4) * 4


def mean_field(a: Args, words: Tensor) -> None:
    B, h, w = a.boxes.shape
    if words.numel() == 0:
        return
    scratch = words.new_empty((B, scratch_bytes(h, w)), dtype=torch.uint8)
    native._C.cuda.mean_field(stream(words), a.images, a.start, a.boxes, a.iterations, *numbers(a), words, scratch)
