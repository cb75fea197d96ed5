"""BitMasks.resize on its CUDA kernel (csrc/resize_masks/resize_masks_cuda.cu)."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.masks import words_for
from sprompt.ops.masks.op import rows


def resize_bits(words: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    out = words.new_empty((*words.shape[:-1], words_for(height * width)), dtype=torch.int32)
    if out.numel() > 0:
        native._C.cuda.resize_bits(stream(words), rows(words), h, w, height, width, rows(out))
    return out
