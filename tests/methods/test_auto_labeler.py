"""Training of Mask Auto-Labeler: its losses by the formulas in float64, its ramps, its teacher, and exact resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sprompt.data.boxes import read_boxes
from sprompt.data.synthetic import write_scenes
from sprompt.engine.config import TrainConfig
from sprompt.engine.log import read_log
from sprompt.engine.optim import factor_at
from sprompt.engine.train import train
from sprompt.methods.auto_labeler.config import AutoLabelerConfig, CropConfig, NetworkConfig
from sprompt.methods.auto_labeler.network import build_network
from sprompt.methods.auto_labeler.samples import BoxedObjects, CropBatch, CropBatches, Cropped
from sprompt.methods.auto_labeler.task import AutoLabeler, dice_loss
from sprompt.ops import mean_field

HERE = Path(__file__).parent
NETWORK = NetworkConfig(backbone="resnet", depth=18, backbone_width=4, width=8, crop=32)


def task(accumulate: int = 1, **settings: Any) -> AutoLabeler:
    torch.manual_seed(0)
    return AutoLabeler(build_network(NETWORK), AutoLabelerConfig(**settings), accumulate)


def batch(number: int = 3, epoch: int = 1, seed: int = 0) -> CropBatch:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(number, 3, 32, 32, generator=draw) for _ in range(2))
    boxes = torch.zeros(number, 8, 8)
    for place in range(number):
        boxes[place, 1 : 5 + place % 3, 2:6] = 1
        boxes[place, 1] /= 2  # a border between two pixels
    return CropBatch(
        0.1 * student, teacher, boxes, [2, 0, 1, 2, 1][:number], [f"object {i}" for i in range(number)], epoch
    )


# -- the formulas, in numpy and float64
def sampled(image: np.ndarray, size: int) -> np.ndarray:
    """Every fourth pixel's bilinear value, without antialias: the mean of pixels 4i + 1 and 4i + 2 on each axis."""
    assert image.shape[-1] == 4 * size
    rows = (image[:, 1::4] + image[:, 2::4]) / 2
    return (rows[:, :, 1::4] + rows[:, :, 2::4]) / 2


def refined(image: np.ndarray, start: np.ndarray, box: np.ndarray, config: AutoLabelerConfig) -> np.ndarray:
    """The mean field by its products, pixel by pixel."""
    _, height, width = image.shape
    x = np.clip(start * box, config.low, config.high)
    for _ in range(config.iterations):
        new = np.empty_like(x)
        for i in range(height):
            for j in range(width):
                f = g = 1.0
                for a in range(max(0, i - 1), min(height, i + 2)):
                    for b in range(max(0, j - 1), min(width, j + 2)):
                        weight = np.exp(-((image[:, i, j] - image[:, a, b]) ** 2).sum() / (2 * config.scale**2))
                        f *= x[a, b] ** weight
                        g *= (1 - x[a, b]) ** weight
                f *= box[i, j]
                new[i, j] = np.clip(f / (f + g + 1e-6), config.low, config.high)
        x = new
    return (x > 0.5).astype(float)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum() + 0.002)


