"""Results of runs as JSON lines: appended at once, whole after any end, and never computed twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structops.errors import StructureError


def append_line(path: str | Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, on disk before this returns; numbers that are not finite become null."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(row), allow_nan=False) + "\n"
    with open(file, "a+b") as stream:
        # The rest of a line that was cut off goes first.
        stream.seek(0)
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file of JSON lines and their numbers; a last line that was cut off is ignored, as is no file.

    Raises:
        StructureError: Another line is no JSON.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):  # without its end a line is not whole
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise StructureError(f"{file}, line {number}: not a result, as it is no JSON: {line[:80]!r}") from error


class Store:
    """The results in a folder, by the settings of their runs.

    Args:
        folder: Where ``results.jsonl`` is or will be.

    Raises:
        StructureError: A line of the file is no result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "results.jsonl"
        self._found: dict[str, dict[str, Any]] = {}
        for number, row in read_lines(self.path):
            try:
                self._found[_key(row["run"])] = row["result"]
            except (KeyError, TypeError) as error:
                raise StructureError(f"{self.path}, line {number}: expected a run and its result, got {row}") from error

    def get(self, run: Any) -> dict[str, Any] | None:
        """The result of a run, a dataclass, if it is there."""
        return self._found.get(_key(asdict(run)))

    def add(self, run: Any, result: dict[str, Any]) -> None:
        """Keep a result; it is on disk when this returns."""
        row = _finite({"run": asdict(run), "result": result})
        append_line(self.path, row)
        self._found[_key(row["run"])] = row["result"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the lock ends with the process, however that ends.

    Raises:
        StructureError: Another process has it.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError("the studies need filelock: pip install 'structops[studies]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another process writes to {folder}; wait for it, or give another --out"
        raise StructureError(message) from None
    try:
        yield
    finally:
        lock.release()


def _key(run: dict[str, Any]) -> str:
    return json.dumps(_whole(run), sort_keys=True)


def _whole(value: Any) -> Any:
    """The same with 1 for 1.0: equal settings are equal, whether they come from Python, YAML or options."""
    if isinstance(value, dict):
        return {name: _whole(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
