"""The Cost of every Triton launch equals the bytes that are loaded and stored under Triton's interpreter
(TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sprompt import backends
from sprompt.ops import triton_launch
from sprompt.ops.declare import OPS
from sprompt.testing.calls import CapturedOps, call, gradients, told
from sprompt.testing.compare import tensors
from sprompt.testing.spec import OpSpec, Sample
from sprompt.testing.specs import SPECS

if not triton_launch.interpreted():
    pytest.skip("runs under Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

#: Ops whose loads depend on the data, because they skip empty tiles and boxes. Their Cost is an upper bound.
DATA_DEPENDENT = {"mask_pool", "mask_pool_backward", "mask_update", "mask_update_backward", "mask_mean", "mask_mean_backward",
    "region_mean", "region_mean_backward", "prompt_match", "prompt_match_backward", "match_cost", "resize_masks",
    "saliency_bits", "saliency_soft", "mask_attention", "mask_attention_backward", "sample_points", "sample_points_backward",
    "point_cost", "point_loss", "point_loss_backward"}  # fmt: skip

#: Ops whose stores depend on the data: some maps that turn out too small are emptied, and points outside of a map add nothing.
#: Their Cost is an upper bound.
STORES_DEPEND = {"saliency_bits", "sample_points_backward", "point_loss_backward"}


class Seen:
    read = 0
    written = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Counts the lanes of loads and stores that are not masked off. An atomic is both."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    seen = Seen()
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.read += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.written += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved = int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        seen.read, seen.written = seen.read + moved, seen.written + moved
        return atomic(self, operation, pointers, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", counted_load)
    monkeypatch.setattr(Builder, "create_masked_store", counted_store)
    monkeypatch.setattr(Builder, "create_atomic_rmw", counted_atomic)
    yield seen


def triton_ops(spec: OpSpec) -> bool:
    return any("triton" in backends.registered(op) for op in spec.ops)


@pytest.mark.parametrize("spec", [s for s in SPECS if triton_ops(s)], ids=lambda s: s.name)
def test_cost_is_what_is_loaded_and_stored(spec: OpSpec, seen: Seen) -> None:
    checked = set()
    for sample in spec.samples(torch.device("cpu"), torch.float32, 20):
        for op, args in captured(spec, sample):
            name = op._schema.name.removeprefix("sprompt::")
            if "triton" not in backends.registered(name):
                continue
            seen.read = seen.written = 0
            with triton_launch.recording() as launches, torch.no_grad(), backends.use_backend("triton", [name]):
                OPS[name].run(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
            costs = [one.cost for one in launches]
            read, written = sum(c.read + c.again for c in costs), sum(c.written for c in costs)
            with told(spec, sample, name):
                stored = seen.written <= written if name in STORES_DEPEND else seen.written == written
                assert stored, f"stores {seen.written} bytes, Cost says {written}"
                if name in DATA_DEPENDENT:
                    assert seen.read <= read, f"loads {seen.read} bytes, Cost says at most {read}"
                else:
                    assert seen.read == read, f"loads {seen.read} bytes, Cost says {read}"
            checked.add(name)
    assert checked


def captured(spec: OpSpec, sample: Sample) -> list[tuple[Any, tuple[Any, ...]]]:
    """The sprompt ops of a forward and backward pass with their arguments, on the default backend."""
    with CapturedOps() as forward:
        call(spec, sample)
    calls = list(forward.calls)
    if spec.gradients and tensors(sample.args):
        with CapturedOps() as both:
            gradients(spec, sample)
        calls += [one for one in both.calls if one[0]._schema.name.endswith("_backward")]
    return calls
