"""Progress of long work: a bar in a terminal, or else a line from time to time."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """`with Progress("train", total) as progress: ...; progress.advance(note="loss 0.31")`. Writes to stderr, unless `show` is
    False.

    `done` is the work of earlier starts. It does not count for the speed and the remaining time. The first piece of work does
    not count either, because it often waits for processes to start or for kernels to compile.
    """

    def __init__(self, name: str, total: int, *, done: int = 0, show: bool = True) -> None:
        self.name, self.total, self.done, self.note = name, total, done, ""
        self.first = self.shown = done  # work done at the start, and at the last line
        self.told = time.monotonic()
        self.since: tuple[float, int] | None = None  # time, and work done, after the first piece
        console = Console(stderr=True)
        self.lines = show and not console.is_terminal
        self.bar: Bar | None = None
        if show and console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.lines and error is None and self.done > self.shown:
            self._line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        if self.since is None:
            self.since = time.monotonic(), self.done
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif self.lines and time.monotonic() - self.told >= SECONDS:
            self._line()

    def reach(self, done: int, total: int) -> None:
        """Tells that `done` of `total` is done. It is for work that does not know its length at the start. The first call
        may count work of earlier starts."""
        self.total = total
        if self.bar is not None and self.since is None:
            self.bar.reset(self.task, total=total, completed=done)
        elif self.bar is not None:
            self.bar.update(self.task, total=total)
        self.advance(done - self.done)

    def _line(self) -> None:
        now = time.monotonic()
        self.told, self.shown = now, self.done
        began, before = self.since or (now, self.done)
        rate = (self.done - before) / max(now - began, 1e-9)
        speed = f", {rate:.0f}/s" if rate >= 100 else f", {rate:.2g}/s" if rate > 0 else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"{self.name}: {self.done}/{self.total}{speed}{left}{note}", markup=False
        )
