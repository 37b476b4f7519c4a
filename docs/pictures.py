"""Pictures of structures as SVG text, drawn from their chains; colours follow the theme of the page."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from structops.chain import Chain, Regroup, Step

Sizes = tuple[int, ...]
Cells = dict[
    tuple[int, int], tuple[float, float]
]  # (row, column) -> (hue in turns, or -1 for none; strength in [0, 1])


@dataclass(frozen=True)
class Matrix:
    """A small matrix to draw: which cells are filled, their colours, and a caption."""

    rows: int
    cols: int
    cells: Cells
    caption: str = ""


# ------------------------------------------------------------------------------------------ a chain as sparse matrices


def factor_matrices(chain: Chain, seed: int = 0) -> list[Matrix]:
    """Every factor as the matrix that it is on the whole state, in order of application.

    A cell has the hue of its block, so that a parameter that is used several times shows the same colour each time.
    """
    generator = random.Random(seed)
    order, matrices = chain.terms[0], []
    for position, step in enumerate(chain.steps):
        if isinstance(step, Regroup):
            if order != step.before:
                raise NotImplementedError(f"{chain}: the state {order} would have to be permuted before {step}")
            order = step.after
            continue
        after = _next_order(chain, position, step, order)
        blocks, rows, cols = (chain.size(labels) for labels in (step.batch, step.emitted, step.contracted))
        values = [_normal(generator) for _ in range(blocks * rows * cols)]
        largest = max(map(abs, values))
        cells: Cells = {}
        for index in _indices(chain, step.batch + step.shared + step.emitted + step.contracted):
            block, row, col = (_flat(chain, index, labels) for labels in (step.batch, step.emitted, step.contracted))
            value = values[(block * rows + row) * cols + col]
            cells[_flat(chain, index, after), _flat(chain, index, order)] = (block / blocks, value / largest)
        factor = chain.factors[len(matrices)]
        caption = f"{step.labels}: {_blocks(factor.blocks)} {factor.fan_out}×{factor.fan_in}"
        if factor.sharing > 1:
            caption += f", used {factor.sharing}×"
        matrices.append(Matrix(chain.size(after), chain.size(order), cells, caption))
        order = after
    return matrices


def product(matrices: Sequence[Matrix], rows: int, cols: int) -> Matrix:
    """The matrix that the factors make together, without hues."""
    columns: dict[int, dict[int, float]] = {j: {j: 1.0} for j in range(matrices[0].cols)}
    for matrix in matrices:
        by_col: dict[int, list[tuple[int, float]]] = {}
        for (i, j), (_, value) in matrix.cells.items():
            by_col.setdefault(j, []).append((i, value))
        for j, column in columns.items():
            result: dict[int, float] = {}
            for k, value in column.items():
                for i, weight in by_col.get(k, ()):
                    result[i] = result.get(i, 0.0) + weight * value
            columns[j] = result
    entries = {(i, j): v for j, column in columns.items() for i, v in column.items() if i < rows and j < cols}
    largest = max(map(abs, entries.values()))
    return Matrix(rows, cols, {at: (-1.0, value / largest) for at, value in entries.items()}, "A")


def from_indices(indices: Sequence[Sequence[int]], count: int) -> Matrix:
    """A matrix whose cell holds the number of its parameter, from 1 on; 0 is an empty cell."""
    filled = {(i, j): k for i, row in enumerate(indices) for j, k in enumerate(row) if k}
    cells = {at: ((k - 1) / count if count > 1 else 0.0, 0.8) for at, k in filled.items()}
    return Matrix(len(indices), len(indices[0]), cells, "A")


def _next_order(chain: Chain, position: int, step: Step, order: str) -> str:
    """Labels of the state after a factor: those that it emits stand where the first that it contracts stood."""
    following = chain.steps[position + 1] if position + 1 < len(chain.steps) else None
    if following is None:
        return chain.terms[-1]
    if isinstance(following, Regroup):
        return following.before
    if not step.contracted:
        return order + step.emitted
    head = min(step.contracted, key=order.index)
    return "".join(
        step.emitted if label == head else label for label in order if label == head or label not in step.contracted
    )


def _indices(chain: Chain, labels: str) -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(size) for size in chain.shape_of(labels))):
        yield dict(zip(labels, values, strict=True))


def _flat(chain: Chain, index: dict[str, int], labels: str) -> int:
    flat = 0
    for label in labels:
        flat = flat * chain.size(label) + index[label]
    return flat


def _normal(generator: random.Random) -> float:
    """A number that is never so near to zero that its cell looks empty."""
    return generator.choice((-1, 1)) * generator.uniform(0.35, 1.0)


def _blocks(count: int) -> str:
    return f"{count} blocks of" if count > 1 else "one block of"


# ------------------------------------------------------------------------------------------------------------- drawing


def svg(width: float, height: float, parts: Iterable[str], label: str, css: str = "") -> str:
    """One line of SVG that scales down to the width of its column and takes the text colour of the page."""
    body = "".join(parts)
    return (
        f'<svg class="structops {css}" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width:g}px" xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def matrix_parts(matrix: Matrix, x: float, y: float, cell: float) -> Iterator[str]:
    """The cells and the frame of a matrix whose upper left corner is at (x, y)."""
    for (i, j), (hue, strength) in matrix.cells.items():
        opacity = 0.25 + 0.75 * abs(strength)
        fill = "currentColor" if hue < 0 else f"hsl({360 * (0.58 + hue) % 360:.0f} 58% 50%)"
        opacity *= 0.8 if hue < 0 else 1
        yield (
            f'<rect x="{x + j * cell:g}" y="{y + i * cell:g}" width="{cell:g}" height="{cell:g}" '
            f'fill="{fill}" fill-opacity="{opacity:.2f}"/>'
        )
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{matrix.cols * cell:g}" height="{matrix.rows * cell:g}" '
        f'fill="none" stroke="currentColor" stroke-opacity="0.35"/>'
    )


def text(x: float, y: float, words: str, size: float = 11, anchor: str = "middle", extra: str = "") -> str:
    """One line of text."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="currentColor" {extra}>'
        f"{escaped}</text>"
    )


