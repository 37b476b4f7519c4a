"""Runs the Python blocks of a Markdown page as a reader would: top to bottom, in one namespace.

A line that ends in ``# -> text`` must have the value ``text``.  A block of ``text`` right after a block of ``python``
must be what that one prints.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which it begins."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, also indented ones."""
    page = path.read_text(encoding="utf-8")
    return [
        Block(match[2], textwrap.dedent(match[3]), page[: match.start()].count("\n") + 1)
        for match in FENCE.finditer(page)
    ]


def run(path: Path) -> None:
    """Run every Python block of a page and compare values and output with what the page says.

    Raises:
        AssertionError: A value or a printed text differs; the message has page and line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(path)
    for block, following in itertools.zip_longest(found, found[1:]):
        if block.language != "python":
            continue
        printed = _execute(block, path, namespace)
        if following is not None and following.language == "text":
            assert printed.strip() == following.text.strip(), f"{path.name}:{following.line} prints\n{printed}"
        else:
            assert not printed, f"{path.name}:{block.line} prints what the page does not show:\n{printed}"


def _execute(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    """Run one block statement by statement, so that marked values can be compared; returns what it prints."""
    lines = block.text.splitlines()
    output = io.StringIO()
    for statement in ast.parse(block.text).body:
        where = f"{path.name}:{block.line + statement.end_lineno}"
        marked = re.search(r"# -> (.*)$", lines[statement.end_lineno - 1])
        with contextlib.redirect_stdout(output):
            if isinstance(statement, ast.Expr):
                value = eval(compile(ast.Expression(statement.value), where, "eval"), namespace)
                if marked:
                    assert repr(value) == marked[1].strip(), f"{where}: the page says {marked[1]}, it is {value!r}"
            else:
                assert not marked, f"{where}: only an expression has a value to compare"
                exec(compile(ast.Module([statement], []), where, "exec"), namespace)
    return output.getvalue()
