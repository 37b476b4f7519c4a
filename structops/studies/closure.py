"""The closure table for a terminal: what each verb makes of which structures.  Needs neither torch nor JAX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table

from structops.algebra.closure import BINARY, LINALG, ROWS, UNARY, closure

LAZY = "·"


def short(name: str) -> str:
    """Two letters for a structure: its capitals if it has several, else its first two."""
    capitals = [letter for letter in name if letter.isupper()]
    return "".join(capitals[:2]) if len(capitals) > 1 else name[:2]


def lazy(verb: str) -> str:
    """The structure that a verb of two operators makes where no rule applies."""
    return BINARY[verb]["*", "*"]


def called(verb: str) -> str:
    """``A @ B``, ``kron(A, B)``."""
    return f"{verb}(A, B)" if verb.isidentifier() else f"A {verb} B"


def cells(verb: str, left: str) -> list[str]:
    """A row of the table of a verb, abbreviated: the structure of the result for every operator on the right."""
    results = (closure(verb, left, right) for right in ROWS)
    return [LAZY if result == lazy(verb) else short(result) for result in results]


def found(verb: str, name: str) -> str:
    """A cell of the table of linear algebra: ``same`` for the operator's own structure, other structures by letters."""
    result = closure(verb, name)
    return "same" if result == name else short(result) if result in ROWS else result


def closure_tables() -> Iterator[Table]:
    """A table a verb of two operators, one of all verbs of one operator, and one of linear algebra."""
    for verb in BINARY:
        title = f"{called(verb)}: A in rows, B in columns; {LAZY} is a lazy {lazy(verb)}"
        result = _closure_table(title, map(short, ROWS), padding=1)
        for name in ROWS:
            row = [f"[dim]{cell}[/]" if cell == LAZY else cell for cell in cells(verb, name)]
            result.add_row(f"{name} [dim]{short(name)}[/]", *row)
        yield result
    result = _closure_table("One operator", UNARY, padding=2)
    for name in ROWS:
        result.add_row(name, *(closure(verb, name) for verb in UNARY))
    yield result
    result = _closure_table("Linear algebra of one square operator; CoLA is its general algorithms", LINALG, padding=1)
    for name in ROWS:
        result.add_row(name, *(found(verb, name) for verb in LINALG))
    yield result


def _closure_table(title: str, columns: Iterable[str], padding: int) -> Table:
    return Table("", *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0))
