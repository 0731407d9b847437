"""The progress of `warm`: a bar for each layer on a terminal, a line for each elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from pullthrough.core.humanize import size_text


class Layers:
    """The layers that have been told of so far."""

    def __init__(self, *, stderr: bool = False) -> None:
        """`stderr` keeps standard output free for JSON."""
        self._console = Console(stderr=stderr, emoji=False, highlight=False, markup=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, progress: Mapping[str, Any]) -> None:
        """{model, layer, size, done} of one blob."""
        model, layer, size, done = (progress[key] for key in ("model", "layer", "size", "done"))
        if not self._console.is_terminal:
            if done == size:
                self.say(f"{model}: {layer} {size_text(size)}")
            return
        if (model, layer) not in self._tasks:
            self._tasks[model, layer] = self._bars.add_task(f"{model} {layer}", total=size)
        self._bars.update(self._tasks[model, layer], completed=done)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text)
