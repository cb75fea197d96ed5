"""Functions in a process of their own: after an illegal access a process cannot use CUDA any more."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

#: A process is given up after so many seconds without a new value.
SILENCE = 120.0


def processes() -> Any:
    """Forks of a process that has imported torch and the ops, but has run nothing, so a fork starts at once.

    Only the forks import the specs. A thread that worked before a fork is missing after it, and a wait for it would never end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sprompt.ops", "benchmarks.measure", "benchmarks.table"])
    return context


def _answer(connection: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in function(*args):
        connection.send(value)


def _once(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    yield function(*args)


def in_process(function: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """Runs the generator function(*args) in a process of its own and yields its values. If it fails, the last value is a
    sentence."""
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    silent = False
    try:
        while not silent:
            if ours.poll(SILENCE):
                yield ours.recv()
            else:
                silent = True
                process.kill()
    except EOFError:
        pass
    process.join()
    if silent:
        yield f"nothing was heard of its process for {SILENCE:.0f} s"
    elif process.exitcode:
        yield f"its process ended with status {process.exitcode}"


def each_in_process(function: Callable[..., Iterator[Any]], jobs: Sequence[Any], *args: Any) -> Iterator[Any]:
    """The values of function(jobs, *args), which are one for each job, in processes of their own. A job that ends its process gives
    a sentence, and the jobs after it get a new process."""
    left = list(jobs)
    while left:
        for value in in_process(function, left, *args):
            yield value
            left = left[1:]
            if not left:
                break


def apart(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """The result of function(*args); on a GPU it runs in a process of its own. None if the process fails."""
    if device.type == "cpu":
        return function(*args)
    values = list(in_process(_once, function, *args))
    return values[0] if len(values) == 1 else None
