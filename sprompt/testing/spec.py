"""The form of a spec. tests/test_contract.py asserts the promises of every OpSpec; benchmarks/run.py times every Bench."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One call of a public function. `name` says what is special about it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Any], Any]) -> Sample:
        """The sample with `change` applied to every tensor (BitMasks: to their words)."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Sample(self.name, args, kwargs)

    def bound(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Arguments by parameter name."""
        return dict(inspect.signature(function).bind(*self.args, **self.kwargs).arguments)


@dataclass(frozen=True)
class ErrorCase:
    """A bad call, and the error that it must raise before anything is launched."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str  # a regular expression, matched from the start: r"mask_nms: scores must have shape"


def refusals(function: Callable[..., Any]) -> Callable[..., ErrorCase]:
    """A short way to write a function's error cases: bad("a list", r"logits must be a tensor, got list", [x], error=TypeError).
    The message goes without the function's name; what follows it are the arguments of the call."""

    def bad(name: str, message: str, *args: Any, error: type[Exception] = ValueError, **kwargs: Any) -> ErrorCase:
        return ErrorCase(name, lambda: function(*args, **kwargs), error, f"{function.__qualname__}: {message}")

    return bad


@dataclass(frozen=True)
class OpSpec:
    """What is to be tested of one public function.

    samples(device, dtype, seed) gives valid calls whose float tensors have the dtype: ordinary and odd sizes, empty batches,
    no prompts, no masks, ties, NaN where it has a meaning. Sizes stay small (the reference runs them hundreds of times).
    """

    function: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype, int], list[Sample]]
    #: torch.ops.sprompt ops that a forward call reaches, the main one first.
    ops: tuple[str, ...]
    #: dtypes of the float inputs; () where there are none.
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    #: Parameters that have a gradient; () for an op without.
    gradients: tuple[str, ...] = ()
    #: Independent truth: same arguments (floats as float64), same outputs. None: the reference backend in float64.
    oracle: Callable[..., Any] | None = None
    #: The op as plain PyTorch in the input's dtype, whose own error bounds ours in half types. None: the reference backend.
    eager: Callable[..., Any] | None = None
    #: (relative, absolute) float32 bound of one sample against the oracle, from the length of its reductions.
    bound: Callable[[Sample], tuple[float, float]] = lambda sample: (1e-5, 1e-6)
    #: Replaces the comparison of outputs where bits follow from rounded floats; (actual, expected, sample), asserts.
    compare: Callable[[Any, Any, Sample], None] | None = None
    #: Whether output shapes depend on the values of the input.
    dynamic: bool = False
    #: Whether torch.compile(fullgraph=True) takes it. False only for functions that return Python objects.
    compiles: bool = True
    #: The written rule for autocast: "unchanged" (computes in the dtype of its inputs, widest wins) or "cast" (float inputs
    #: are converted to the autocast dtype, as for torch.matmul).
    autocast: str = "unchanged"
    errors: tuple[ErrorCase, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class Bench:
    """One row of the benchmark table: a shape at which the op is timed.

    make(device, dtype, seed) gives the call. `eager` is the released code's way to write it and takes the same arguments;
    `vectorised` is what torch.compile gets (None: eager itself; False: nothing to compile). `libraries` are the functions that
    a user would pick instead, by name; the row says so where one is not installed. All must agree with the op: `agree`
    (default: equality of integers, closeness of floats) is checked before anything is timed.
    """

    function: Callable[..., Any]
    shape: str  # what the row says: "1102 x (25x34), from dense"
    make: Callable[[torch.device, torch.dtype, int], Sample]
    eager: Callable[..., Any]
    vectorised: Callable[..., Any] | bool | None = None
    libraries: dict[str, Callable[..., Any]] = field(default_factory=dict)
    agree: Callable[[Any, Any, Sample], None] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    #: Operations (multiply and add count as two) and least bytes (inputs read once, outputs written once) of one forward.
    flops: float = 0.0
    bytes: float = 0.0
    #: Parameters that get a gradient in the modes backward and full.
    gradients: tuple[str, ...] = ()
    #: The device type whose table has the row. "cuda": the paper's batch, 12 images; also compiled ahead of time and counted
    #: on machines without a GPU (sprompt/testing/compiled.py).
    device: str = "cpu"
    #: Wanted ratios, eager / ours: {"forward": 5.0, "full": 4.0, "memory": 10.0, "forward bfloat16": 3.0}; under the name of a
    #: library, its time / ours in a forward: {"scipy": 2.0}.
    goals: dict[str, float] = field(default_factory=dict)


class Prepared:
    """A rival's own form of an input, such as RLEs or float masks: made once an object, so that it is not timed. The objects are
    kept, since another could get the id of one that is gone."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.made: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __call__(self, value: Any, *options: Any) -> Any:
        for known, with_options, form in self.made:
            if known is value and with_options == options:
                return form
        if len(self.made) == 32:  # the copies of a row, of two inputs each
            self.made.clear()
        self.made.append((value, options, self.make(value, *options)))
        return self.made[-1][2]


def random(seed: int) -> torch.Generator:
    """A CPU generator: samples are drawn on the CPU and moved, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed)


def blobs(count: int, height: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Masks such as networks predict, as soft values in [0, 1], (count, height, width): one ellipse each, of random place, size
    (a tenth to half of the sides) and angle, with a smooth edge."""
    g = random(seed)
    u = torch.rand(5, count, 1, 1, generator=g)
    y, x = torch.meshgrid(torch.arange(height) / max(height, 1), torch.arange(width) / max(width, 1), indexing="ij")
    angle = 3.14159 * u[0]
    dx, dy = x - u[1], y - u[2]
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    radius = (along / (0.05 + 0.2 * u[3])) ** 2 + (across / (0.05 + 0.2 * u[4])) ** 2
    return torch.sigmoid(4 * (1 - radius)).to(device)


def smooth(
    count: int, coarse: tuple[int, int], height: int, width: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Normal noise of size `coarse`, upsampled to (count, height, width). Above a threshold it makes masks that overlap: large
    areas all over the image, with holes, whose boxes are the whole image."""
    noise = torch.randn(1, count, *coarse, generator=random(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].to(device)
