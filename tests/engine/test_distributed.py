"""Two real processes of accelerate's launcher give the numbers of one process: losses, weights, a killed worker, shares of
results."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knet_run import run
from toy import Loader, Task, config

from sprompt.data.synthetic import write_scenes
from sprompt.engine import train
from sprompt.engine.log import read_log

HERE = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    everywhere = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), **environment}
    return subprocess.Popen(command, env=everywhere, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def launch(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts the script in two processes. The launcher's option for several processes is `--multi_gpu`. With its `--cpu` it
    needs MPI, and without MPI it starts one process only. Therefore the script itself asks for the CPU."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--multi_gpu", "--main_process_port", free_port(), str(HERE / script), *arguments,
    ]  # fmt: skip
    return start(command)


def pair(script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts two processes with the environment that the launcher gives them, but without the launcher, because its start
    takes as long as that of a process."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(HERE / script), *arguments]
    return [start(command, RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1")]


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def numbers(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(out / "log.jsonl")]


def test_two_processes_are_one_and_a_killed_worker_is_no_loss(tmp_path: Path) -> None:
    """A run is started, one worker is killed, and the run is started again. It gives the numbers of one process without a
    kill."""
    settings: dict[str, Any] = {"epochs": 8, "accumulate": 2, "checkpoint_steps": 1}
    single = Task()
    train(single, Loader, config(**settings), tmp_path / "one", cpu=True, progress=False)

    out = tmp_path / "two"
    process = launch("toy.py", str(out), json.dumps({**settings, "slow": True, "pids": True}))
    end = time.monotonic() + 300
    while not ((out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)
    os.kill(int((out / "pid-1").read_text()), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert 4 < len(numbers(out)) < 24
    finish(launch("toy.py", str(out), json.dumps(settings)))

    np.testing.assert_allclose(numbers(out), numbers(tmp_path / "one"), rtol=2e-4)
    np.testing.assert_allclose(numbers(out, "grad_norm"), numbers(tmp_path / "one", "grad_norm"), rtol=2e-3)
    weights = torch.load(out / "weights.pt", weights_only=True)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-5)


def test_a_tiny_model_in_two_processes(tmp_path: Path) -> None:
    """Six scenes with different numbers of objects. Losses are equal, and results are in the order of the pictures."""
    write_scenes(tmp_path / "scenes", 6, seed=1, size=(72, 96))
    metrics = run(tmp_path / "scenes", tmp_path / "one")
    finish(*pair("knet_run.py", str(tmp_path / "scenes"), str(tmp_path / "two")))
    for name in ("loss", "grad_norm"):
        one, two = (np.array(numbers(tmp_path / folder, name)) for folder in ("one", "two"))
        np.testing.assert_allclose(one[:2], two[:2], rtol=1e-4)
        np.testing.assert_allclose(one, two, rtol=1e-2)  # AdamW turns rounding of small gradients into steps
    one, two = (json.loads((tmp_path / folder / "predictions.json").read_text()) for folder in ("one", "two"))
    assert [r["image_id"] for r in one] == [r["image_id"] for r in two] == [i for i in range(6) for _ in range(5)]
    np.testing.assert_allclose([r["score"] for r in one], [r["score"] for r in two], rtol=1e-2)
    assert json.loads((tmp_path / "two/metrics.json").read_text())["results"] == metrics["results"] == 30
    assert not list((tmp_path / "two").glob(".*"))


def test_a_picture_of_the_other_process_is_named(tmp_path: Path) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    broken = order[3]  # a picture of the first batch of 4, in the second process's part
    processes = pair("toy.py", str(tmp_path), json.dumps({"broken": broken}))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert (
        f"step 1: the loss must be finite, got NaN or infinity, on picture {order[2]}, picture {broken};" in errors[1]
    )