@pytest.mark.parametrize("iterations", [0, 12])
def test_the_losses_are_their_formulas(iterations: int) -> None:
    """Without iterations the label of a pixel is whether the mean of student and teacher, in the box, is above ½."""
    made = task(iterations=iterations)
    draw = torch.Generator().manual_seed(10)
    with torch.no_grad():  # two networks that differ, and masks on both sides of ½
        for network, low, high in ((made.student, -20, 25), (made.teacher, -25, 20)):
            for conv in (*network.pixel_head.before, network.pixel_head.after):
                conv.weight.mul_(2)
            network.instance_head[2].bias.uniform_(low, high, generator=draw)
    given = batch(5)
    loss, logs = made.eval()(given, 7)
    with torch.no_grad():
        student = made.student(given.student, given.classes).double().sigmoid().numpy()
        teacher = made.teacher(given.teacher, given.classes).double().sigmoid().numpy()
    mine, mean = (q * given.boxes.numpy() > 0.5 for q in (student, (student + teacher) / 2))
    assert (mine != mean).sum() > 10
    mil, crf, areas = [], [], 0.0
    for m, t, box, image in zip(
        student, teacher, given.boxes.double().numpy(), given.student.double().numpy(), strict=True
    ):
        label = refined(sampled(image, 8), (m + t) / 2, box, made.config)
        areas += label.sum()
        mil.append(dice(m.max(0), box.max(0)) + dice(m.max(1), box.max(1)))
        crf.append(dice(label, m))
    assert student.min() < 0.4 and student.max() > 0.9 and 10 < areas < 0.9 * given.boxes.sum()
    assert logs["mil"].item() == pytest.approx(4 * np.mean(mil), rel=1e-5)
    assert logs["crf"].item() == pytest.approx(0.5 * np.mean(crf), rel=1e-5)
    assert loss.item() == pytest.approx(4 * np.mean(mil) + 0.5 * np.mean(crf), rel=1e-5)
    assert logs["monitor/refined"].item() == pytest.approx(areas / given.boxes.sum().item(), rel=1e-5)
    assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())


def test_dice_by_hand() -> None:
    masks = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
    labels = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert dice_loss(masks, labels).item() == pytest.approx(1 - 3.0 / (1.25 + 3 + 0.002))


def test_the_gradient_reaches_the_student_only() -> None:
    made = task(iterations=3)
    loss, _ = made(batch(), 0)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    missing = {name for name, p in made.student.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing
    assert sum(float(p.grad.abs().sum()) for p in made.student.parameters() if p.grad is not None) > 0


def test_ramps_by_hand() -> None:
    weights = task().weights
    table = {0: (0, 0), 500: (2, 0.0625), 1000: (4, 0.125), 4000: (4, 0.5), 9000: (4, 0.5)}
    for step, (mil, crf) in table.items():
        assert weights(0, step) == pytest.approx((mil, crf)), step
        assert weights(1, step) == (4, 0.5)
    assert task(mil_ramp=0, crf_ramp=0).weights(0, 0) == (4, 0.5)


def test_the_first_step_changes_nothing() -> None:
    """Weights of the losses and learning rate are 0 in step 0."""
    loss, logs = task(iterations=2)(batch(epoch=0), 0)
    assert loss.item() == 0 and logs["mil"].item() == 0
    assert factor_at(TrainConfig(schedule="epoch_cosine"), 0, 100) == 0


def test_the_rate_of_the_paper() -> None:
    """4.8e-5 at most: linear in epoch 0, half-way to a fifth at epoch 5.5, a fifth at epoch 10."""
    config = TrainConfig(epochs=10, learning_rate=4.8e-5, schedule="epoch_cosine")
    for step, rate in {
        0: 0,
        500: 6e-6,
        1000: 1.2e-5,
        4000: 4.8e-5,
        22000: 2.88e-5,
        40000: 9.6e-6,
    }.items():  # 4000 an epoch
        assert config.learning_rate * factor_at(config, step, 4000) == pytest.approx(rate, rel=1e-9, abs=1e-12), step


def test_the_teacher_follows() -> None:
    """After n equal steps it has made 1 − λⁿ of the way. It starts as a copy, and its updates come after the student's."""
    made = task(momentum=0.9, iterations=1)
    assert all(torch.equal(a, b) for a, b in zip(made.teacher.parameters(), made.student.parameters(), strict=True))
    start = [p.detach().clone() for p in made.teacher.parameters()]
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.01
    made(batch(), 0)  # before the first step of the optimiser there is nothing to follow
    assert all(torch.equal(a, b) for a, b in zip(made.teacher.parameters(), start, strict=True))
    for step in range(1, 6):
        made(batch(), step)
        for now, before in zip(made.teacher.parameters(), start, strict=True):
            torch.testing.assert_close(now - before, torch.full_like(before, 0.01 * (1 - 0.9**step)), rtol=0, atol=2e-6)
    before = [p.clone() for p in made.teacher.parameters()]
    made.eval()(batch(), 6)
    assert all(torch.equal(a, b) for a, b in zip(made.teacher.parameters(), before, strict=True))


def test_micro_batches_of_a_step_see_one_teacher() -> None:
    made = task(accumulate=3, momentum=0.5, iterations=1)
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.01
    weights = []
    for step in range(9):
        made(batch(), step)
        weights.append(made.teacher.pixel_head.after.bias[0].item())
    base = weights[0]
    np.testing.assert_allclose(np.array(weights) - base, np.repeat([0, 0.005, 0.0075], 3), rtol=0, atol=1e-7)
    assert made.weights(0, 500) == task().weights(0, 500)


# -- runs
def objects(folder: Path) -> BoxedObjects:
    path = folder / "instances.json"
    return BoxedObjects(read_boxes(folder / "images", json.loads(path.read_text()), str(path)), 100)


def run(folder: Path, out: Path, wait: float = 0.0, **changes: Any) -> AutoLabeler:
    made = task(iterations=5, mil_ramp=3, crf_ramp=5, momentum=0.8)
    if wait:
        made.register_forward_hook(lambda *_: time.sleep(wait))
    few: dict[str, Any] = dict(
        epochs=3, batch_size=6, learning_rate=0.01, weight_decay=5e-4, betas=(0.9, 0.9), clip=None, schedule="epoch_cosine",
        workers=0, log_steps=1, checkpoint_steps=1,
    )  # fmt: skip
    batches = partial(CropBatches, objects(folder), Cropped(CropConfig(together=2), 32))
    train(made, batches, TrainConfig(**{**few, **changes}), out, cpu=True, progress=False)
    return made


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 6, seed=2, size=(48, 64))
    return folder


