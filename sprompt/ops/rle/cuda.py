"""rle_encode on its CUDA kernels (csrc/rle/rle_cuda.cu). rle_decode has none: see op.py."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.masks.op import rows
from sprompt.ops.rle import faults


def rle_encode(a: Args) -> tuple[Tensor, Tensor]:
    """characters and offsets on the device of the words. Waits for the device once, for the number of characters."""
    words, height, width = a
    faults.fits("rle_encode", words.shape[-1], height, width)  # checked here too, as the kernels index by these sizes
    masks, at = rows(words), stream(words)
    count, pixels = masks.shape[0], height * width
    strips, groups = (-(-width // 32), -(-height // 1024)) if pixels > 0 else (1, 0)
    used = words.new_zeros((count, strips, groups), dtype=torch.int32)
    contexts = words.new_empty((count, strips + 1, 4), dtype=torch.int32)
    starts = words.new_empty((count, strips), dtype=torch.int64)
    offsets = words.new_zeros(count + 1, dtype=torch.int64)
    native._C.cuda.rle_measure(at, masks, height, width, used, contexts, starts, offsets[1:])
    offsets.cumsum_(0)
    characters = words.new_empty(int(offsets[-1]), dtype=torch.uint8)
    native._C.cuda.rle_write(at, masks, height, width, used, contexts, starts, offsets, characters)
    return characters, offsets
