"""Lines of progress without a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import Loader, Task, config

from sprompt.engine import progress, train
from sprompt.engine.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock that Progress reads. A test moves it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_last_line_comes_once(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 3) as bar:
        for _ in range(3):
            clock[0] += 10
            bar.advance()
    assert lines(capsys) == ["train: 2/3, 0.1/s, 10 s left", "train: 3/3, 0.1/s"]
    with Progress("train", 2) as bar:
        for _ in range(2):
            clock[0] += 20
            bar.advance()
    assert lines(capsys) == ["train: 1/2", "train: 2/2, 0.05/s"]


def test_earlier_starts_and_the_first_step_do_not_count(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 1000, done=900) as bar:
        clock[0] += 14  # the first step compiles
        bar.advance()
        for _ in range(3):
            clock[0] += 1
            bar.advance()
    assert lines(capsys) == ["train: 902/1000, 1/s, 98 s left", "train: 904/1000, 1/s, 96 s left"]
    with Progress("propose", 1000) as bar:
        bar.reach(960, 1000)  # work of an earlier start
        clock[0] += 32
        bar.reach(976, 1000)
    assert lines(capsys) == ["propose: 976/1000, 0.5/s, 48 s left"]


def test_a_run_says_where_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Task(), Loader, config(), tmp_path, cpu=True)
    assert "goes on" not in capsys.readouterr().err
    train(Task(), Loader, config(), tmp_path, cpu=True)
    assert f"{tmp_path}: all steps are done\n" in capsys.readouterr().err
    train(Task(), Loader, config(epochs=6), tmp_path, cpu=True)
    assert f"{tmp_path}: goes on at step 20 of 30\n" in capsys.readouterr().err