@pytest.fixture(scope="module")
def single(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoLabeler, Path]:
    out = tmp_path_factory.mktemp("single")
    return run(scenes, out), out


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl")]


def test_a_killed_run_goes_on_with_the_same_bits(
    scenes: Path, single: tuple[AutoLabeler, Path], tmp_path: Path
) -> None:
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; import torch; torch.set_num_threads(1)\n"
    script += f"from test_auto_labeler import run; run(Path({str(scenes)!r}), Path({str(tmp_path)!r}), wait=0.2)"
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(HERE.parents[1])})
    log = tmp_path / "log.jsonl"
    end = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole, out = single
    assert 4 <= len(losses(tmp_path)) < len(losses(out))
    again = run(scenes, tmp_path)
    assert losses(tmp_path) == losses(out)
    for (name, a), b in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_changes_what_it_should(single: tuple[AutoLabeler, Path]) -> None:
    made, fresh = single[0], task()
    for name, before in fresh.student.named_parameters():
        student, teacher = made.student.get_parameter(name), made.teacher.get_parameter(name)
        same = name.startswith("backbone.layer4.")
        assert torch.equal(student, before) == same and torch.equal(teacher, before) == same, name
        assert same or not torch.equal(student, teacher)
    values = losses(single[1])
    assert values[0] == 0 and all(np.isfinite(values))


def test_two_processes_are_one(scenes: Path, single: tuple[AutoLabeler, Path], tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path\n"
    script += f"from test_auto_labeler import run; run(Path({str(scenes)!r}), Path({str(tmp_path)!r}))"
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(HERE.parents[1])},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = losses(single[1]), losses(tmp_path)
    np.testing.assert_allclose(two[:3], one[:3], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(two, one, rtol=0.05)  # rounding moves labels of the refinement


@pytest.mark.parametrize("name", ["low", "high", "scale"])
def test_settings_are_those_that_the_refinement_takes(name: str) -> None:
    colours, maps = torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 0.5)

    def takes(function: Any, value: float) -> bool:
        try:
            function(**{name: value})
        except (ValueError, TypeError):
            return False
        return True

    tried = [
        0,
        9e-7,
        1e-6,
        0.5 - 1e-6,
        0.5,
        0.5 + 1e-6,
        1 - 1e-6,
        1 - 9e-7,
        1,
        1e6,
        1.1e6,
        float("nan"),
        float("inf"),
        True,
    ]
    settings = [takes(AutoLabelerConfig, value) for value in tried]
    assert settings == [takes(partial(mean_field, colours, maps, maps), value) for value in tried]
    assert settings[4] and not all(settings)
