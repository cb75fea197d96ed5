"""deform_attn on its CUDA kernels (csrc/deform_attn/deform_attn_cuda.cu)."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.ops.declare import Args
from sprompt.ops.deform_attn.op import flat, table


def aligned(x: Tensor) -> Tensor:
    """The tensor with last stride 1, as kernels read it that load 16 bytes at a time. Their sums follow the size of the rows,
    so that a layout has no influence on the bits."""
    width = 16 // x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(s % width for s in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def deform_attn(a: Args, out: Tensor) -> None:
    if out.numel() > 0:
        native._C.cuda.deform_attn(
            stream(a.values), aligned(a.values), flat(a.points), flat(a.weights), table(tuple(a.levels)), out
        )


def deform_attn_backward(a: Args, *gradients: Tensor) -> None:
    needed = (a.to_values, a.to_points, a.to_weights)
    if a.grad.numel() == 0:  # no image, query, head or channel: no product
        for gradient in gradients:
            gradient.zero_()
        return
    B, S, H, D = a.values.shape
    sums = a.values.new_zeros((B, S, H, D) if a.to_values else (0,), dtype=torch.int64)
    limits = a.values.new_zeros((B, H, 2), dtype=torch.int32)
    native._C.cuda.deform_attn_backward(
        stream(a.values), aligned(a.grad), aligned(a.values), flat(a.points), flat(a.weights), table(tuple(a.levels)),
        *(gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True)),
        sums if a.to_values else None, limits,
    )  # fmt: skip
