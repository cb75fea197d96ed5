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
    """One call of a public function. `name` says how it differs from other samples."""

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
    The message is given without the function's name. The arguments of the call follow it."""

    def bad(name: str, message: str, *args: Any, error: type[Exception] = ValueError, **kwargs: Any) -> ErrorCase:
        return ErrorCase(name, lambda: function(*args, **kwargs), error, f"{function.__qualname__}: {message}")

    return bad


@dataclass(frozen=True)
class OpSpec:
    """The tests of one public function.

    samples(device, dtype, seed) gives valid calls with float tensors of this dtype: ordinary and odd sizes, empty batches, no
    prompts, no masks, ties, and NaN where it has a meaning. Sizes are small, because the reference runs them hundreds of times.
    """

    function: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype, int], list[Sample]]
    #: torch.ops.sprompt ops that a forward call reaches, the main op first.
    ops: tuple[str, ...]
    #: dtypes of the float inputs; () where there are none.
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    #: Parameters that have a gradient; () for an op without.
    gradients: tuple[str, ...] = ()
    #: Independent ground truth: same arguments (floats as float64), same outputs. None: the reference backend in float64.
    oracle: Callable[..., Any] | None = None
    #: The op as plain PyTorch in the input's dtype. In half types its error is the bound of our error. None: the reference
    #: backend.
    eager: Callable[..., Any] | None = None
    #: (relative, absolute) error bound of one sample in float32 against the oracle, from the length of its reductions.
    bound: Callable[[Sample], tuple[float, float]] = lambda sample: (1e-5, 1e-6)
    #: Replaces the comparison of outputs if bits depend on rounded floats. Takes (actual, expected, sample) and asserts.
    compare: Callable[[Any, Any, Sample], None] | None = None
    #: Whether output shapes depend on the values of the input.
    dynamic: bool = False
    #: Whether torch.compile(fullgraph=True) can compile it. False only for functions that return Python objects.
    compiles: bool = True
    #: The documented rule for autocast: "unchanged" (computes in the widest dtype of its inputs) or "cast" (float inputs are
    #: converted to the autocast dtype, as for torch.matmul).
    autocast: str = "unchanged"
    errors: tuple[ErrorCase, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class Bench:
    """One row of the benchmark table: a shape at which the op is timed.

    make(device, dtype, seed) gives the call. `eager` is the op as the released code writes it; it takes the same arguments.
    `vectorised` is the function for torch.compile (None: eager; False: nothing to compile). `libraries` are alternative
    functions of other packages, by name; the row says if one is not installed. All results must agree with the op: `agree`
    (default: equality of integers, closeness of floats) runs before the timing.
    """

    function: Callable[..., Any]
    shape: str  # the name of the row: "1102 x (25x34), from dense"
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
    #: The device type of the row's table. "cuda" rows have the paper's batch of 12 images. They are also compiled ahead of
    #: time, and their traffic is counted, on machines without a GPU (sprompt/testing/compiled.py).
    device: str = "cpu"
    #: Goals for the ratio eager / ours: {"forward": 5.0, "full": 4.0, "memory": 10.0, "forward bfloat16": 3.0}. The name of a
    #: library is a goal for its time / ours in a forward: {"scipy": 2.0}.
    goals: dict[str, float] = field(default_factory=dict)


class Prepared:
    """An input in the form that another library needs, such as RLEs or float masks. It is made once per object, so that the
    conversion is not timed. The objects are kept alive, so that an `is` comparison is safe."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.made: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __call__(self, value: Any, *options: Any) -> Any:
        for known, with_options, form in self.made:
            if known is value and with_options == options:
                return form
        if len(self.made) == 32:  # enough for the copies of a row with two inputs
            self.made.clear()
        self.made.append((value, options, self.make(value, *options)))
        return self.made[-1][2]


def random(seed: int) -> torch.Generator:
    """A CPU generator. Samples are drawn on the CPU and moved, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(seed)


def blobs(count: int, height: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Soft masks in [0, 1], (count, height, width), like the predictions of a network. Each is an ellipse with a smooth edge,
    and with random place, size (a tenth to half of the sides) and angle."""
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
    """Normal noise of size `coarse`, upsampled to (count, height, width). Above a threshold it gives overlapping masks: large
    areas with holes all over the image. Their boxes are the whole image."""
    noise = torch.randn(1, count, *coarse, generator=random(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].to(device)
