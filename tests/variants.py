"""The fewest samples that show everything: every variant of a spec's Triton kernels, every form of an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sprompt.ops.launch import DEFAULT_ARCH
from sprompt.testing.calls import call, differentiable_outputs, with_gradients
from sprompt.testing.spec import OpSpec, Sample

#: Integer constants up to this one choose a way through a kernel; larger ones are sizes of tiles.
CHOICES = 8


def _kind(value: Any) -> Any:
    """What a kernel is compiled for: the dtype of a tensor, None, a switch; of other numbers the type."""
    if isinstance(value, Tensor):
        return value.dtype
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) <= CHOICES):
        return value
    return type(value)


def variants(spec: OpSpec, sample: Sample, together: bool) -> set[Any]:
    """Of every launch of a forward and backward: kernel, and the kinds of all arguments together or of each by itself. The launches
    are recorded, nothing runs."""
    from sprompt.testing.compiled import LaunchOnly  # needs Triton

    changed, leaves = with_gradients(spec, sample)
    with LaunchOnly(DEFAULT_ARCH) as mode:
        outputs = differentiable_outputs(call(spec, changed))
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs], allow_unused=True)
    found: set[Any] = set()
    for launch in (launch for run in mode.runs for launch in run.launches):
        # A number that is an argument is a size: one kernel serves all.
        kinds = [(i, _kind(a)) for i, a in enumerate(launch.args) if a is None or isinstance(a, bool | Tensor)]
        kinds += [(name, _kind(value)) for name, value in launch.constants.items()]
        kernel = launch.kernel.fn.__name__
        found |= {(kernel, *kinds)} if together else {(kernel, *kind) for kind in kinds}
    return found


def forms(sample: Sample) -> set[Any]:
    """What a compiler makes graphs of: of every argument by itself, dtype, dimensions, layout, whether it is empty; or its value."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path((sample.args, sample.kwargs))
    return {
        (str(path), (v.dtype, v.dim(), v.numel() == 0, v.is_contiguous()) if isinstance(v, Tensor) else repr(v))
        for path, v in leaves
    }


def cover(samples: list[Sample], shown: list[set[Any]]) -> list[Sample]:
    """Samples that show all that one of `samples` shows, chosen one after the other by how much is new; and all that show nothing,
    since they launch nothing."""
    missing: set[Any] = set().union(*shown)
    chosen = {i for i, found in enumerate(shown) if not found}
    while missing:
        best = max(range(len(samples)), key=lambda i: len(shown[i] & missing))
        chosen.add(best)
        missing -= shown[best]
    return [samples[i] for i in sorted(chosen)]
