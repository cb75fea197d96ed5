"""Promises that only a GPU can show (6: no synchronisation, current stream, device guard, graphs; 8 over ten runs), for every
spec. `make gpu` runs them; elsewhere they are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import sprompt
from sprompt import backends
from sprompt.testing.calls import call, differentiable_outputs, gradients, output_gradients, told, with_gradients
from sprompt.testing.compare import assert_close, assert_same_bits, tensors
from sprompt.testing.spec import OpSpec, Sample
from sprompt.testing.specs import SPECS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
by_gradient = pytest.mark.parametrize("spec", [s for s in SPECS if s.gradients], ids=lambda s: s.name)


def samples(spec: OpSpec, seed: int, device: str = "cuda") -> list[Sample]:
    return spec.samples(torch.device(device), spec.dtypes[0] if spec.dtypes else torch.float32, seed)


def fixed_shapes(spec: OpSpec) -> None:
    if spec.dynamic or not spec.compiles:
        pytest.skip("its docstring says that its output's shape depends on the input's values")


@by_spec
def test_no_op_falls_back_to_the_reference(spec: OpSpec) -> None:
    for sample in samples(spec, 1):
        with sprompt.trace_backends() as ran:
            call(spec, sample)
            gradients(spec, sample)
        with told(spec, sample):
            fallen = {op for op, backend in ran if backend in ("reference", "native") and op not in backends.HOST_ONLY}
            assert not fallen, f"{fallen} ran elsewhere"


@by_spec
def test_no_synchronisation(spec: OpSpec) -> None:
    fixed_shapes(spec)
    for sample in samples(spec, 2):
        call(spec, sample), gradients(spec, sample)  # compiles and loads the kernels
        changed, leaves = with_gradients(spec, sample)
        weights = output_gradients(differentiable_outputs(call(spec, changed)))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with told(spec, sample):
                outputs = differentiable_outputs(call(spec, changed))
                if leaves and outputs:
                    torch.autograd.grad(outputs, leaves, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@by_spec
def test_graph_capture(spec: OpSpec) -> None:
    """A captured call, replayed on other values of the same shapes, gives what a direct call gives. Forward and backward."""
    fixed_shapes(spec)
    for sample, other in zip(samples(spec, 3), samples(spec, 4), strict=True):
        if [t.shape for t in held(sample)] != [t.shape for t in held(other)]:
            continue
        expected = step(spec, other)
        static = sample.map(torch.clone)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            step(spec, static)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")  # a capture that fails half-way would fail all later ones
            try:
                step(spec, static)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(spec, static)
        for target, source in zip(held(static), held(other), strict=True):
            target.copy_(source)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        with told(spec, sample):
            assert_same_bits(captured, expected)


def held(sample: Sample) -> list[Tensor]:
    return tensors((sample.args, sample.kwargs))


def step(spec: OpSpec, sample: Sample) -> Any:
    """Outputs, and gradients for output gradients of 1. Their values must not come from the host while a graph is captured."""
    bound = sample.bound(spec.function)
    leaves = [bound[name].detach().requires_grad_() for name in spec.gradients if isinstance(bound.get(name), Tensor)]
    leaves = [leaf for leaf in leaves if leaf.is_floating_point()]
    names = [name for name in spec.gradients if isinstance(bound.get(name), Tensor) and bound[name].is_floating_point()]
    output = spec.function(**{**bound, **dict(zip(names, leaves, strict=True))})
    outputs = differentiable_outputs(output)
    if not leaves or not outputs:
        return output
    return output, torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])


@by_spec
def test_current_stream(spec: OpSpec) -> None:
    """The kernels run on the current stream, so they see inputs that this stream writes late."""
    sample = samples(spec, 5)[0]
    expected = call(spec, sample)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = sample.map(torch.zeros_like)
        torch.cuda._sleep(50_000_000)
        for target, source in zip(held(late), held(sample), strict=True):
            target.copy_(source)
        actual = call(spec, late)
    stream.synchronize()
    with told(spec, sample):
        assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@by_spec
def test_second_device(spec: OpSpec) -> None:
    """Inputs on another device than the current one."""
    sample = samples(spec, 6, "cuda:1")[0]
    assert torch.cuda.current_device() == 0
    here = sample.map(lambda t: t.to("cuda:0"))
    with told(spec, sample):
        assert_same_bits([t.cpu() for t in tensors(call(spec, sample))], [t.cpu() for t in tensors(call(spec, here))])
    assert torch.cuda.current_device() == 0


@by_spec
def test_ten_runs_give_the_same_bits(spec: OpSpec) -> None:
    for sample in samples(spec, 7):
        first = call(spec, sample), gradients(spec, sample)
        for _ in range(9):
            with told(spec, sample):
                assert_same_bits((call(spec, sample), gradients(spec, sample)), first)


@by_spec
def test_the_same_as_on_the_cpu(spec: OpSpec) -> None:
    """Compares integers and bits exactly, and floats within the spec's bound. Outputs that follow from rounded floats have
    the spec's own comparison."""
    for sample in samples(spec, 8):
        with told(spec, sample):
            host = sample.map(Tensor.cpu)
            actual, on_cpu = tree_map_only(Tensor, Tensor.cpu, call(spec, sample)), call(spec, host)
            if spec.compare is None:
                assert_close(actual, on_cpu, *spec.bound(sample))
            else:
                spec.compare(actual, on_cpu, host)
