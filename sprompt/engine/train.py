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
    """What `sprompt.data.loader.Batches` offers: micro-batches that depend on (seed, epoch, place) only."""

    @property
    def steps(self) -> int: ...  # micro-batches of an epoch, a multiple of `whole`

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]: ...


class TrainResult(NamedTuple):
    step: int  # optimiser steps taken in all
    epochs: int  # epochs finished
    last: dict[str, float]  # the means of the last line of the log that this call wrote; empty if none
    resumed: int  # the step that it went on from


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
    """Trains `task` in place, from the newest checkpoint of `out` or from the beginning, on one process or on those of
    accelerate's launcher.

    Args:
        task: (batch, step) -> (loss, logs): the loss is a scalar with gradient; logs are detached scalars, of the same names in
            all processes. `step` counts micro-batches, so that what is drawn from it differs among those of one step. What is in
            its state_dict is what a checkpoint holds; parameters without requires_grad stay as they are.
        batches: called with batch_size (of a micro-batch, over all processes), whole (micro-batches of a step), seed, rank, world and
            workers; gives this process's
            part of them. `functools.partial(Batches, dataset, prepare, collate)` is one.
        out: gets log.jsonl, tensorboard/ and checkpoints/.
        cpu: train on the CPU where there is a GPU.
        resume: False refuses a folder that has checkpoints.
        identity: what, besides the configuration, must be the same for a run to be resumed, as JSON: the model's configuration,
            the data's path and size.
        record: what out/config.yaml shall hold; written once the run is known to be the folder's.
        after_epoch: called by every process with the number of epochs done; the numbers that it returns (e.g. an evaluation's) are
            logged. The task is in training mode before and after.
        progress: show a bar, or lines where there is no terminal.

    A run that was killed at any point and is started again gives, on a CPU, the same losses and weights bit for bit as one that
    was not, with one or two processes (more may sum in another order). Every step seeds the global generators of torch, numpy and
    random by (seed, step, rank), so this holds for what draws from them as well.

    Raises ValueError for what cannot be trained, before the first step; CheckpointError if there are only damaged checkpoints;
    TrainingError for a loss or gradient that is not finite, with the pictures' names: on a CPU in that very step, on a GPU, which
    is not waited for, at the next line of the log; the weights never take in such a step. Interrupted (a SystemExit) after SIGINT or
    SIGTERM, with a checkpoint.
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
    seconds: float  # of a step
    measured: int  # steps that this is the mean of
    steps: int  # of the whole training
    bytes: (
        int  # peak of the memory: of the GPU if it trains on one, else of this process, without the processes that read
    )
    device: torch.device


def trial(
    task: nn.Module, batches: Callable[..., Loader], config: TrainConfig, *, cpu: bool = False, steps: int = 3
) -> Trial:
    """How long each step of `train` takes with these arguments, and how much memory. Takes one step and then `steps` more, which are
    measured; a shorter training is measured as far as it goes. Leaves no files. The weights of `task` change."""
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
    """A call of `train`: the state of the loop, and its parts in the order in which they are called."""

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
        if self.main and config.warmup_steps >= whole:
            warnings.warn(
                f"warmup_steps: should be well below the {whole} steps of the run, got {config.warmup_steps}: the learning rate "
                f"never comes to its full value; try warmup_steps {whole // 10}, and a smaller batch_size or more epochs",
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
                "precision: bf16 can take a hundred times as long as float32 on this CPU, which has no instructions for it; take "
                "precision no, or a GPU",
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
        self.stream: Iterator[Any] | None = None  # batches of the epoch that is going on
        self._restore(resume)
        self.resumed = self.step
        self.model = accelerator.prepare_model(task)  # gives every process the weights and buffers of the first

    def _restore(self, resume: bool) -> None:
        saved = self.checkpoints.latest() if self.main else None
        if saved is not None:
            if not resume:
                raise ValueError(
                    f"{self.out}: must have no checkpoints, got {saved.path.name}; resume it, or choose another folder"
                )
            check_same(saved.state["identity"], self.identity, self.out)
        state = restore(self.accelerator, self.task, self.optimiser, saved)
        if state is not None:
            self.step, self.seconds = state["step"], state["seconds"]
            self.meter.load(state["meter"], self.device)

    def start(self, stack: ExitStack, progress: bool, record: str | None) -> None:
        """Writes config.yaml, opens the log and the progress bar, all of the first process only."""
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
        self.pictures = 0  # since the last line
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
        """The next step, from the next batch; whether it shall be the last one for now."""
        epoch, place = divmod(self.step, self.epoch_steps)
        if self.stream is None:
            self.stream = self.loader.epoch(epoch, place * self.config.accumulate)
        stop = self._take_step(self.stream, epoch, signals)
        if self.step % self.epoch_steps == 0:
            self.stream = None
        return stop

    # -- one step
    def _take_step(self, stream: Iterator[Any], epoch: int, signals: Signals) -> bool:
        """A step of the optimiser; whether it shall be the last one for now."""
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
        self.optimiser.found_inf = self.guard.add(self.step + 1, means["loss"], sums["loss"], norm, names)  # type: ignore[attr-defined]
        if on_cpu:
            self.guard.check()
        self.optimiser.step()
        self.meter.add({**means, "grad_norm": norm})
        self.step += 1
        log_now = self.step % config.log_steps == 0 or self.step >= self.steps
        if log_now:
            self._write_line(rate)
        self.progress.advance(note=f"epoch {epoch + 1}" + (f", loss {self.last['loss']:.4g}" if self.last else ""))
        # All processes must stop at the same step. On a GPU they ask each other only when they wait for it anyway.
        return bool(signals.number) if self.world == 1 else (on_cpu or log_now) and bool(asked > 0)

    def _backward(self, batch: Any, step: int, count: int) -> dict[str, Tensor]:
        """Adds the gradient of a micro-batch, of `count`. Returns the loss and the task's scalars, float32."""
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
        """The means of the scalars over all processes, and of how many were asked to stop; in one exchange, in order of name."""
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
        """Whether it is time for a checkpoint that the first process writes without asking the others: only where no step waits
        for its check."""
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
        self.accelerator.wait_for_everyone()  # the launcher ends all processes when the first has ended
        message = f"stopped at step {self.step} of {self.steps}; start the same command again to go on from {self.out}"
        if self.main:
            print(message, file=sys.stderr, flush=True)
        raise Interrupted(message, number or signal.SIGTERM)