def equation(matrices: Sequence[Matrix], label: str, cell: float = 8) -> str:
    """``A = F_k ... F_1`` side by side, the whole on the left."""
    tallest = max(matrix.rows for matrix in matrices) * cell
    gap, x, parts = 30.0, 8.0, []
    for number, matrix in enumerate(matrices):
        width = matrix.cols * cell
        slot = max(width, 5.6 * max(len(line) for line in matrix.caption.split(": ")))
        left = x + (slot - width) / 2
        parts += matrix_parts(matrix, left, 6 + (tallest - matrix.rows * cell) / 2, cell)
        for line, words in enumerate(matrix.caption.split(": ")):
            parts.append(text(left + width / 2, tallest + 24 + 14 * line, words, 11 if line else 12))
        x += slot
        if number < len(matrices) - 1:
            parts.append(text(x + gap / 2, 6 + tallest / 2 + 5, "·" if number else "=", 18))
            x += gap
    return svg(x + 8, tallest + 46, parts, label)


def thumbnail(matrices: Sequence[Matrix], label: str, width: float = 140, height: float = 68) -> str:
    """Matrices side by side without words, in a picture of one size."""
    gap = 6.0
    cols, rows = sum(matrix.cols for matrix in matrices), max(matrix.rows for matrix in matrices)
    cell = min(4.0, (width - 2 - gap * (len(matrices) - 1)) / cols, (height - 2) / rows)
    x = (width - cols * cell - gap * (len(matrices) - 1)) / 2
    parts: list[str] = []
    for matrix in matrices:
        parts += matrix_parts(matrix, x, (height - matrix.rows * cell) / 2, cell)
        x += matrix.cols * cell + gap
    return svg(width, height, parts, label, "thumbnail")


