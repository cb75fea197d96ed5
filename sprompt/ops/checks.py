"""Argument checks of the public functions. One wording: `op: arg must <rule>, got <value>; <what to do>`.

An argument of the wrong kind (not a tensor, wrong dtype) raises TypeError, any other error ValueError. Checks read only shapes,
dtypes and devices, so they trace under torch.compile and never wait for a GPU. Checks of values (counts_within) run inside an
op's CPU kernels.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: The largest whole number that an op takes.
INT64 = 2**63 - 1
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class NotFiniteError(ValueError):
    """A value that must be finite is NaN or infinite."""


def bad_value(op: str, arg: str, rule: str, got: object, advice: str = "") -> NoReturn:
    raise ValueError(f"{op}: {arg} must {rule}, got {got}" + (f"; {advice}" if advice else ""))


def bad_type(op: str, arg: str, rule: str, got: object, advice: str = "") -> NoReturn:
    raise TypeError(f"{op}: {arg} must {rule}, got {got}" + (f"; {advice}" if advice else ""))


def _sizes(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"


def tensor(op: str, arg: str, value: Any, dtypes: Sequence[torch.dtype], advice: str = "") -> None:
    if not isinstance(value, Tensor):
        bad_type(op, arg, "be a tensor", type(value).__name__, advice)
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        bad_type(op, arg, f"have dtype {names}", str(value.dtype).removeprefix("torch."), advice)


def shape(op: str, arg: str, value: Tensor, form: str, sizes: Sequence[int | None], advice: str = "") -> None:
    """Checks the shape of `value` against `sizes` (None: any size). `form` names the sizes by letters: shape(op, "scores", s,
    "(N,)", (12,))."""
    found = value.shape
    if len(found) == len(sizes):
        for got, want in zip(found, sizes):  # noqa: B905  # faster without strict=
            if want is not None and got != want:
                break
        else:
            return
        if None not in sizes:
            form += f" = {_sizes(sizes)}"  # type: ignore[arg-type]  # no size is None here
    bad_value(op, arg, f"have shape {form}", _sizes(found), advice)


def same_device(op: str, **tensors: Tensor | None) -> None:
    for value in tensors.values():
        if value is not None and not value.is_cpu:
            break
    else:
        return
    given = {name: value.device for name, value in tensors.items() if value is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            bad_value(op, name, f"be on the device of {first} ({given[first]})", device, "move one of them with .to()")


def as_matmul(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype, by the rule of torch.matmul: the autocast dtype inside of autocast, else the widest dtype.
    float64 stays."""
    first = tensors[0]
    dtype, device = first.dtype, first.device.type
    for other in tensors:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)


def choice(op: str, arg: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        bad_value(op, arg, "be one of " + ", ".join(repr(c) for c in choices), repr(value))


def number(op: str, arg: str, value: Any, rule: str, low: float | None = None, high: float | None = None) -> None:
    """Checks for a finite real number in [low, high]. `rule` says this in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        bad_type(op, arg, rule, repr(value))
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        bad_value(op, arg, rule, value)


def whole(op: str, arg: str, value: Any, rule: str, low: int = 0, high: int | None = None) -> None:
    """Checks for a whole number in [low, high]. `rule` says this in words. Without `high`, the number must fit into 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        bad_type(op, arg, rule, repr(value))
    if value < low or (high is not None and value > high):
        bad_value(op, arg, rule, value)
    if type(value) is int and value > INT64:  # a SymInt has 64 bits
        bad_value(op, arg, f"be at most {INT64}", value)


def counts(op: str, value: Any, batch: int) -> None:
    """Checks that counts is None or int64 (B,)."""
    if value is None:
        return
    tensor(op, "counts", value, (torch.int64,), "say how many entries of each row are real")
    shape(op, "counts", value, "(B,)", (batch,), "give one count per image")


def counts_within(op: str, value: Tensor | None, limit: int, arg: str = "counts") -> None:
    """Checks that the values of counts lie in [0, limit]. It reads the values, so call it in CPU kernels only: reading from a
    GPU would wait for it."""
    if value is None or value.device.type != "cpu" or value.numel() == 0:
        return
    values = value.tolist()  # one count per image: faster than two reductions
    low, high = min(values), max(values)
    if low < 0 or high > limit:
        bad_value(
            op, arg, f"lie between 0 and {limit}", low if low < 0 else high, "counts cannot exceed the padded length"
        )
