"""Show the progress and speed of a long command on standard error: a bar on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from types import TracebackType
from typing import Final, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pullthrough.core.humanize import size_text

LINE_S: Final = 10.0
"""How often a plain line is written."""


class Meter:
    """Counts bytes from any thread while it is entered."""

    def __init__(self, verb: str) -> None:
        """`verb` as in "verified"."""
        self._verb = verb
        self._lock = threading.Lock()
        self._began = self._told = time.monotonic()
        self._total = 0
        self.size = 0
        """Bytes so far."""
        console = Console(stderr=True, emoji=False, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._progress.add_task(verb, total=None) if self._progress is not None else None

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return time.monotonic() - self._began

    def expect(self, size: int) -> None:
        """Set the total to `size` bytes."""
        self._total = size
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=size)

    def advance(self, count: int) -> None:
        """Count `size` more bytes as done."""
        with self._lock:
            self.size += count
            now = time.monotonic()
            is_due = self._progress is None and now - self._told >= LINE_S
            if is_due:
                self._told = now
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)
        elif is_due:
            with contextlib.suppress(OSError):  # nobody reads it any more: the work goes on
                typer.echo(f"{self.summary()} of {size_text(self._total)}", err=True)

    def summary(self) -> str:
        """Return what was done, and how fast."""
        rate = self.size / max(self.seconds, 1e-3)
        return f"{self._verb} {size_text(self.size)} in {self.seconds:.1f} s, {size_text(int(rate))}/s"
