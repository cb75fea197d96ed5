"""The declaration of an op, and the two ways in which a call reaches its backend.

    @op("triton")                            # GPU backends in the order in which they are tried
    def twice(x: Tensor, factor: float) -> Tensor:
        return x.new_empty(x.shape)          # the outputs, unwritten

    @twice.native
    def _(a: Args, out: Tensor) -> None:     # a: the arguments by name
        native._C.twice(a.x.contiguous(), a.factor, out, native.threads())

The annotations are the schema of torch.ops.sprompt.twice. The function is its fake kernel, and allocates the outputs for every
backend except the reference. The reference is `twice(a)` of reference.py in the same folder; it returns its results. A GPU
backend is `twice(a, out)` of triton.py or cuda.py in that folder. `twice(x, 2.0)` calls the op.

If PyTorch would only run the op, a call goes directly to the backend: with plain tensors on a CPU or a CUDA device, and without
compilation, export, functorch transform, mode or tracer. Otherwise it calls torch.ops.sprompt.twice. Both run the same code on
the same arguments.
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sprompt import backends

LIBRARY = torch.library.Library("sprompt", "DEF")
#: Every op by name.
OPS: dict[str, Op] = {}

Args = Any  # a named tuple of the arguments of an op
Function = Callable[..., Any]


class Op:
    """One op. Made by `op`, completed by its decorators."""

    def __init__(
        self, outputs: Function, gpu: tuple[str, ...], computes: tuple[str, ...] | None, dynamic: bool
    ) -> None:
        self.name = outputs.__name__
        self.outputs = outputs
        self.dynamic = dynamic
        names = tuple(inspect.signature(outputs).parameters)
        self.args: Any = collections.namedtuple(f"{self.name}_args", names)  # type: ignore[misc]  # the name is not a literal
        typed = inspect.get_annotations(outputs)
        computing = computes if computes is not None else tuple(n for n in names if typed[n] in (Tensor, Tensor | None))
        self.computes = tuple(map(names.index, computing))
        #: The parameters that are lists of tensors, and whether the result is one.
        self.lists = tuple(i for i, n in enumerate(names) if typed[n] == list[Tensor])
        self.returns_list = typed["return"] == list[Tensor]
        self.check_values: Function | None = None
        self.save: Function | None = None
        self.gradients: Function | None = None
        self.function = _autograd_function(self)
        OPS[self.name] = self

        folder = outputs.__module__.rpartition(".")[0]  # sprompt.ops.<folder>.op
        for name in ("reference", *gpu):
            backends.add(self.name, name, _lazy(f"{folder}.{name}", self.name))
        LIBRARY.define(
            self.name + torch.library.infer_schema(outputs, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        # One kernel for all devices. It chooses a backend of the device itself.
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sprompt::{self.name}", outputs, lib=LIBRARY)
        self.dispatched = getattr(torch.ops.sprompt, self.name).default
        #: Whether the op is differentiable. Backward ops count as differentiable, so that a double backward raises an error.
        self.differentiable = self.name.endswith("_backward")
        if self.differentiable:
            self._register_gradient()

    # -- decorators that complete the declaration

    def native(self, function: Function) -> Function:
        """The CPU kernel: function(a, *outputs)."""
        backends.add(self.name, "native", function)
        return function

    def values(self, function: Function) -> Function:
        """Checks that read values: function(a) raises if a value is wrong. Runs only for CPU tensors, before every backend:
        reading from a GPU would wait for it."""
        self.check_values = function
        return function

    def saves(self, function: Function) -> Function:
        """Saves what the backward needs: function(ctx, a, *outputs)."""
        self.save = function
        return function

    def backward(self, function: Function) -> Function:
        """function(ctx, needs, *gradients of the outputs) -> the gradient of the first parameter, or a tuple of the gradients
        of the first few parameters. None means no gradient. `needs` says which gradients are needed; the others are ignored.
        The gradient of a list of tensors is a list, and so is what `needs` says of it."""
        self.gradients, self.differentiable = function, True
        self._register_gradient()
        return function

    def _register_gradient(self) -> None:
        torch.library.register_autograd(f"sprompt::{self.name}", self._backward, setup_context=self._setup, lib=LIBRARY)

    # -- calls

    def __call__(self, *args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            # A mode, a tracer or a transform of this thread must see the call.
            or _included().raw_repr() & _SPECIAL
            or torch._C._len_torch_function_stack()
            or forward_ad._current_level >= 0
        ):
            return self._dispatch(args)
        recording = False
        for x in self.spread(args) if self.lists else args:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if _keys(x).raw_repr() not in _PLAIN_KEYS and not _is_plain(x):
                    return self._dispatch(args)
                if x.requires_grad:
                    recording = True
            elif kind not in _SCALARS and not (kind is list and _INTEGERS.issuperset(map(type, x))):
                # a subclass or a symbol
                return self._dispatch(args)
        if torch.autograd.profiler._is_profiler_enabled:
            with torch._C._profiler._RecordFunctionFast(f"sprompt::{self.name}"):
                return self._direct(args, recording)
        return self._direct(args, recording) if recording else self.run(*args)

    def _dispatch(self, args: tuple[Any, ...]) -> Any:
        if not self.differentiable:
            args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        return self.dispatched(*args)

    def _direct(self, args: tuple[Any, ...], recording: bool) -> Any:
        if not recording or not torch.is_grad_enabled():
            return self.run(*args)
        if self.differentiable:
            if not self.lists and not self.returns_list:
                return self.function.apply(*args)
            out = self.function.apply(*self.spread(args), [len(args[i]) for i in self.lists])
            return list(out) if self.returns_list else out
        with torch.no_grad():
            return self.run(*args)

    def spread(self, args: Any) -> list[Any]:
        """The arguments with the tensors of a list in place of the list, because autograd.Function ignores tensors in lists."""
        spread = list(args)
        for i in reversed(self.lists):
            spread[i : i + 1] = spread[i]
        return spread

    def gathered(self, spread: Any, lengths: list[int]) -> tuple[Any, ...]:
        """The arguments from `spread` and the lengths of their lists."""
        args = list(spread)
        for i, length in zip(self.lists, lengths, strict=True):
            args[i : i + length] = [args[i : i + length]]
        return tuple(args)

    def run(self, *args: Any) -> Any:
        """Runs the op on the first backend that can run it."""
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        float64 = False
        for i in self.computes:
            x = args[i]
            if x is not None and x.dtype is torch.float64:
                float64 = True
        backend = backends.choose(self.name, first.device, float64)
        a = self.args._make(args)
        if self.check_values is not None and first.is_cpu:
            self.check_values(a)
        if self.dynamic or backend.name == "reference":
            return backend.run(a)
        out = self.outputs(*args)
        if type(out) is tuple:
            backend.run(a, *out)
        else:
            backend.run(a, out)
        return out

    # -- gradients, used by both autograd.Function and torch.library

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self.save is not None:
            self.save(ctx, self.args._make(inputs), *(output if isinstance(output, tuple) else (output,)))

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        return self._found(ctx, ctx.needs_input_grad, grads)

    def _found(self, ctx: Any, flags: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients of all parameters. `flags` says which are needed, with a list for a list of tensors."""
        if self.gradients is None:
            raise RuntimeError(f"double backward of {self.name.removesuffix('_backward')} is not supported")
        needs = self.args._make(flags)
        found = self.gradients(ctx, needs, *grads)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(_needed(need, grad) for need, grad in itertools.zip_longest(needs, found))


