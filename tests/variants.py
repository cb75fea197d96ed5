"""Which samples reach every variant of a spec's Triton kernels. The launches are recorded, nothing runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sprompt.ops.launch import DEFAULT_ARCH
from sprompt.testing.calls import call, differentiable_outputs, with_gradients
from sprompt.testing.compiled import LaunchOnly
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
    """Of every launch of a forward and backward: kernel, and the kinds of all arguments together or of each by itself."""
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


def covering(spec: OpSpec, samples: list[Sample], together: bool) -> list[Sample]:
    """Samples that reach every variant which one of `samples` reaches, the one with most new variants first; and all that launch
    nothing, since empty inputs cost nothing."""
    reached = [variants(spec, sample, together) for sample in samples]
    missing = set().union(*reached)
    chosen = {i for i, found in enumerate(reached) if not found}
    while missing:
        best = max(range(len(samples)), key=lambda i: len(reached[i] & missing))
        chosen.add(best)
        missing -= reached[best]
    return [samples[i] for i in sorted(chosen)]
