"""The benchmark's processes. On a GPU every op has its own process. A process that crashes loses only its own row."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import apart, run, table
from sprompt.ops import mask_area
from sprompt.testing.spec import Bench, Prepared, Sample


def counted(number: int, fatal: int) -> Iterator[int]:
    for i in range(number):
        if i == fatal:
            os._exit(7)
        yield i


def test_values_of_a_process_come_back() -> None:
    assert list(apart.in_process(counted, 3, -1)) == [0, 1, 2]


def busy(size: int) -> Iterator[float]:
    """An op that computes on two threads, as the rows of the benchmark do."""
    torch.set_num_threads(2)
    yield float((torch.ones(size, size) @ torch.ones(size, size)).sum())
    yield float(mask_area(torch.ones(64, size, size)).sum())


def test_a_process_may_use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "SILENCE", 60.0)
    assert list(apart.in_process(busy, 300)) == [300.0**3, 64 * 300.0**2]


def test_specs_run_nothing_when_they_are_imported() -> None:
    """An op that runs at import would start threads, and a forked process would lack these threads."""
    code = (
        "import sprompt\nwith sprompt.trace_backends() as ran:\n    import sprompt.testing.specs\nassert not ran, ran"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_ends_badly_says_so() -> None:
    assert list(apart.in_process(counted, 3, 2)) == [0, 1, "its process ended with status 7"]


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(apart, "SILENCE", 1.0)
    assert list(apart.in_process(time.sleep, 60)) == ["nothing was heard of its process for 1 s"]


def test_a_row_that_ends_its_process_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ops, with three rows and one row. The second row of the first op kills its process."""
    cuda = [number for number, bench in enumerate(run.BENCHES) if bench.device == "cuda"]
    first = run.BENCHES[cuda[0]].function.__name__
    other = next(n for n in cuda if run.BENCHES[n].function.__name__ != first)
    wanted = [(cuda[0], torch.float32, mode) for mode in ("forward", "full", "memory")] + [
        (other, torch.float32, "forward")
    ]
    deaths = []

    def die_at_full(function: Any, jobs: list[run.Job], *rest: Any) -> Iterator[Any]:
        for job in jobs:
            if job[2] == "full":
                deaths.append(job)
                yield "its process ended with status -6"
                return
            yield run.untimed(job)

    monkeypatch.setattr(apart, "in_process", die_at_full)
    monkeypatch.setattr(run, "jobs", lambda options, device: wanted)
    options = argparse.Namespace(seconds=0.1, no_compile=True)
    lines = list(run.rows(options, torch.device("cuda"), float("inf"), lambda text: None))
    assert [(line["op"], line["mode"]) for line in lines] == [
        (run.BENCHES[n].function.__name__, m) for n, _, m in wanted
    ]
    assert [line["error"] for line in lines] == ["", "its process ended with status -6", "", ""]
    assert len(deaths) == 1


def test_flagships_come_first_on_a_gpu() -> None:
    options = argparse.Namespace(op=None, quick=False, dtype=None, mode=None)
    ops = [run.BENCHES[number].function.__name__ for number, _, _ in run.jobs(options, torch.device("cuda"))]
    assert list(dict.fromkeys(ops))[: len(run.FLAGSHIPS)] == list(run.FLAGSHIPS)


def test_a_form_is_made_once_an_object() -> None:
    made = []
    prepared = Prepared(lambda value, *options: made.append((value, options)) or len(made))
    a, b = object(), object()
    assert [prepared(a), prepared(b), prepared(a), prepared(a, 1), prepared(a, 1)] == [1, 2, 1, 3, 3]


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _absent(x: torch.Tensor) -> torch.Tensor:
    raise ModuleNotFoundError("No module named 'swift'", name="swift")


def row_with(monkeypatch: pytest.MonkeyPatch, mode: str = "forward", **options: Any) -> dict[str, Any]:
    bench = Bench(_double, "3", lambda *rest: Sample("", (torch.arange(3.0),)), **{"eager": _double, **options})
    monkeypatch.setattr(run, "BENCHES", [bench])
    (line,) = run.timed_rows([(0, torch.float32, mode)], torch.device("cpu"), 0.01, False, float("inf"))
    return line


@pytest.mark.parametrize("mode", ("forward", "memory"))
def test_a_library_that_is_missing_costs_its_column_only(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    libraries = {"one": lambda x: 2 * x, "swift": _absent, "fast": _absent, "two": _double}
    line = row_with(monkeypatch, mode, libraries=libraries, goals={"two": 1.5, "swift": 3.0})
    assert not line["error"] and "eager" in line["ms" if mode == "forward" else "peak_bytes"]
    assert list(line["libraries"]) == list(libraries)
    assert [found.get("missing") for found in line["libraries"].values()] == [None, "swift", "swift", None]
    text = table.cells(line)[table.HEADER.index("libraries")]
    one, swift, fast, two = text.split("; ")
    assert (swift, fast) == ("swift: not installed", "fast: swift not installed")
    assert one.startswith("one ") and two.startswith("two ")
    if mode == "forward":
        assert line["libraries"]["one"]["ratio"] > 0 and "= " in one and "(goal" not in one
        assert two.endswith("× (goal 1.5×)")


def test_a_library_that_computes_something_else_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    line = row_with(monkeypatch, libraries={"one": _double, "two": lambda x: x})
    assert line["error"].startswith("outputs disagree with two: ") and "ms" not in line


def test_a_row_needs_what_eager_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_with(monkeypatch, eager=_absent)["error"] == "eager needs swift, which is not installed"


def test_goals_are_of_modes_and_libraries() -> None:
    for bench in run.BENCHES:
        known = {*run.MODES, *(f"{mode} {str(d).removeprefix('torch.')}" for mode in run.MODES for d in bench.dtypes)}
        assert bench.goals.keys() <= known | bench.libraries.keys(), bench.shape
        assert not bench.libraries.keys() & {"ours", "eager", "compiled", "device"}
