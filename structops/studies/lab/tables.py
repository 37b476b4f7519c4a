"""A table once, for the terminal, for a spreadsheet and for a page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from structops import report

Cell = str | int | float | bool | None
NUMERIC = "0123456789+-–.≤≥*x"


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts.

    Attributes:
        title: Above it.
        columns: Names of the columns.
        rows: A cell a column; None is a number that does not exist.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """Comma-separated values in full precision, with a line of names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table of Markdown with rounded numbers; columns of texts are on the left."""
        rule = ["---" if self._is_text(index) else "---:" for index in range(len(self.columns))]
        lines = [self.columns, rule, *map(shown, self.rows)]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def to_rich(self) -> RichTable:
        """A table of the terminal with rounded numbers."""
        table = report.table(self.title, self.columns, [shown(row) for row in self.rows])
        for index, column in enumerate(table.columns):  # in a narrow terminal text goes on in the next line
            column.overflow, column.no_wrap = "fold", False
            column.justify = "left" if self._is_text(index) else "right"
        return table

    def _is_text(self, index: int) -> bool:
        """Whether a column has words; numbers with a sign before or after them are none."""
        cells = [str(row[index]) for row in self.rows if isinstance(row[index], str) and row[index]]
        return any(cell[0] not in NUMERIC for cell in cells)


def shown(row: Sequence[Cell]) -> list[str]:
    """Cells as texts: three significant digits, thousands with commas, a dash where nothing is."""
    return [_text(cell) for cell in row]


def _text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1000 <= abs(cell) < 1e7 else f"{cell:.3g}"
    return str(cell)