# ---------------------------------------------------------------------------------------------------------- wire chart


def wires(chain: Chain) -> str:
    """The chain as wires: one a label, from the factor that emits it to the factor that contracts it.

    A wire that ends at a box is contracted there, one that begins is emitted, dots mark batch labels, and a wire that
    passes without dots is shared.
    """
    column, row_height, left, top = 190.0, 34.0, 76.0, 30.0
    rows: list[str | None] = list(chain.terms[0])
    start: dict[str, tuple[int, float]] = {label: (row, left - 30) for row, label in enumerate(rows) if label}
    lines: list[str] = []
    boxes: list[str] = []
    notes: list[tuple[float, str, str]] = []

    def close(label: str, x: float) -> None:
        row, begin = start.pop(label)
        y = top + row * row_height
        lines.append(f'<line x1="{begin:g}" y1="{y:g}" x2="{x:g}" y2="{y:g}" class="wire"/>')
        words = f"{label} = {chain.size(label)}"
        lines.append(text(begin + 12 if begin >= left else begin + 2, y - 5, words, 11, "start"))

    x = left + 60
    for step in chain.steps:
        if isinstance(step, Regroup):
            for label in step.before:
                rows[start[label][0]] = None
                close(label, x)
            _emit(step.after, rows, start, x)
            boxes.append(_box(x, top, len(rows), row_height, range(len(rows)), "re-read"))
            x += column
            continue
        half = 16.0
        touched = [start[label][0] for label in step.batch + step.contracted]
        for label in step.contracted:
            rows[start[label][0]] = None
            close(label, x - half)
        _emit(step.emitted, rows, start, x + half)
        touched += [start[label][0] for label in step.emitted]
        factor = chain.factors[len(notes)]
        boxes.append(_box(x, top, len(rows), row_height, touched, step.labels, half))
        for label in step.batch:
            y = top + start[label][0] * row_height
            boxes.append(f'<circle cx="{x - half:g}" cy="{y:g}" r="4" class="dot"/>')
            boxes.append(f'<circle cx="{x + half:g}" cy="{y:g}" r="4" class="dot"/>')
        notes.append(
            (
                x,
                f"fan-in {factor.fan_in}, fan-out {factor.fan_out}",
                f"{factor.blocks} block{'s' if factor.blocks > 1 else ''}, sharing {factor.sharing}",
            )
        )
        x += column
    end = x - column + 110
    for label in list(start):
        close(label, end)
    height = top + len(rows) * row_height
    parts = [*boxes, *lines]
    for at, *words in notes:
        parts += [text(at, height + 6 + 14 * line, note, 11) for line, note in enumerate(words)]
    middle = top + (len(rows) - 1) * row_height / 2 + 5
    parts += [text(left - 44, middle, "x", 15, "end"), text(end + 14, middle, "y", 15, "start")]
    return svg(end + 40, height + 32, parts, f"the chain {chain.pattern} as wires", "wires")


def _emit(labels: str, rows: list[str | None], start: dict[str, tuple[int, float]], x: float) -> None:
    """New wires, on rows that are free."""
    for label in labels:
        if None in rows:
            row = rows.index(None)
            rows[row] = label
        else:
            row = len(rows)
            rows.append(label)
        start[label] = (row, x)


def _box(x: float, top: float, count: int, height: float, rows: Iterable[int], words: str, half: float = 16) -> str:
    """A factor over the rows that it touches, its labels above it."""
    touched = sorted(rows)
    y = top + touched[0] * height - 13
    tall = (touched[-1] - touched[0]) * height + 26
    frame = f'<rect x="{x - half:g}" y="{y:g}" width="{2 * half:g}" height="{tall:g}" rx="4" class="factor"/>'
    return frame + text(x, y - 5, words, 12)
