"""The progress bar of every long command: rate, time left, and what is being watched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    """Reports that the work stands at `done`, with a short text such as "loss 1.23"."""

    def __call__(self, done: int, text: str = "") -> None: ...


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = f"{task.speed:,.1f}" if task.speed else "-"
        return Text(f"{rate} {self.unit}/s", no_wrap=True)


@contextmanager
def progress_bar(
    label: str,
    total: int,
    unit: str,
    done: int = 0,
    console: Console | None = None,
    hidden: bool = False,
) -> Iterator[Advance]:
    """A bar on stderr from `done` to `total`, unless hidden; yields the function that moves it."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}"),
        console=console or Console(stderr=True),
        speed_estimate_period=60,
        disable=hidden,
    ) as progress:
        task = progress.add_task(label, total=total, completed=done, text="")

        def advance(done: int, text: str = "") -> None:
            progress.update(task, completed=done, text=text)

        yield advance
