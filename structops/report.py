"""Files and tables of studies and benchmarks: nothing half-written stays on disk."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from rich.table import Table


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON with a line for every entry of its lists and dictionaries, down to two levels."""
    text = _lines(data, levels=2)
    _replace(path, lambda file: file.write(text.encode()))


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
    _replace(path, lambda file: file.write(text.encode()))


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    _replace(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write to a temporary file beside ``path`` and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
