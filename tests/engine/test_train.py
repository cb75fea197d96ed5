"""The training loop: its numbers, its files, resuming, and stopping."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import PICTURES, Loader, Numbers, Task, config

from sprompt.engine import CheckpointError, TrainConfig, TrainingError, train
from sprompt.engine.guard import Guard
from sprompt.engine.log import Log, Meter, read_log
from sprompt.engine.optim import factor_at
from sprompt.seeding import seed_all

TOY = Path(__file__).with_name("toy.py")


def run(out: Path, task: Task | None = None, loader: Any = Loader, **changes: Any) -> Task:
    task = task or Task()
    kwargs = {k: changes.pop(k) for k in ("resume", "identity", "after_epoch") if k in changes}
    train(task, loader, config(**changes), out, cpu=True, progress=False, **kwargs)
    return task


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl") if "loss" in line]


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def plainly(c: TrainConfig) -> tuple[Task, list[float]]:
    """The same training in plain PyTorch: torch's unfused AdamW, whole batches, one group."""
    task = Task().train()
    optimiser = torch.optim.AdamW(
        [p for p in task.parameters() if p.requires_grad], betas=c.betas, weight_decay=c.weight_decay
    )
    loader = Loader(c.batch_size, 1, c.seed, 0, 1, 0)
    values = []
    for step in range(c.epochs * loader.steps):
        epoch, place = divmod(step, loader.steps)
        optimiser.param_groups[0]["lr"] = c.learning_rate * factor_at(c, step, loader.steps)
        loss, _ = task(next(loader.epoch(epoch, place)), step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), c.clip or math.inf)
        optimiser.step()
        values.append(loss.item())
    return task, values


def test_it_is_the_training_written_down(tmp_path: Path) -> None:
    expected, values = plainly(config())
    task = run(tmp_path)
    np.testing.assert_allclose([v for _, v in losses(tmp_path)], values, rtol=1e-5)
    for p, q in zip(task.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_lines_are_means_and_say_what_happened(tmp_path: Path) -> None:
    run(tmp_path / "each")
    run(tmp_path / "mean", log_steps=8)
    each = [v for _, v in losses(tmp_path / "each")]
    assert [s for s, _ in losses(tmp_path / "mean")] == [8, 16, 20]
    np.testing.assert_allclose(
        [v for _, v in losses(tmp_path / "mean")],
        [np.mean(each[:8]), np.mean(each[8:16]), np.mean(each[16:])],
        rtol=1e-5,
    )
    line = read_log(tmp_path / "mean/log.jsonl")[1]
    assert set(line) == {
        "step",
        "epoch",
        "loss",
        "error",
        "monitor/step",
        "grad_norm",
        "lr",
        "seconds",
        "images_per_second",
    }
    assert line["epoch"] == 3.2 and line["monitor/step"] == 11.5 and line["lr"] == pytest.approx(0.002)
    assert list((tmp_path / "mean/tensorboard").glob("events.*"))
    assert [p.name for p in (tmp_path / "mean/checkpoints").iterdir()] == ["step-00000020"]


def test_micro_batches_are_averaged(tmp_path: Path) -> None:
    class Plain(Task):
        def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss = ((self.head(self.backbone(batch.inputs)) - batch.targets) ** 2).mean()
            return loss, {}

    settings = {"batch_size": 8, "optimiser": "sgd", "learning_rate": 1e-3}
    run(tmp_path / "whole", Plain(), **settings)
    run(tmp_path / "parts", Plain(), accumulate=2, **settings)
    # 20 pictures: two steps of 8, and one step of 4 that is filled up to 8; with micro-batches too
    for name in ("loss", "grad_norm"):
        whole, parts = ([line[name] for line in read_log(tmp_path / f / "log.jsonl")] for f in ("whole", "parts"))
        assert len(whole) == 12
        np.testing.assert_allclose(whole, parts, rtol=1e-5)


def test_bfloat16_and_sgd_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An unknown processor, so that there is no warning about slow bf16.
    monkeypatch.setattr("sprompt.machine.CPUINFO", tmp_path / "none")
    run(tmp_path, precision="bf16", optimiser="sgd", learning_rate=0.002, clip=None, epochs=40, drops=())
    values = [v for _, v in losses(tmp_path)]
    assert np.mean(values[-20:]) < 0.7 * np.mean(values[:20])


class Stops(Task):
    """A task that fails in its tenth step, in the middle of an epoch and of a log line of seven steps."""

    def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == 9:
            raise RuntimeError("the lights went out")
        return super().forward(batch, step)


@pytest.mark.parametrize("log_steps", [1, 7])
def test_going_on_gives_the_same_bits(tmp_path: Path, log_steps: int) -> None:
    settings = {"log_steps": log_steps, "checkpoint_steps": 2}
    straight = run(tmp_path / "straight", Task(0.3), **settings)
    with pytest.raises(RuntimeError, match="the lights went out"):
        run(tmp_path / "parts", Stops(0.3), **settings)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    other = Task(0.3)
    torch.nn.init.zeros_(other.head.weight)
    assert same(run(tmp_path / "parts", other, **settings), straight)
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    longer = run(tmp_path / "parts", Task(0.3), epochs=5, **settings)
    assert not same(longer, straight) and losses(tmp_path / "parts")[-1][0] == 25


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = run(tmp_path)
    text = (tmp_path / "log.jsonl").read_text()
    result = train(task := Task(), Loader, config(), tmp_path, cpu=True, progress=False)
    assert same(task, first) and (tmp_path / "log.jsonl").read_text() == text
    assert result.step == result.resumed == PICTURES and result.epochs == 4


# -- killed
def start(out: Path, **settings: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOY.parents[2])}
    command = [sys.executable, str(TOY), str(out), json.dumps(settings)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


def lines(out: Path) -> int:
    return len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0


def test_killed_and_killed_again(tmp_path: Path) -> None:
    """SIGKILL comes at any moment: in a step, in a checkpoint, in a line of the log."""
    settings = {"dropout": 0.3, "epochs": 20, "checkpoint_steps": 1, "keep": 1}
    straight = run(tmp_path / "straight", Task(0.3), epochs=20)
    out = tmp_path / "killed"
    for _ in range(2):
        before = lines(out)
        process = start(out, slow=True, **settings)
        wait_for(lambda before=before: lines(out) > before + 3, process)
        time.sleep(random.Random(time.time_ns()).random() * 0.1)
        process.kill()
        process.communicate()
    assert 3 < lines(out) < 100
    process = start(out, **settings)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert losses(out) == losses(tmp_path / "straight")
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in straight.state_dict().items())
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000100"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, slow=True, epochs=40)
    wait_for(lambda: lines(tmp_path) > 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    step = losses(tmp_path)[-1][0]
    assert f"stopped at step {step} of 200; start the same command again to go on from {tmp_path}" in errors
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]


