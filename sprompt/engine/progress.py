"""How far a long piece of work has come: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """`with Progress("train", total) as progress: ...; progress.advance(note="loss 0.31")`. Writes to stderr; `show=False` nothing."""

    def __init__(self, name: str, total: int, *, done: int = 0, show: bool = True) -> None:
        self.name, self.total, self.done, self.note = name, total, done, ""
        self.began, self.first = time.monotonic(), done
        self.told = self.began
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
        elif self.lines and error is None and self.done > self.first:
            self._line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif self.lines and time.monotonic() - self.told >= SECONDS:
            self._line()

    def reach(self, done: int, total: int) -> None:
        """So much of so much is done: for work that finds out on its way how long it is, or how far it was."""
        if self.total != total:
            self.total, self.first = total, 0
            if self.bar is not None:
                self.bar.update(self.task, total=total)
        self.advance(done - self.done)

    def _line(self) -> None:
        self.told = time.monotonic()
        rate = (self.done - self.first) / max(self.told - self.began, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"{self.name}: {self.done}/{self.total}, {rate:.2g}/s{left}{note}", markup=False
        )
