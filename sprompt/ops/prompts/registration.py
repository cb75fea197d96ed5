"""Fake kernels, backends and gradients of the prompts ops."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks, launch
from sprompt.ops.library import no_double_backward, register_gradient, register_op
from sprompt.ops.prompts import reference

# ---- region_mean, mask_mean


def _first_why_not(*args: object) -> str:
    """float64 boxes are read as they are; only the features' dtype matters."""
    return native.why_not(*args[:1])


def _first_why_not_triton(*args: object) -> str:
    return launch.why_not(*args[:1])


def _lanes(features: Tensor) -> Tensor:
    """A map whose rows or whose channels lie together, as the kernels read it: no copy of NCHW, of NHWC and of their slices."""
    along_x = features.stride(3) == 1 and features.stride(2) >= features.shape[3]
    return features if along_x or features.stride(1) == 1 else features.contiguous()


def _boxes(boxes: Tensor) -> Tensor:
    if boxes.dtype not in (torch.float32, torch.float64, torch.int64):
        boxes = boxes.to(torch.float32 if boxes.is_floating_point() else torch.int64)
    return boxes.contiguous()


def _scratch(like: Tensor, batch: int, length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """runs and heads of csrc/region_mean/region_mean.h."""
    runs = like.new_empty((batch, length, height * ((width + 3) // 4)), dtype=torch.int64)
    return runs, like.new_empty((batch, length, 3), dtype=torch.int64)


def _sums(out: Tensor, *sizes: int) -> Tensor | None:
    """float32 sums of results in half types; float32 results are summed where they stand."""
    return None if out.dtype == torch.float32 else out.new_empty(sizes, dtype=torch.float32)


def _check_boxes(boxes: Tensor, counts: Tensor | None) -> None:
    """Real boxes are finite. Reads values: on the CPU only."""
    if boxes.device.type != "cpu" or not boxes.is_floating_point():
        return
    bad = ~boxes.isfinite().all(-1)
    if counts is not None:
        bad &= reference.real(counts, boxes.shape[1])
    if bool(bad.any()):
        b, l = bad.nonzero()[0].tolist()
        advice = "leave such boxes out, or behind counts"
        checks.bad_value("region_mean", "boxes", "be finite", f"{boxes[b, l].tolist()} at [{b}, {l}]", advice)


def _region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    batch, channels, height, width = features.shape
    length = boxes.shape[1]
    checks.counts_within("region_mean", counts, length)
    out = features.new_empty((batch, length, channels))
    runs, heads = _scratch(features, batch, length, height, width)
    problem = features.new_empty((1,), dtype=torch.int64)
    native._C.region_mean(_lanes(features), _boxes(boxes), counts, runs, heads, problem, out, native.threads())
    if problem.item():
        _check_boxes(boxes, counts)
    return out


def _region_mean_reference(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    checks.counts_within("region_mean", counts, boxes.shape[1])
    _check_boxes(boxes, counts)
    return reference.region_mean(features, boxes, counts)


def _region_mean_fake(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    return features.new_empty((boxes.shape[0], boxes.shape[1], features.shape[1]))


def _region_mean_backward(grad: Tensor, boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    batch, length, channels = grad.shape
    out = grad.new_empty((batch, channels, height, width))
    runs, heads = _scratch(grad, batch, length, height, width)
    threads = native.threads()
    sums = _sums(out, threads, 4 * height * width)
    native._C.region_mean_backward(grad, _boxes(boxes), counts, runs, heads, sums, out, threads)
    return out


def _region_mean_backward_fake(grad: Tensor, boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2], height, width))


def _region_mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, counts = inputs
    ctx.save_for_backward(boxes, counts)
    ctx.size = features.shape[2:]


def _region_mean_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    boxes, counts = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None
    return torch.ops.sprompt.region_mean_backward(grad, boxes, counts, *ctx.size), None, None


def _mask_mean(features: Tensor, words: Tensor) -> Tensor:
    batch, channels, height, width = features.shape
    length = words.shape[1]
    out = features.new_empty((batch, length, channels))
    runs, heads = _scratch(features, batch, length, height, width)
    native._C.mask_mean(_lanes(features), words.contiguous(), runs, heads, out, native.threads())
    return out


def _mask_mean_fake(features: Tensor, words: Tensor) -> Tensor:
    return features.new_empty((words.shape[0], words.shape[1], features.shape[1]))


def _mask_mean_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    batch, length, channels = grad.shape
    out = grad.new_empty((batch, channels, height, width))
    runs, heads = _scratch(grad, batch, length, height, width)
    threads = native.threads()
    sums = _sums(out, threads, 4 * height * width)
    native._C.mask_mean_backward(grad, words.contiguous(), runs, heads, sums, out, threads)
    return out


def _mask_mean_backward_fake(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2], height, width))


def _mask_mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, words = inputs
    ctx.save_for_backward(words)
    ctx.size = features.shape[2:]


def _mask_mean_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    (words,) = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None
    return torch.ops.sprompt.mask_mean_backward(grad, words, *ctx.size), None


# ---- prompt_match

Optional = Tensor | None


def _row_lanes(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _prompt_match(
    kernels: Tensor, prompts: Tensor, counts: Optional, keep: Optional, order: Optional, cosine: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = prompts.shape
    checks.counts_within("prompt_match", counts, length)
    out = prompts.new_empty((batch, kernels.shape[-2], channels))
    index = prompts.new_empty((batch, kernels.shape[-2]), dtype=torch.int64)
    if keep is not None:
        keep = keep.contiguous()
    native._C.prompt_match(
        _row_lanes(kernels), _row_lanes(prompts), counts, keep, order, cosine, out, index, native.threads()
    )
    return out, index


def _prompt_match_reference(
    kernels: Tensor, prompts: Tensor, counts: Optional, keep: Optional, order: Optional, cosine: bool
) -> tuple[Tensor, Tensor]:
    checks.counts_within("prompt_match", counts, prompts.shape[1])
    return reference.prompt_match(kernels, prompts, counts, keep, order, cosine)


def _prompt_match_fake(
    kernels: Tensor, prompts: Tensor, counts: Optional, keep: Optional, order: Optional, cosine: bool
) -> tuple[Tensor, Tensor]:
    shape = (prompts.shape[0], kernels.shape[-2])
    return prompts.new_empty((*shape, prompts.shape[2])), prompts.new_empty(shape, dtype=torch.int64)


def _prompt_match_backward(grad: Tensor, index: Tensor, prompts: int) -> Tensor:
    out = grad.new_empty((grad.shape[0], prompts, grad.shape[2]))
    native._C.prompt_match_backward(_row_lanes(grad), index.contiguous(), _sums(out, *out.shape), out, native.threads())
    return out


def _prompt_match_backward_fake(grad: Tensor, index: Tensor, prompts: int) -> Tensor:
    return grad.new_empty((grad.shape[0], prompts, grad.shape[2]))


def _prompt_match_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    kernels, prompts, *_ = inputs
    ctx.save_for_backward(output[1])
    ctx.shared = kernels.dim() == 2
    ctx.prompts = prompts.shape[1]


def _prompt_match_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Optional, Optional, None, None, None, None]:
    (index,) = ctx.saved_tensors
    kernels = prompts = None
    if ctx.needs_input_grad[0]:
        kernels = grad.sum(0) if ctx.shared else grad
    if ctx.needs_input_grad[1]:
        prompts = torch.ops.sprompt.prompt_match_backward(grad, index, ctx.prompts)
    return kernels, prompts, None, None, None, None


register_op(
    "region_mean", fake=_region_mean_fake, reference=_region_mean_reference,
    native_kernel=_region_mean, native_why_not=_first_why_not, gpu="triton", gpu_why_not=_first_why_not_triton,
)  # fmt: skip
register_op(
    "region_mean_backward", fake=_region_mean_backward_fake, reference=reference.region_mean_backward,
    native_kernel=_region_mean_backward, native_why_not=_first_why_not, gpu="triton", gpu_why_not=_first_why_not_triton,
)  # fmt: skip
register_op("mask_mean", fake=_mask_mean_fake, reference=reference.mask_mean, native_kernel=_mask_mean, gpu="triton")
register_op(
    "mask_mean_backward", fake=_mask_mean_backward_fake, reference=reference.mask_mean_backward,
    native_kernel=_mask_mean_backward, gpu="triton",
)  # fmt: skip
register_op(
    "prompt_match", fake=_prompt_match_fake, reference=_prompt_match_reference,
    native_kernel=_prompt_match, gpu="triton",
)  # fmt: skip
register_op(
    "prompt_match_backward", fake=_prompt_match_backward_fake, reference=reference.prompt_match_backward,
    native_kernel=_prompt_match_backward, gpu="triton",
)  # fmt: skip

register_gradient("region_mean", _region_mean_gradient, _region_mean_setup)
register_gradient("mask_mean", _mask_mean_gradient, _mask_mean_setup)
register_gradient("prompt_match", _prompt_match_gradient, _prompt_match_setup)
no_double_backward("region_mean_backward", "region_mean")
no_double_backward("mask_mean_backward", "mask_mean")
no_double_backward("prompt_match_backward", "prompt_match")
