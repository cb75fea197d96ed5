"""roi_align on its CUDA kernels (csrc/roi_align/roi_align_cuda.cu)."""

from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.roi_align.op import table


def roi_align(a: Args, out: Tensor) -> None:
    native._C.cuda.roi_align(
        stream(a.boxes), a.maps, a.boxes.contiguous(), a.counts, table(tuple(a.strides)), a.sampling, out
    )


def roi_align_backward(a: Args, out: list[Tensor]) -> None:
    native._C.cuda.roi_align_backward(
        stream(a.grad), a.grad.contiguous(), a.boxes.contiguous(), a.counts, table(tuple(a.strides)), a.sampling, out
    )
