"""BitMasks.resize on its CUDA kernel (csrc/resize_masks/resize_masks_cuda.cu)."""

from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.masks.op import rows


def resize_bits(a: Args, out: Tensor) -> None:
    words, h, w, height, width = a
    if out.numel() > 0:
        native._C.cuda.resize_bits(stream(words), rows(words), h, w, height, width, rows(out))
