"""Progress bars for long work on models; quiet where nobody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, shown: bool | None = None) -> Iterator[T]:
    """The items one by one, and a bar on standard error that goes away at the end.

    Args:
        items: What to go through.
        what: What is done with them, in front of the bar.
        total: How many they are, if ``items`` has no length.
        shown: Whether to show the bar; by default in a terminal, and in a notebook with ipywidgets.
    """
    console = Console(stderr=True)
    if shown is None:
        shown = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield from progress.track(items, total=total, description=what)
