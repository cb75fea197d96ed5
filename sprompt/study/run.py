"""Runs the cells of a study, several at a time. Finished cells are not run again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

from sprompt.atomic import atomic_write
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.engine.log import read_log
from sprompt.study.plan import Cell, Inputs, Pretraining, typed

CELL = "cell.json"  # in a run folder: it marks the run as finished and holds its commands and results
LOG = "output.txt"  # output of its commands
_TAIL = 1 << 14  # bytes at the end of a log that are searched for its last line


class Failed(RuntimeError):
    """A command ended with an error. The message has the last line of its output, and the path of the log."""


class Runner:
    """Runs commands in processes of their own, `jobs` chains at once. A lock keeps other studies out of the folder.

    Inside the context SIGTERM raises an exception, as SIGINT does, so that running commands are ended too.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.jobs = out, jobs
        self.running = 1  # number of commands that share the cores
        self.stopping = threading.Event()
        self.lock: IO[str] | None = None
        self._before: Any = None

    def __enter__(self) -> Runner:
        self.lock = _locked(self.out)
        self._before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        return self

    def __exit__(self, *_: object) -> None:
        assert self.lock is not None
        signal.signal(signal.SIGTERM, self._before)
        self.lock.close()

    def check(self, chains: Sequence[tuple[Pretraining, list[Cell]]], given: Inputs, evaluate_every: int) -> None:
        """Raises DataError if a finished cell was made with other settings than the settings of this study."""
        for pretraining, cells in chains:
            _check(pretraining.folder(self.out), given.digest, *pretraining.commands(self.out, given)[:1])
            for cell in cells:
                _check(cell.folder(self.out), given.digest, cell.command(self.out, given, evaluate_every))

    def run(
        self, chains: Sequence[tuple[Pretraining, list[Cell]]], given: Inputs, evaluate_every: int,
        done: Callable[[Cell, str | None], None],
    ) -> None:  # fmt: skip
        """Runs the cells that are not finished. After each cell it calls `done(cell, reason of its failure or None)` in this
        thread."""
        self.running = self.jobs
        with self._threads(self.jobs) as pool:
            futures = {pool.submit(self._chain, *chain, given, evaluate_every) for chain in chains}
            while futures:
                finished, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in finished:
                    for cell, why in future.result():
                        done(cell, why)

    def command(self, command: Sequence[str], folder: Path) -> None:
        """Runs one command; its output goes to folder/output.txt."""
        with self._threads(1) as pool:
            pool.submit(self._command, command, folder).result()

    @contextlib.contextmanager
    def _threads(self, number: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that run commands. An exception ends running commands, and no others are started.

        The main thread runs none: in it a signal could raise between the start of a process and the assignment to its variable.
        """
        with ThreadPoolExecutor(number) as pool:
            try:
                yield pool
            except BaseException:
                self.stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _command(self, command: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.running))
        with open(folder / LOG, "ab") as log:
            log.write(f"$ {typed(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "sprompt.cli", *command], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": threads, **os.environ},
                pass_fds=() if self.lock is None else (self.lock.fileno(),),
            )  # fmt: skip
            while (status := process.poll()) is None:
                time.sleep(0.05)
                if self.stopping.is_set():
                    process.terminate()
        if status:
            why = _last_line(folder / LOG) if status > 0 else f"ended by signal {-status}"
            raise Failed(f"{why} ({folder / LOG})")

    def _chain(
        self, pretraining: Pretraining, cells: list[Cell], given: Inputs, every: int
    ) -> list[tuple[Cell, str | None]]:
        try:
            self._pretrain(pretraining, given)
        except Failed as error:
            return [(cell, str(error)) for cell in cells]
        results: list[tuple[Cell, str | None]] = []
        for cell in cells:
            try:
                self._finetune(cell, given, every)
                results.append((cell, None))
            except Failed as error:
                results.append((cell, str(error)))
        return results

    def _pretrain(self, pretraining: Pretraining, given: Inputs) -> None:
        commands, folder = pretraining.commands(self.out, given), pretraining.folder(self.out)
        if commands and not (folder / CELL).exists():
            for command in commands:
                self._command(command, folder)
            last = _last(read_log(folder / "log.jsonl"))
            monitors = {n.removeprefix("monitor/"): v for n, v in last.items() if n.startswith("monitor/")}
            metrics = _numbers(read_json(folder / "test" / "metrics.json"))
            _done(
                folder, commands, given.digest, {"metrics": metrics, "monitors": monitors, "seconds": last["seconds"]}
            )

    def _finetune(self, cell: Cell, given: Inputs, every: int) -> None:
        command, folder = cell.command(self.out, given, every), cell.folder(self.out)
        if not (folder / CELL).exists():
            self._command(command, folder)
            metrics = _numbers(read_json(folder / "metrics.json"))
            lines = read_log(folder / "log.jsonl")
            last = _last(lines)
            curve = [[line["epoch"], line["val/AP"], line["val/APpooled"]] for line in lines if "val/AP" in line]
            curve.append([last["epoch"], metrics["AP"], metrics["APpooled"]])
            _done(folder, [command], given.digest, {"metrics": metrics, "curve": curve, "seconds": last["seconds"]})


def _last(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of each name in a log."""
    return {name: value for line in lines for name, value in line.items()}


def _done(folder: Path, commands: list[list[str]], digest: str, found: dict[str, Any]) -> None:
    """Writes CELL. `found` holds "metrics", "seconds" of training over all attempts, and other entries for tables and
    pictures."""
    text = {"commands": [typed(command) for command in commands], "settings": digest, **found}
    atomic_write(folder / CELL, json.dumps(text, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # they take most of the space; the trained model stays


def _check(folder: Path, digest: str, *commands: list[str]) -> None:
    """Raises DataError if a finished run was made by other commands, or with a preset of other content."""
    for command in commands:
        if not (folder / CELL).exists():
            continue
        made = read_json(folder / CELL)
        if typed(command) not in made["commands"] or made.get("settings") != digest:
            raise DataError(
                f"{folder}: was made with other settings than this study's; choose another --out, or remove it"
            )


def _locked(out: Path) -> IO[str]:
    """Takes the lock of the folder. It waits for other studies, and for commands left by a killed study: commands inherit the
    lock."""
    lock = open(out / ".lock", "w")  # noqa: SIM115  # held until the runner closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{out}: another study, or a command of a killed study, is at work here; waiting for its end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of metrics.json; the names of box metrics start with "box/"."""
    flat = {name: value for name, value in metrics.items() if isinstance(value, float)}
    return flat | {f"box/{n}": v for n, v in metrics.get("bbox", {}).items() if isinstance(v, float)}


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
