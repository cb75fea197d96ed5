"""Tests the promises of every op, by their numbers in docs/adding_an_op.md, for every spec and every backend that can run here."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from variants import cover, forms, variants

import sprompt
from sprompt import backends, cuda, native
from sprompt.ops import triton_launch
from sprompt.ops.declare import OPS
from sprompt.testing.calls import (
    CapturedOps,
    as_dtype,
    call,
    differentiable_outputs,
    gradients,
    output_gradients,
    told,
    with_gradients,
)
from sprompt.testing.compare import assert_close, assert_same_bits, error, tensors
from sprompt.testing.layouts import LAYOUTS, can_be_far, far
from sprompt.testing.spec import HALVES, OpSpec, Sample
from sprompt.testing.specs import SPECS

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64
NO_GPU = "needs a CUDA device"


def cannot(backend: str, device: str) -> str:
    """Why the kernels of this backend cannot run on tensors of the device; empty if they can."""
    probe = torch.empty(0, device=device)
    return (
        {"native": native, "triton": triton_launch, "cuda": cuda}[backend].why_not(probe)
        if backend != "reference"
        else ""
    )


def _backends() -> list[Any]:
    """(device, backend) pairs. Pairs that cannot run here have a skip mark with the reason."""
    pairs = []
    for device in backends.ORDER:
        for name in backends.order(device):
            reason = NO_GPU if device == "cuda" and not torch.cuda.is_available() else cannot(name, device)
            if reason and device == "cpu" and name in ("triton", "cuda"):
                continue  # other runs test them: TRITON_INTERPRET=1, and a build with SPROMPT_EMULATE_CUDA=1
            mark = [pytest.mark.skip(reason=reason)] if reason else []
            pairs.append(pytest.param(torch.device(device), name, id=f"{device}-{name}", marks=mark))
    return pairs


by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
by_gradient = pytest.mark.parametrize("spec", [s for s in SPECS if s.gradients], ids=lambda s: s.name)
by_compiled = pytest.mark.parametrize("spec", [s for s in SPECS if s.compiles], ids=lambda s: s.name)
by_backend = pytest.mark.parametrize(("device", "backend"), _backends())
on_devices = pytest.mark.parametrize(
    "device",
    [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU))],
    ids=str,
)


def having(backend: str) -> set[str]:
    """The ops that have this backend."""
    return {op for op in backends.ops() if backend in backends.registered(op)}


def forced(backend: str) -> contextlib.AbstractContextManager[None]:
    """Forces a backend for the ops that have it. A function under test may call ops of other folders that lack this backend,
    because each folder has its GPU kernels either in Triton or in CUDA C++. Such ops choose their backend as usual."""
    return sprompt.use_backend(backend, having(backend))


def fewer(
    spec: OpSpec, samples: list[Sample], device: torch.device, backend: str, together: bool = False
) -> list[Sample]:
    """The samples to test. Triton's interpreter takes seconds per sample, so it gets only as many samples as are needed to
    reach every choice in the kernels, or with `together` every combination of choices. In float32, other tests compare all
    samples with the ground truth and their gradients with the reference."""
    if (device.type, backend) != ("cpu", "triton"):
        return samples
    return cover(samples, [variants(spec, sample, together) for sample in samples])


def skip_if_absent(spec: OpSpec, device: torch.device, backend: str) -> None:
    absent = [op for op in spec.ops if op not in having(backend)]
    if absent:
        assert (device.type, backend) not in (("cpu", "native"), ("cpu", "reference")), (
            f"{absent[0]} has no {backend} backend"
        )
    if spec.ops[0] in absent:
        pytest.skip(f"there is no {backend} kernel of {spec.ops[0]} yet")


def dtypes(spec: OpSpec) -> tuple[torch.dtype, ...]:
    return spec.dtypes or (F32,)


def truth(spec: OpSpec, sample: Sample) -> Any:
    exact = as_dtype(sample, F64)
    if spec.oracle is not None:
        try:
            return spec.oracle(*exact.args, **exact.kwargs)
        except ModuleNotFoundError as missing:
            pytest.skip(f"the ground truth needs {missing.name}, which is not installed")
    with sprompt.use_backend("reference"):
        return call(spec, exact)


# -- 1, 7: the op runs, reports the backend that ran, and is right


@by_spec
@by_backend
@pytest.mark.parametrize("dtype", (F32, *HALVES), ids=str)
def test_right_on_every_backend(spec: OpSpec, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    if dtype not in dtypes(spec):
        pytest.skip(f"{spec.name} takes no {dtype}")
    skip_if_absent(spec, device, backend)
    samples = spec.samples(device, dtype, 0)
    for sample in fewer(spec, samples, device, backend, together=True) if dtype in HALVES else samples:
        with forced(backend), sprompt.trace_backends() as ran:
            actual = call(spec, sample)
        with told(spec, sample):
            assert all(name == backend for op, name in ran if op in having(backend)), ran
            assert (spec.ops[0], backend) in ran, ran
            expected = truth(spec, sample)
            if spec.compare is not None:
                spec.compare(actual, expected, sample)
            elif dtype in HALVES:
                check_half(spec, sample, actual, expected)
            else:
                assert_close(actual, expected, *spec.bound(sample))


def check_half(spec: OpSpec, sample: Sample, actual: Any, expected: Any) -> None:
    """The error is at most twice that of the eager formula, plus one rounding of the result to the output's dtype."""
    if spec.eager is not None:
        eager = spec.eager(*sample.args, **sample.kwargs)
    else:
        with sprompt.use_backend("reference"):
            eager = call(spec, sample)
    for a, by_eager, e in zip(tensors(actual), tensors(eager), tensors(expected), strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        ours, scale = error(a, e)
        theirs, _ = error(by_eager, e)
        bound = 2 * theirs + (torch.finfo(a.dtype).eps + spec.bound(sample)[0]) * scale + spec.bound(sample)[1]
        assert ours <= bound, f"off by {ours:.3g}, bound {bound:.3g} (eager formula: {theirs:.3g})"


# -- 2: any layout of inputs and gradients


@by_spec
@by_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_layout(spec: OpSpec, device: torch.device, backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    skip_if_absent(spec, device, backend)
    with forced(backend):
        for sample in fewer(spec, spec.samples(device, dtypes(spec)[0], 1), device, backend):
            strided = sample.map(layout)
            plain = strided.map(lambda t: t.clone(memory_format=torch.contiguous_format))
            with told(spec, sample):
                assert_same_bits(call(spec, strided), call(spec, plain))


@by_gradient
@by_backend
def test_expanded_gradient(spec: OpSpec, device: torch.device, backend: str) -> None:
    """.sum().backward() passes such a gradient: one number, expanded with strides of 0."""
    skip_if_absent(spec, device, backend)
    with forced(backend):
        for sample in fewer(spec, spec.samples(device, F32, 2), device, backend):
            results = []
            for make in (
                lambda o: torch.ones((), device=device).expand(o.shape),
                lambda o: torch.ones(o.shape, device=device),
            ):
                changed, leaves = with_gradients(spec, sample)
                outputs = differentiable_outputs(call(spec, changed))
                if leaves and outputs:
                    results.append(torch.autograd.grad(outputs, leaves, [make(o).to(o.dtype) for o in outputs]))
            if results:
                with told(spec, sample):
                    assert_same_bits(results[0], results[1])


# -- 3: an op never writes into its inputs, and it writes every element of its outputs


@by_spec
@by_backend
def test_inputs_untouched_outputs_written(spec: OpSpec, device: torch.device, backend: str) -> None:
    skip_if_absent(spec, device, backend)
    with forced(backend):
        for sample in fewer(spec, spec.samples(device, dtypes(spec)[0], 3), device, backend):
            kept = copy.deepcopy(sample)
            plain = call(spec, sample)
            plain_gradients = gradients(spec, sample)
            with told(spec, sample):
                assert_same_bits((sample.args, sample.kwargs), (kept.args, kept.kwargs))
                with poisoned_memory():
                    assert_same_bits(call(spec, sample), plain)
                    assert_same_bits(gradients(spec, sample), plain_gradients)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty holds NaN (integers: the largest value). Memory that kernels allocate themselves holds NaN too
    (integers: -1)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    poison = native._C.poison_scratch if native._C is not None else bool
    poison(True)
    try:
        yield
    finally:
        poison(False)
        torch.use_deterministic_algorithms(before)


# -- 4: offsets beyond 2^31


@by_spec
@by_backend
def test_far_apart(spec: OpSpec, device: torch.device, backend: str) -> None:
    """The two halves of a batch lie more than 2^31 elements apart. Nothing touches the memory between them."""
    skip_if_absent(spec, device, backend)
    sample = next((s for s in spec.samples(device, dtypes(spec)[0], 4) if can_be_far(s)), None)
    if sample is None:
        pytest.skip("no sample has a batch of at least two")
    with forced(backend), told(spec, sample):
        assert_same_bits(call(spec, far(sample)), call(spec, sample))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes use the same GPU for tests


# -- 5: opcheck, compile, export


@by_spec
@on_devices
def test_opcheck(spec: OpSpec, device: torch.device) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    checked = set()
    for number, sample in enumerate(spec.samples(device, dtypes(spec)[0], 5)):
        changed, _ = with_gradients(spec, sample)
        with CapturedOps() as captured:
            outputs = differentiable_outputs(call(spec, changed))
            if outputs:
                torch.autograd.grad(
                    outputs, [t for t in tensors(changed.kwargs) if t.requires_grad], output_gradients(outputs)
                )
        for op, args in captured.calls:
            checks = ["test_schema", "test_faketensor"]
            if op._schema.name.endswith("_backward"):  # its own gradient raises an error, which a test below checks
                args = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            if number == 0:
                checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            with told(spec, sample, str(op)):
                torch.library.opcheck(op, args, test_utils=checks)
            checked.add(op._schema.name.removeprefix("sprompt::"))
    assert checked >= set(spec.ops), f"never reached: {set(spec.ops) - checked}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, recompile_limit=64):
        yield
    torch._dynamo.reset()


@by_compiled
@on_devices
def test_compiled_equals_eager(spec: OpSpec, device: torch.device, fresh_compiler: None) -> None:
    """Forward and backward as one graph; the first sample goes through Inductor too. Samples that differ only in sizes and
    values are not compiled again, because test_opcheck compares the output shapes of every sample with those that a compiler
    sees."""
    samples = spec.samples(device, dtypes(spec)[0], 6)
    for number, sample in enumerate(cover(samples, [forms(sample) for sample in samples])):
        torch._dynamo.reset()
        compiled = torch.compile(
            spec.function, fullgraph=True, backend="inductor" if number == 0 else "aot_eager", dynamic=False
        )
        changed, leaves = with_gradients(spec, sample)
        with told(spec, sample):
            if number == 0 or not leaves:
                assert_same_bits(compiled(*sample.args, **sample.kwargs), call(spec, sample))
            if leaves:
                expected, actual = call(spec, changed), compiled(**changed.kwargs)
                assert_same_bits(actual, expected)
                assert_same_bits(*(backward(output, leaves) for output in (actual, expected)))


def backward(output: Any, leaves: list[Tensor]) -> list[Tensor]:
    outputs = differentiable_outputs(output)
    return list(torch.autograd.grad(outputs, leaves, output_gradients(outputs))) if outputs else []


class Exported(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **self.options, **kwargs)


@by_compiled
@on_devices
def test_export(spec: OpSpec, device: torch.device) -> None:
    sample = spec.samples(device, dtypes(spec)[0], 7)[0]
    bound = sample.bound(spec.function)
    inputs = {name: value for name, value in bound.items() if tensors(value)}
    module = Exported(spec.function, {name: value for name, value in bound.items() if name not in inputs})
    program = torch.export.export(module, (), inputs, strict=False)
    with told(spec, sample):
        assert_same_bits(program.module()(**inputs), call(spec, sample))


# -- the two ways of a call: straight to the backend, or through torch.ops


class Seeing(TorchFunctionMode):
    """A mode that changes no result. While it is active, every call goes through torch.ops."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def only_straight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def dispatched(*args: Any) -> Any:
        raise AssertionError("the call went through torch.ops")

    with monkeypatch.context() as patch:
        for op in OPS.values():
            patch.setattr(op, "dispatched", dispatched)
        yield


@by_spec
@on_devices
def test_both_ways_give_the_same_bits(spec: OpSpec, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for sample in spec.samples(device, dtypes(spec)[0], 17):
        with only_straight(monkeypatch):
            straight = call(spec, sample), gradients(spec, sample)
        with Seeing():
            dispatched = call(spec, sample), gradients(spec, sample)
        with told(spec, sample):
            assert_same_bits(straight, dispatched)


@by_spec
def test_a_profiler_sees_the_op_both_ways(spec: OpSpec) -> None:
    sample = spec.samples(CPU, dtypes(spec)[0], 18)[0]
    for way in (contextlib.nullcontext(), Seeing()):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with sprompt.trace_backends() as ran, torch.profiler.profile(activities=activities) as seen, way:
            call(spec, sample), gradients(spec, sample)
        assert ran and {f"sprompt::{op}" for op, _ in ran} <= {event.name for event in seen.events()}, way


# -- 6: only a GPU can show it; see tests/test_cuda.py


# -- 8: the same bits on every run and on any number of threads


@by_spec
@by_backend
def test_deterministic(spec: OpSpec, device: torch.device, backend: str) -> None:
    skip_if_absent(spec, device, backend)
    before = torch.get_num_threads()
    with forced(backend):
        for sample in fewer(spec, spec.samples(device, dtypes(spec)[0], 11), device, backend):
            first = call(spec, sample), gradients(spec, sample)
            try:
                for threads in (1, 2, 3, 7) if backend == "native" else (before,):
                    torch.set_num_threads(threads)
                    with told(spec, sample, f"on {threads} threads"):
                        assert_same_bits((call(spec, sample), gradients(spec, sample)), first)
            finally:
                torch.set_num_threads(before)


# -- 9: gradients


@by_gradient
def test_gradcheck_of_the_reference(spec: OpSpec) -> None:
    with sprompt.use_backend("reference"):
        for sample in spec.samples(CPU, F32, 12):
            changed, leaves = with_gradients(spec, sample, F64)
            if not leaves or not differentiable_outputs(call(spec, changed)):
                continue

            def function(
                *values: Tensor, changed: Sample = changed, leaves: list[Tensor] = leaves
            ) -> tuple[Tensor, ...]:
                given = dict(zip(map(id, leaves), values, strict=True))
                return tuple(differentiable_outputs(call(spec, changed.map(lambda t: given.get(id(t), t)))))

            with told(spec, sample):
                assert torch.autograd.gradcheck(function, leaves, fast_mode=True, raise_exception=True)


@by_gradient
@by_backend
@pytest.mark.parametrize("dtype", (F32, *HALVES), ids=str)
def test_gradients_equal_the_reference(spec: OpSpec, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    skip_if_absent(spec, device, backend)
    samples = spec.samples(device, dtype, 13)
    for sample in fewer(spec, samples, device, backend, together=True) if dtype in HALVES else samples:
        with forced(backend):
            actual = gradients(spec, sample)
        with sprompt.use_backend("reference"):
            expected = gradients(spec, as_dtype(sample, F64))
        relative, absolute = spec.bound(sample)
        with told(spec, sample):
            for a, e in zip(actual, expected, strict=True):
                difference, scale = error(a, e)
                # A gradient of a half type is rounded once; the output gradients and inputs were rounded before.
                slack = 4 * torch.finfo(dtype).eps if dtype in HALVES else relative
                assert difference <= absolute + slack * scale, (
                    f"gradient off by {difference:.3g} (largest value {scale:.3g})"
                )


@by_gradient
def test_double_backward_works_or_says_no(spec: OpSpec) -> None:
    sample = spec.samples(CPU, F32, 14)[0]
    changed, leaves = with_gradients(spec, sample)
    outputs = differentiable_outputs(call(spec, changed))
    weights = [g.requires_grad_() for g in output_gradients(outputs)]
    first = torch.autograd.grad(outputs, leaves, weights, create_graph=True)
    try:
        torch.autograd.grad(sum(g.sum() for g in first if g.requires_grad), [*leaves, *weights], allow_unused=True)
    except RuntimeError as refusal:
        assert "is not supported" in str(refusal) and "double backward of" in str(refusal), refusal


# -- 10: bad input


@pytest.mark.parametrize("case", [pytest.param(e, id=f"{s.name}, {e.name}") for s in SPECS for e in s.errors])
def test_bad_input_is_refused(case: Any) -> None:
    with pytest.raises(case.error, match=case.message) as caught:
        case.call()
    assert type(caught.value) is case.error, f"raised a {type(caught.value).__name__}"


@by_spec
def test_every_spec_has_errors(spec: OpSpec) -> None:
    assert spec.errors


# -- 11: autocast


@by_spec
@on_devices
def test_autocast_rule(spec: OpSpec, device: torch.device) -> None:
    for sample in spec.samples(device, dtypes(spec)[0], 15):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = call(spec, sample)
        expected = call(spec, as_dtype(sample, torch.bfloat16) if spec.autocast == "cast" else sample)
        with told(spec, sample, f"rule '{spec.autocast}'"):
            assert_same_bits(actual, expected)


# -- outputs can be pickled


@by_spec
def test_outputs_pickle(spec: OpSpec) -> None:
    sample = spec.samples(CPU, dtypes(spec)[0], 16)[0]
    output = call(spec, sample)
    assert_same_bits(pickle.loads(pickle.dumps(output)), output)
