"""crop_masks and paste_masks on their CUDA kernels (csrc/box_masks/*_cuda.cu)."""

from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.box_masks.op import kernel_arguments
from sprompt.ops.declare import Args
from sprompt.ops.region_mean.op import wide_boxes


def crop_masks(a: Args, out: Tensor) -> None:
    if out.numel() > 0:
        native._C.cuda.crop_masks(stream(a.words), *kernel_arguments(a), out)


def paste_masks(a: Args, words: Tensor) -> None:
    if words.numel() > 0:
        native._C.cuda.paste_masks(stream(a.soft), a.soft, wide_boxes(a.boxes).contiguous(), *a[2:], words)
