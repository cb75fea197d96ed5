"""Chooses few samples that together show every variant of a spec's Triton kernels, or every form of an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sprompt.ops.triton_launch import DEFAULT_ARCH
from sprompt.testing.calls import call, differentiable_outputs, with_gradients
from sprompt.testing.spec import OpSpec, Sample

#: Integer constants up to this value choose a branch of a kernel; larger constants are sizes of tiles.
CHOICES = 8


def _kind(value: Any) -> Any:
    """The part of an argument that Triton compiles a kernel for: the dtype of a tensor, the value of None, a switch or a small
    integer, the type of any other number."""
    if isinstance(value, Tensor):
        return value.dtype
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) <= CHOICES):
        return value
    return type(value)


def variants(spec: OpSpec, sample: Sample, together: bool) -> set[Any]:
    """For every launch of a forward and backward: the kernel with the kinds of all its arguments together, or with the kind of
    each argument separately. The launches are only recorded; no kernel runs."""
    from sprompt.testing.compiled import LaunchOnly  # needs Triton

    changed, leaves = with_gradients(spec, sample)
    with LaunchOnly(DEFAULT_ARCH) as mode:
        outputs = differentiable_outputs(call(spec, changed))
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs], allow_unused=True)
    found: set[Any] = set()
    for launch in (launch for run in mode.runs for launch in run.launches):
        # A number among the arguments is a size, and one kernel serves all sizes.
        kinds = [(i, _kind(a)) for i, a in enumerate(launch.args) if a is None or isinstance(a, bool | Tensor)]
        kinds += [(name, _kind(value)) for name, value in launch.constants.items()]
        kernel = launch.kernel.fn.__name__
        found |= {(kernel, *kinds)} if together else {(kernel, *kind) for kind in kinds}
    return found


def forms(sample: Sample) -> set[Any]:
    """The properties for which a compiler makes separate graphs. For each tensor argument: dtype, number of dimensions, whether
    it is empty, whether it is contiguous. For any other argument: its value."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path((sample.args, sample.kwargs))
    return {
        (str(path), (v.dtype, v.dim(), v.numel() == 0, v.is_contiguous()) if isinstance(v, Tensor) else repr(v))
        for path, v in leaves
    }


def cover(samples: list[Sample], shown: list[set[Any]]) -> list[Sample]:
    """Few samples that together show everything in `shown`. Each choice is the sample that shows most new elements. Samples
    that show nothing are kept as well, because they launch no kernel."""
    missing: set[Any] = set().union(*shown)
    chosen = {i for i, found in enumerate(shown) if not found}
    while missing:
        best = max(range(len(samples)), key=lambda i: len(shown[i] & missing))
        chosen.add(best)
        missing -= shown[best]
    return [samples[i] for i in sorted(chosen)]
