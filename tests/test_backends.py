"""The choice of the backend: forced, automatic, and while tracing."""

import os
import subprocess
import sys

import pytest
import torch

import sprompt
from sprompt import backends, native
from sprompt.ops import mask_area

MASKS = torch.ones(2, 4, 8)


def test_trace_names_the_backend() -> None:
    for name in ("reference",) if native._C is None else ("native", "reference"):
        with sprompt.use_backend(name), sprompt.trace_backends() as ran:
            mask_area(MASKS)
        assert ran == [("pack_masks", name), ("mask_area", name)]


def test_forced_backend_that_cannot_run_raises() -> None:
    with (
        sprompt.use_backend("triton"),
        pytest.raises(RuntimeError, match="pack_masks: backend triton was asked for, but"),
    ):
        mask_area(MASKS)
    expected = "use_backend: backend must be one of reference, native, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=expected), sprompt.use_backend("gpu"):
        pass
    with sprompt.trace_backends() as ran:
        mask_area(MASKS)
    assert ran, "the choice is automatic again"


def test_a_backend_forced_for_some_ops_leaves_the_others_alone() -> None:
    with sprompt.use_backend("reference", ["mask_area"]), sprompt.trace_backends() as ran:
        mask_area(MASKS)
        with sprompt.use_backend("reference"):
            mask_area(MASKS)
        with sprompt.use_backend("triton", []):
            mask_area(MASKS)
    automatic = "reference" if native._C is None else "native"
    assert [name for _, name in ran] == [automatic, "reference", "reference", "reference", automatic, automatic]


@pytest.mark.skipif(native._C is None, reason="the compiled kernels are not built")
def test_forced_native_refuses_float64() -> None:
    from sprompt.ops import mask_loss

    logits = torch.zeros(1, 4, 4, dtype=torch.float64)
    with (
        sprompt.use_backend("native"),
        pytest.raises(RuntimeError, match="backend native was asked for, but the native kernels"),
    ):
        mask_loss(logits, logits)
    with sprompt.trace_backends() as ran:
        mask_loss(logits, logits)
    assert {name for _, name in ran} == {"reference"}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPROMPT_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_environment_switch() -> None:
    code = (
        "import torch, sprompt; from sprompt.ops import mask_area\n"
        "with sprompt.trace_backends() as ran: mask_area(torch.ones(2, 4, 8))\n"
        "print(ran[0][1])"
    )
    assert run(code, SPROMPT_BACKEND="reference").stdout == "reference\n"
    failed = run(code, SPROMPT_BACKEND="fast")
    assert failed.returncode != 0 and "SPROMPT_BACKEND: backend must be one of" in failed.stderr


def test_every_op_has_a_gpu_kernel() -> None:
    """No op on CUDA may fall back to the reference."""
    without = {op for op in backends.ops() if not {"triton", "cuda"} & set(backends.registered(op))}
    assert without == set(backends.HOST_ONLY)


def test_every_op_has_a_reference_and_a_native_kernel() -> None:
    for op in backends.ops():
        assert {"reference", "native"} <= set(backends.registered(op)), op


def test_gpu_backends_are_tried_in_the_order_of_the_declaration() -> None:
    """Two ops that are declared with Triton and CUDA backends, in opposite orders."""
    (
        backends.add("order_a", "reference", print),
        backends.add("order_a", "triton", print),
        backends.add("order_a", "cuda", print),
    )
    (
        backends.add("order_b", "reference", print),
        backends.add("order_b", "cuda", print),
        backends.add("order_b", "triton", print),
    )
    try:
        assert backends.automatic("cuda", "order_a") == ("triton", "cuda", "reference")
        assert backends.automatic("cuda", "order_b") == ("cuda", "triton", "reference")
    finally:
        del backends._table["order_a"], backends._table["order_b"]