def op(*gpu: str, computes: tuple[str, ...] | None = None, dynamic: bool = False) -> Callable[[Function], Op]:
    """Declares an op. The decorated function allocates its outputs, and the function's annotated parameters are the schema.

    gpu: the op's GPU backends, "triton" and "cuda", in the order in which they are tried.
    computes: compiled kernels do not run if one of these parameters is float64; default: every tensor (no list of tensors).
    dynamic: the sizes of the outputs depend on values. Backends make and return the outputs, and the function is only the
        fake kernel.
    """
    return lambda outputs: Op(outputs, gpu, computes, dynamic)


def new(like: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(sizes, dtype=dtype). For a plain tensor on the CPU it is faster, because half of the time of a call is
    allocation."""
    if type(like) is Tensor and like.is_cpu and not torch.are_deterministic_algorithms_enabled():
        return _empty_strided_cpu(sizes, _strides(sizes), dtype or like.dtype)
    return like.new_empty(sizes, dtype=dtype)


# Inductor's programs allocate with this function. It does not fill new memory, which deterministic algorithms require.
_empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]  # the stubs lack it


@functools.lru_cache(1024)
def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _lazy(module: str, function: str) -> Function:
    """The function of a module. The module is imported when the function first runs."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return run


def _needed(need: Any, grad: Any) -> Any:
    if isinstance(need, list):
        return [_needed(*each) for each in zip(need, grad or [None] * len(need), strict=True)]
    return grad if need else None


def _autograd_function(op: Op) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        out = op.run(*args)
        op._setup(ctx, args, out)
        return out

    def forward_of_lists(ctx: Any, *args: Any) -> Any:  # Op.spread, and the lengths of the lists
        ctx.lengths = args[-1]
        out = forward(ctx, *op.gathered(args[:-1], ctx.lengths))
        return tuple(out) if op.returns_list else out

    def backward_of_lists(ctx: Any, *grads: Any) -> Any:
        flags = op.gathered(ctx.needs_input_grad[:-1], ctx.lengths)
        return *op.spread(op._found(ctx, flags, grads)), None

    has_lists = op.lists or op.returns_list
    members = {
        "forward": staticmethod(forward_of_lists if has_lists else forward),
        "backward": staticmethod(backward_of_lists if has_lists else op._backward),
    }
    return type(op.name, (torch.autograd.Function,), members)


# -- whether PyTorch would only run the op


_keys = torch._C._dispatch_keys
_SCALARS = frozenset((int, float, bool, str, type(None)))
_INTEGERS = frozenset((int,))


def _known(device: torch.device) -> set[int]:
    """Dispatch keys of a plain tensor of the device: its kernel, autograd and autocast. Fake, functional, sparse, negated and
    functorch's tensors have more keys."""
    ordinary = _keys(torch.empty(0, device=device)).raw_repr()
    with torch.inference_mode():
        return {ordinary, _keys(torch.empty(0, device=device)).raw_repr()}


_PLAIN_KEYS = _known(torch.device("cpu"))
_included = torch._C._dispatch_tls_local_include_set
#: The keys of modes, tracers and functorch's transforms: all keys except those that every thread has.
_SPECIAL = ~_included().raw_repr()


def _is_plain(x: Tensor) -> bool:
    """Called for keys that are not known yet. The first tensor on a GPU adds the keys of its device."""
    if x.is_cuda:
        known = _known(x.device)
        if not known <= _PLAIN_KEYS:
            _PLAIN_KEYS.update(known)
            return _keys(x).raw_repr() in known
    return False
