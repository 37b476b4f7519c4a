"""Files and tables of studies and benchmarks: nothing half-written stays on disk."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from rich.table import Table

from structops._files import replacing


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON with a line for every entry of its lists and dictionaries, down to two levels."""
    write_text(path, _lines(data, levels=2))


def _lines(data: Any, levels: int) -> str:
    """JSON whose upper levels are spread over lines."""
    if not levels or not isinstance(data, (dict, list)) or not data:
        return json.dumps(data)
    if isinstance(data, list):
        return "[\n" + ",\n".join(_lines(value, levels - 1) for value in data) + "\n]"
    entries = (f"{json.dumps(str(key))}: {_lines(value, levels - 1)}" for key, value in data.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with _replacing(path) as file:
        file.write(text.encode())


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    with _replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _replacing(path: Path) -> AbstractContextManager[IO[bytes]]:
    """The file, in a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return replacing(path)


def machine() -> dict[str, Any]:
    """Where numbers come from: processor, cores, Python and the versions that matter."""
    versions = {}
    for package in ("structops", "torch", "jax", "numpy", "cola-ml"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A Rich table whose first column is text and whose others are numbers."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        result.add_row(*row)
    return result
