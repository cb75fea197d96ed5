"""Registration of ops with torch: one call an op gives it its schema, fake kernel, backends and (optionally) autograd."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from sprompt import backends, native
from sprompt.ops.declare import LIBRARY
from sprompt.ops.schemas import SCHEMAS

#: The fake kernel of every op: outputs of the right shape and dtype, unwritten.
FAKES: dict[str, Callable[..., Any]] = {}


def _always(*args: object) -> str:
    return ""


def _lazy(module: str, function: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return run


def register_op(
    name: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    native_kernel: Callable[..., Any] | None = None,
    native_why_not: Callable[..., str] = native.why_not,
    gpu: str | None = None,
    gpu_why_not: Callable[..., str] | None = None,
) -> None:
    """Defines torch.ops.sprompt.<name> from its line in schemas.py. The first argument of every op is a tensor.

    gpu: "triton" or "cuda", the backend on a GPU: the function `name` of that module of the room, imported when it first runs.
    gpu_why_not: what it can take, if that is not what the backend's kernels can take in general.
    """
    LIBRARY.define(f"{name}{SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
    backends.add(name, "reference", reference)
    if native_kernel is not None:
        backends.add(name, "native", native_kernel)
    if gpu is not None:
        room = fake.__module__.rpartition(".")[0]  # fake kernels live in the room's registration.py
        backends.add(name, gpu, _lazy(f"{room}.{gpu}", name))

    def run(first: torch.Tensor, *rest: Any) -> Any:
        f64 = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in (first, *rest))
        return backends.choose(name, first.device, f64).run(first, *rest)

    # One kernel for every device: the device's own backends are chosen inside.
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    FAKES[name] = fake
    torch.library.register_fake(f"sprompt::{name}", fake, lib=LIBRARY)


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Gives an op its gradient. `backward` calls <name>_backward ops, whose own gradient no_double_backward refuses."""
    torch.library.register_autograd(f"sprompt::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_double_backward(name: str, op: str) -> None:
    """Makes the gradient of the backward op `name` an error that says so."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"double backward of {op} is not supported")

    torch.library.register_autograd(f"sprompt::{name}", backward, lib=LIBRARY)
