"""The training loop, for every method."""

from __future__ import annotations

import math
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from sprompt.atomic import atomic_write
from sprompt.engine.checkpoint import Checkpoints
from sprompt.engine.config import TrainConfig
from sprompt.engine.guard import Guard, Interrupted, Signals, TrainingError, listed
from sprompt.engine.log import Log, Meter
from sprompt.engine.optim import factor_at, make_optimiser, optimiser_tensors, set_rate
from sprompt.engine.processes import processes
from sprompt.engine.progress import Progress
from sprompt.engine.resume import check_same, restore, versions
from sprompt.machine import busy, has_bf16
from sprompt.nn.distributed import is_first
from sprompt.ops.checks import NotFiniteError
from sprompt.seeding import seed_all


class Loader(Protocol):
    """The interface of `sprompt.data.loader.Batches`. Its micro-batches depend only on (seed, epoch, place)."""

    @property
    def steps(self) -> int: ...  # micro-batches of an epoch, a multiple of `whole`

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]: ...


class TrainResult(NamedTuple):
    step: int  # number of optimiser steps in all
    epochs: int  # number of complete epochs
    last: dict[str, float]  # the means in the last line of the log of this call; empty if it wrote no line
    resumed: int  # the step from which the run went on


def train(
    task: nn.Module,
    batches: Callable[..., Loader],
    config: TrainConfig,
    out: Path,
    *,
    cpu: bool = False,
    resume: bool = True,
    identity: Mapping[str, Any] | None = None,
    record: str | None = None,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains `task` in place, from the newest checkpoint of `out` or from the beginning. It runs in one process, or in all
    processes of accelerate's launcher.

    Args:
        task: (batch, step) -> (loss, logs). The loss is a scalar with gradient. The logs are detached scalars with the same
            names in all processes. `step` counts micro-batches, so that random numbers drawn from it differ between the
            micro-batches of one step. A checkpoint holds the task's state_dict. Parameters without requires_grad do not change.
        batches: called with batch_size (of a micro-batch, over all processes), whole (micro-batches of a step), seed, rank,
            world and workers. Returns this process's part of the batches. An example is `functools.partial(Batches, dataset,
            prepare, collate)`.
        out: folder for log.jsonl, tensorboard/ and checkpoints/.
        cpu: train on the CPU even if there is a GPU.
        resume: False refuses a folder that has checkpoints.
        identity: JSON values that must be the same for a run to be resumed, in addition to the configuration: the model's
            configuration, the data's path and size.
        record: content of out/config.yaml. It is written after the check that the folder belongs to this run.
        after_epoch: called by every process with the number of complete epochs. The numbers that it returns, such as metrics,
            are logged. The task is in training mode before and after the call.
        progress: show a bar in a terminal, or else lines.

    On a CPU with one or two processes, a run that was killed at any point and started again gives the same losses and weights,
    bit for bit, as a run without interruption. (More processes may sum in another order.) Every step seeds the global
    generators of torch, numpy and random by (seed, step, rank), so the same holds for a task that draws from them.

    Raises:
        ValueError: the training is not possible. Raised before the first step.
        CheckpointError: all checkpoints are damaged.
        TrainingError: a loss or gradient is not finite; the message has the pictures' names. On a CPU it is raised in that
            step. On a GPU it is raised at the next line of the log, because the loop does not wait for the GPU. The weights
            never take in such a step.
        Interrupted: a SystemExit after SIGINT or SIGTERM. There is a checkpoint of the last step.
    """
    accelerator = _accelerator(cpu)
    run = _Run(accelerator, task, batches, config, Path(out), identity or {}, resume)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        run.start(stack, progress, record)
        result = run.loop(signals, after_epoch)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


class Trial(NamedTuple):
    seconds: float  # mean time of a step
    measured: int  # number of measured steps
    steps: int  # number of steps of the whole training
    bytes: int  # peak memory of the GPU; on a CPU of this process, without the processes that read
    device: torch.device


def trial(
    task: nn.Module, batches: Callable[..., Loader], config: TrainConfig, *, cpu: bool = False, steps: int = 3
) -> Trial:
    """Measures the time and the memory of a step of `train` with these arguments. It takes one step, then measures `steps`
    more steps. A shorter training is measured to its end. The function leaves no files. The weights of `task` change."""
    accelerator = _accelerator(cpu)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = _Run(accelerator, task, batches, config, Path(folder), {}, resume=False)
        run.start(stack, progress=False, record=None)
        times = [time.monotonic()]
        signals = Signals()
        for _ in range(min(1 + steps, run.steps)):
            run.advance(signals)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            times.append(time.monotonic())
        run.guard.check()
    accelerator.free_memory()
    first = 1 if len(times) > 2 else 0
    measured = len(times) - 1 - first
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Trial((times[-1] - times[first]) / measured, measured, run.steps, peak, run.device)


def _accelerator(cpu: bool) -> Accelerator:
    processes(cpu)
    return Accelerator(
        cpu=cpu, mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    )


class _Run:
    """A call of `train`: the state of the loop, and its methods in the order of their calls."""

    def __init__(
        self, accelerator: Accelerator, task: nn.Module, batches: Callable[..., Loader], config: TrainConfig, out: Path,
        identity: Mapping[str, Any], resume: bool,
    ) -> None:  # fmt: skip
        self.accelerator, self.task, self.config, self.out = accelerator, task, config, out
        self.device, self.main = accelerator.device, is_first()
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        config.check_world(self.world)
        self.loader = batches(
            batch_size=config.batch_size // config.accumulate,
            whole=config.accumulate,
            seed=config.seed,
            rank=self.rank,
            world=self.world,
            workers=config.workers,
        )
        if self.loader.steps < 1:
            raise ValueError("train: the dataset must hold a picture to train on, got none")
        self.epoch_steps = self.loader.steps // config.accumulate
        whole = config.epochs * self.epoch_steps
        if self.main and config.schedule != "epoch_cosine" and config.warmup_steps >= whole:
            warnings.warn(
                f"warmup_steps: should be well below the {whole} steps of the run, got {config.warmup_steps}: the learning rate "
                f"never reaches its full value; try warmup_steps {whole // 10}, and a smaller batch_size or more epochs",
                RuntimeWarning,
                stacklevel=3,
            )
        late = [drop for drop in config.drops if drop >= config.epochs] if config.schedule == "step" else []
        if self.main and late:
            warnings.warn(
                f"drops: should lie before the end of the training after {config.epochs} epochs, got {', '.join(map(str, late))}: the "
                "learning rate never drops there; give --train.drops that fit --train.epochs",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.main and config.precision == "bf16" and self.device.type == "cpu" and not has_bf16():
            warnings.warn(
                "precision: bf16 can take a hundred times as long as float32 on this CPU, which has no instructions for bf16; "
                "take precision no, or a GPU",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.main and self.device.type == "cpu" and torch.get_num_threads() > 1 and (line := busy()) is not None:
            warnings.warn(line, RuntimeWarning, stacklevel=3)
        self.steps = min(whole, config.max_steps or sys.maxsize)
        self.identity = {**config.identity(), **identity, "steps of an epoch": self.epoch_steps}
        self.optimiser = make_optimiser(task.to(self.device).train(), config)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.checkpoints = Checkpoints(out / "checkpoints", config.keep)
        self.meter, self.guard = Meter(), Guard()
        self.step, self.seconds = 0, 0.0
        self.stream: Iterator[Any] | None = None  # batches of the current epoch
        self._restore(resume)
        self.resumed = self.step
        self.model = accelerator.prepare_model(task)  # gives every process the weights and buffers of the first

    def _restore(self, resume: bool) -> None:
        saved = self.checkpoints.latest() if self.main else None
        if saved is not None:
            if not resume:
                raise ValueError(
                    f"{self.out}: must have no checkpoints, got {saved.path.name}; resume the run, or choose another folder"
                )
            check_same(saved.state["identity"], self.identity, self.out)
        state = restore(self.accelerator, self.task, self.optimiser, saved)
        if state is not None:
            self.step, self.seconds = state["step"], state["seconds"]
            self.meter.load(state["meter"], self.device)

    def start(self, stack: ExitStack, progress: bool, record: str | None) -> None:
        """Writes config.yaml and opens the log and the progress bar, in the first process only."""
        self.log: Log | None = None
        if self.main:
            if record is not None:
                atomic_write(self.out / "config.yaml", record)
            self.checkpoints.clean()
            self.log = Log(self.out, self.step)
            stack.callback(self.log.close)
        if self.main and progress and self.step:
            done = "all steps are done" if self.step >= self.steps else f"goes on at step {self.step} of {self.steps}"
            print(f"{self.out}: {done}", file=sys.stderr, flush=True)
        self.progress = stack.enter_context(
            Progress("train", self.steps, done=self.step, show=progress and self.main and self.step < self.steps)
        )
        self.began = self.saved_at = self.logged_at = time.monotonic()
        self.pictures = 0  # number of pictures since the last line of the log
        self.last: dict[str, float] = {}

    def loop(self, signals: Signals, after_epoch: Callable[[int], Mapping[str, float]] | None) -> TrainResult:
        while self.step < self.steps:
            stop = self.advance(signals)
            if self.step % self.epoch_steps == 0 and after_epoch is not None:
                self._finish_epoch(after_epoch)
            every = self.config.checkpoint_steps
            if stop or self.step >= self.steps or (every is not None and self.step % every == 0):
                self.guard.check()
                self._save()
            elif self._due():
                self._save()
            if stop and self.step < self.steps:
                self._interrupt(signals.number)
        return TrainResult(self.step, self.step // self.epoch_steps, self.last, self.resumed)

    def advance(self, signals: Signals) -> bool:
        """Takes the next step. Returns whether the run must stop after it."""
        epoch, place = divmod(self.step, self.epoch_steps)
        if self.stream is None:
            self.stream = self.loader.epoch(epoch, place * self.config.accumulate)
        stop = self._take_step(self.stream, epoch, signals)
        if self.step % self.epoch_steps == 0:
            self.stream = None
        return stop

    # -- one step
    def _take_step(self, stream: Iterator[Any], epoch: int, signals: Signals) -> bool:
        """Takes a step of the optimiser on the next micro-batches of `stream`. Returns whether the run must stop after it."""
        config, on_cpu = self.config, self.device.type == "cpu"
        seed_all(config.seed, self.step, self.rank)
        rate = config.learning_rate * factor_at(config, self.step, self.epoch_steps)
        set_rate(self.optimiser, rate)
        self.optimiser.zero_grad()
        count = config.accumulate
        sums: dict[str, Tensor] = {}
        names: list[str] = []
        for index in range(count):
            batch = next(stream)
            names += batch.names
            self.pictures += len(batch) * self.world
            with nullcontext() if index == count - 1 else self.accelerator.no_sync(self.model):
                values = self._backward(batch.to(self.device), self.step * config.accumulate + index, count)
            for name, value in values.items():
                sums[name] = sums[name] + value / count if name in sums else value / count
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf)
        means, asked = self._over_processes(sums, float(signals.number > 0))
        self.optimiser.found_inf = self.guard.add(  # type: ignore[attr-defined]  # fused optimisers read this attribute
            self.step + 1, means["loss"], sums["loss"], norm, names
        )
        if on_cpu:
            self.guard.check()
        self.optimiser.step()
        self.meter.add({**means, "grad_norm": norm})
        self.step += 1
        log_now = self.step % config.log_steps == 0 or self.step >= self.steps
        if log_now:
            self._write_line(rate)
        self.progress.advance(note=f"epoch {epoch + 1}" + (f", loss {self.last['loss']:.4g}" if self.last else ""))
        # All processes must stop at the same step. On a GPU they read `asked` only at a line of the log, where they wait for
        # the device anyway.
        return bool(signals.number) if self.world == 1 else (on_cpu or log_now) and bool(asked > 0)

    def _backward(self, batch: Any, step: int, count: int) -> dict[str, Tensor]:
        """Adds the gradient of one of `count` micro-batches. Returns the loss and the task's scalars, float32."""
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss, logs = self.model(batch, step)
        except NotFiniteError as error:
            raise TrainingError(
                f"step {self.step + 1}: the cost of matching must be finite, got NaN or infinity, on {listed(batch.names)}; look at "
                "these pictures and their masks, or lower the learning rate"
            ) from error
        (loss / count).backward()
        values = {"loss": loss, **logs}
        return {name: torch.as_tensor(v, device=self.device).detach().float() for name, v in values.items()}

    def _over_processes(self, values: dict[str, Tensor], asked: float) -> tuple[dict[str, Tensor], Tensor]:
        """The means over all processes, of the scalars and of `asked`, in one exchange. The values are exchanged in the
        order of their names, which is the same in all processes."""
        if self.world == 1:
            return values, torch.tensor(asked)
        names = sorted(values)
        both = torch.stack([*(values[name] for name in names), torch.full((), asked, device=self.device)])
        *means, stop = self.accelerator.reduce(both, reduction="mean").unbind()
        return dict(zip(names, means, strict=True)), stop

    # -- between steps
    def _write_line(self, rate: float) -> None:
        self.guard.check()
        self.last = self.meter.take()
        now = time.monotonic()
        speed = self.pictures / max(now - self.logged_at, 1e-9)
        self.logged_at, self.pictures = now, 0
        if self.log is not None:
            self.log.write({
                "step": self.step, "epoch": round(self.step / self.epoch_steps, 4), **self.last, "lr": rate,
                "seconds": round(self._elapsed(), 3), "images_per_second": round(speed, 3),
            })  # fmt: skip

    def _finish_epoch(self, after_epoch: Callable[[int], Mapping[str, float]]) -> None:
        self.guard.check()
        values = after_epoch(self.step // self.epoch_steps)
        self.task.train()
        if self.log is not None and values:
            self.log.write({"step": self.step, "epoch": self.step // self.epoch_steps, **values})

    def _due(self) -> bool:
        """Whether it is time for a checkpoint. The first process writes it without the others, so only if no step waits for
        its check, which all processes take part in."""
        late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        return late and self.main and not self.guard.steps

    def _save(self) -> None:
        if self.log is None:
            return
        self.log.sync()
        state = {
            "epoch": self.step // self.epoch_steps,
            "place": self.step % self.epoch_steps,
            "world": self.world,
            "seconds": self._elapsed(),
            "meter": self.meter.state(),
            "identity": self.identity,
            "versions": versions(),
        }
        self.checkpoints.save(self.step, self.task.state_dict(), optimiser_tensors(self.optimiser, self.task), state)
        self.saved_at = time.monotonic()

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def _interrupt(self, number: int) -> None:
        self.accelerator.wait_for_everyone()  # the launcher ends all processes as soon as one of them has ended
        message = f"stopped at step {self.step} of {self.steps}; start the same command again to go on from {self.out}"
        if self.main:
            print(message, file=sys.stderr, flush=True)
        raise Interrupted(message, number or signal.SIGTERM)
