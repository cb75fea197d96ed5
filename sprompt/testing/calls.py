"""Calls a spec's function: with gradients, with a record of the ops that run, and with the sample's name in failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sprompt.testing.compare import tensors
from sprompt.testing.spec import OpSpec, Sample


@contextlib.contextmanager
def told(spec: OpSpec, sample: Sample, note: str = "") -> Iterator[None]:
    """Adds the names of the op and of the sample to a failure."""
    try:
        yield
    except AssertionError as failure:
        raise AssertionError(f"{spec.name}, sample '{sample.name}' {note}: {failure}") from failure


def call(spec: OpSpec, sample: Sample) -> Any:
    return spec.function(*sample.args, **sample.kwargs)


def as_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    return sample.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def with_gradients(spec: OpSpec, sample: Sample, dtype: torch.dtype | None = None) -> tuple[Sample, list[Tensor]]:
    """The sample with fresh leaf tensors in its differentiable parameters, and these leaves. A parameter may be a list."""
    bound = sample.bound(spec.function)
    leaves: list[Tensor] = []

    def fresh(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaf = value.detach().clone().to(dtype or value.dtype).requires_grad_()
        leaves.append(leaf)
        return leaf

    def converted(value: Tensor) -> Tensor:
        return value.to(dtype or value.dtype) if value.is_floating_point() else value

    changed = {
        name: torch.utils._pytree.tree_map_only(Tensor, fresh if name in spec.gradients else converted, value)
        for name, value in bound.items()
    }
    return Sample(sample.name, (), changed), leaves


def differentiable_outputs(output: Any) -> list[Tensor]:
    return [t for t in tensors(output) if t.requires_grad]


def output_gradients(outputs: list[Tensor], seed: int = 5) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in outputs]


def gradients(spec: OpSpec, sample: Sample, dtype: torch.dtype | None = None) -> list[Tensor]:
    changed, leaves = with_gradients(spec, sample, dtype)
    outputs = differentiable_outputs(call(spec, changed))
    if not leaves or not outputs:
        return []
    return list(torch.autograd.grad(outputs, leaves, output_gradients(outputs)))


class CapturedOps(TorchDispatchMode):
    """Records the sprompt ops that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "sprompt":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))
