"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

PLAIN_INTERVAL = 5.0  # seconds between two plain lines


class Progress:
    """``with Progress("sft", total=400, unit="steps") as bar: bar.update(12, "loss 3.1, 12k tokens/s")``.

    Written to stderr, so that stdout stays clean for results.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "steps",
        done: int = 0,
        stream: TextIO | None = None,
        interval: float = PLAIN_INTERVAL,
        quiet: bool = False,
    ) -> None:
        """``quiet`` says nothing at all: one rank of several speaks."""
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.note = ""
        self._first = done  # work done before this run started says nothing of its speed
        self._stream = stream or sys.stderr
        self._interval = interval
        self._started = self._printed = time.monotonic()
        self._quiet = quiet
        self._bar = _rich_bar(self._stream) if self._stream.isatty() and not quiet else None
        self._task = None if self._bar is None else self._bar.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """``done`` of ``total`` units are finished; ``note`` is what to say beside it (loss, speed)."""
        self.done, self.note = done, note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._printed >= self._interval:
            self._print_line()

    def log(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self._quiet:
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line()

    def _print_line(self) -> None:
        if self._quiet:
            return
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        line = f"{self.title}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s"
        if self._first < self.done < self.total:
            line += f", {elapsed * (self.total - self.done) / (self.done - self._first):.0f} s left"
        print(f"{line}, {self.note}" if self.note else line, file=self._stream, flush=True)


def _rich_bar(stream: TextIO) -> Any:
    # imported here: only a terminal needs it, and --help should be fast
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
    )