# -- what goes wrong
def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, identity={"model": {"depth": 50}, "pictures": 20})
    message = (
        r"goes on with the settings that it began with, got other betas \(was \[0.9, 0.999\], now \[0.9, 0.99\]\); "
        r"model.depth \(was 50, now 18\); seed \(was 0, now 1\); give the old values, or choose another folder"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, betas=(0.9, 0.99), seed=1, identity={"model": {"depth": 18}, "pictures": 20})
    with pytest.raises(ValueError, match=r"pictures \(was 20, now absent\)"):
        run(tmp_path, identity={"model": {"depth": 50}})
    with pytest.raises(ValueError, match="must have no checkpoints, got step-00000003"):
        run(tmp_path, resume=False)
    with pytest.raises(ValueError, match=r'model.backbone \(was absent, now "efficientnet-lite0"\)'):
        run(tmp_path, identity={"model": {"depth": 50, "backbone": "efficientnet-lite0"}, "pictures": 20})
    later = {"depth": 50, "later": None, "backbone": "resnet"}
    run(tmp_path, epochs=5, keep=3, log_steps=2, identity={"model": later, "pictures": 20})


def test_a_cosine_knows_its_end(tmp_path: Path) -> None:
    run(tmp_path, schedule="cosine", max_steps=3)
    with pytest.raises(ValueError, match=r"epochs \(was 4, now 5\)"):
        run(tmp_path, schedule="cosine", epochs=5)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("task.safetensors", lambda data: data[:-8]),
        ("optimiser.safetensors", lambda data: data[:-8] + bytes(8 * [255])),
        ("state.json", lambda data: data[: len(data) // 2]),
        ("state.json", lambda data: b"[]"),
        ("task.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: Any) -> None:
    straight = run(tmp_path / "straight")
    run(tmp_path / "run", max_steps=9, checkpoint_steps=3)
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000006", "step-00000009"]
    path = folder / "step-00000009" / file
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"step-00000009: is damaged \(.*; trying the older one"):
        resumed = run(tmp_path / "run", keep=1)
    assert same(resumed, straight) and losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert [p.name for p in folder.iterdir()] == ["step-00000020"]


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_only_damaged_checkpoints_do_not_start_anew(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3)
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold a checkpoint that is whole, got 1 damaged"):
        run(tmp_path)


def test_a_picture_that_is_not_finite_is_named(tmp_path: Path) -> None:
    loader = partial(Loader, broken=7)
    order = torch.randperm(PICTURES, generator=torch.Generator().manual_seed(0)).tolist()
    step = order.index(7) // 4
    names = ", ".join(f"picture {i}" for i in order[4 * step : 4 * step + 4])
    task = Task()
    with pytest.raises(
        TrainingError, match=f"step {step + 1}: the loss must be finite, got NaN or infinity, on {names}; "
    ):
        run(tmp_path, task, loader)
    assert same(task, run(tmp_path / "before", max_steps=step)) if step else True
    assert not (tmp_path / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Root(Task):
        def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, logs = super().forward(batch, step)
            return loss + (0.0 * self.head.weight[0, 0]).sqrt() if step == 2 else loss, logs

    with pytest.raises(TrainingError, match="step 3: the gradient must be finite, got NaN or infinity, on picture"):
        run(tmp_path, Root())


def test_a_cost_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from sprompt.ops import linear_assignment

    class Matching(Task):
        def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            linear_assignment(torch.full((2, 2), torch.nan if step == 1 else 0.0))
            return super().forward(batch, step)

    with pytest.raises(TrainingError, match=r"step 2: the cost of matching must be finite, .* on picture \d+, picture"):
        run(tmp_path, Matching())


def test_the_guard_names_the_first_wrong_step_since_its_last_check() -> None:
    guard, fine, nan = Guard(), torch.tensor(1.0), torch.tensor(torch.nan)
    assert guard.add(1, fine, fine, fine, ["a"]) == 0
    guard.check()
    assert guard.add(2, fine, fine, fine, ["b"]) == 0
    assert guard.add(3, nan, nan, nan, ["c", "d"]) == 1
    assert guard.add(4, fine, fine, torch.tensor(torch.inf), ["e"]) == 1
    with pytest.raises(TrainingError, match=r"step 3: the loss .* on c, d;"):
        guard.check()


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="warmup_steps: should be well below the 20 steps of the run, got 20"):
        run(tmp_path, warmup_steps=20, max_steps=1)


def test_bfloat16_is_warned_of_where_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("sprompt.machine.CPUINFO", info)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    for line, slow in (
        ("flags : fma avx2 avx512f", True), ("flags : avx512f avx512_bf16", False), ("Features : asimd bf16", False),
        ("Features : asimd", True), ("processor : 0", False),
    ):  # fmt: skip
        info.write_text(f"model name : one\n{line}\n")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(tmp_path / line.replace(" ", ""), precision="bf16", max_steps=1)
        assert [w for w in said if "bf16 can take a hundred times as long" in str(w.message)] if slow else not said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "float32", max_steps=1)


def test_early_errors(tmp_path: Path) -> None:
    class Empty(Loader):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.steps = 0

    with pytest.raises(ValueError, match="the dataset must hold a picture to train on, got none"):
        run(tmp_path, loader=Empty)
    with pytest.raises(ValueError, match="must have a parameter to train, got none"):
        run(tmp_path, Task().requires_grad_(False))  # type: ignore[arg-type]  # returns a Module
    assert not any(tmp_path.iterdir())


# -- the parts
def test_after_an_epoch(tmp_path: Path) -> None:
    calls = []

    def evaluate(epoch: int) -> dict[str, float]:
        calls.append(epoch)
        return {"val/AP": 0.1 * epoch} if epoch > 1 else {}

    run(tmp_path, epochs=2, after_epoch=evaluate)
    run(tmp_path, epochs=3, after_epoch=evaluate)
    assert calls == [1, 2, 3]
    values = [(line["step"], line["val/AP"]) for line in read_log(tmp_path / "log.jsonl") if "val/AP" in line]
    assert values == [(10, 0.2), (15, pytest.approx(0.3))]


def test_the_log_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Log(tmp_path, 2)
    log.write({"step": 3, "loss": 0.5, "monitor/x": math.nan})
    log.close()
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5, "monitor/x": None}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 must be an object with a step, got 'nonsense"):
        read_log(path)


def test_the_meter_goes_through_json_as_it_is() -> None:
    meter, other = Meter(), Meter()
    for value in (0.1, 0.7):
        meter.add({"a": torch.tensor(value)})
    meter.add({"b": torch.tensor(3.0)})
    other.load(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    for m in (meter, other):
        m.add({"a": torch.tensor(1.0)})
    taken = meter.take()
    assert other.take() == taken and taken == {"a": pytest.approx(0.6), "b": 3.0} and meter.take() == {}


def test_generators_differ_by_step_and_process() -> None:
    drawn = set()
    for step, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        seed_all(5, step, rank)
        drawn.add((torch.rand(1).item(), np.random.rand(), random.random()))
    assert len(drawn) == 3
