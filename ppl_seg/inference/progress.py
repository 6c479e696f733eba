"""The progress bar of a training: rich, on stderr, with the bound and its named terms per voxel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, dict[str, float]], None]
Item = TypeVar("Item")
_SILENT = {"step", "learning_rate", "seconds"}


@contextlib.contextmanager
def progress_bar(steps: int, start: int, visible: bool) -> Iterator[Show]:
    """A function show(step, row) that updates the bar; it remembers the terms that not every row has."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
    )
    latest: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("training", total=steps, completed=start, terms="")

        def show(step: int, row: dict[str, float]) -> None:
            latest.update({name: value for name, value in row.items() if name not in _SILENT})
            text = "  ".join(f"{name.removesuffix('_per_voxel')} {value:.4f}" for name, value in latest.items())
            bar.update(task, completed=step, terms=text)

        yield show


def scan_bar(items: Sequence[Item], visible: bool) -> Iterator[Item]:
    """The items one by one, with a bar that counts them."""
    columns = (TextColumn("scans"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        yield from bar.track(items)
