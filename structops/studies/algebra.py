"""How the time of every structured verb grows with the size, beside the growth that its structure promises."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from structops import _cola
from structops.algebra.rounding import compress
from structops.algebra.svd import svd
from structops.operators import Diagonal, Permutation
from structops.operators.kron import kron
from structops.power_law import fit
from structops.report import machine, table, write_json
from structops.spec import structure

# ---------------------------------------------------------------------------------------------------------- what is run

# The growth of a cost with the number n of rows.
COSTS: dict[str, Callable[[float], float]] = {
    "1": lambda n: 1,
    "n": lambda n: n,
    "n log n": lambda n: n * math.log2(n),
    "n^1.5": lambda n: n**1.5,
    "n^2": lambda n: n**2,
    "n^3": lambda n: n**3,
}

# Operands are specs, or what `Library.operand` draws beside them.
LOW_RANK, TT, BLOCKS, BLAST = "low_rank(rank=16)", "tt(rank=4)", "block_diag", "blast(rank=16, blocks=16)"
UPDATE = "diagonal + low_rank(rank=16)"

VERBS: dict[str, Callable[..., Any]] = {
    "A @ x": operator.matmul,
    "A @ B": operator.matmul,
    "A + B": operator.add,
    "kron(A, B)": kron,
    "inv(A) @ x": lambda A, x: _cola.inv(A) @ x,
    "slogdet(A)": _cola.slogdet,
    "trace(A)": _cola.trace,
    "diag(A)": _cola.diag,
    "eig(A)": lambda A: _cola.eig(A, A.shape[0]),
    "exp(A)": _cola.exp,
    "svd(A)": svd,
    "compress(A)": lambda A: compress(A, 1)[:2],  # the third is a word, which jit cannot return
}


@dataclass(frozen=True)
class Case:
    """A verb on operands, and the cost that its structure promises, a key of `COSTS`."""

    verb: str
    operands: tuple[str, ...]
    cost: str

    @property
    def label(self) -> str:
        """``kron, tt(rank=4)``: the operands but for vectors."""
        names = [name for name in self.operands if name != "vector"]
        return f"two {names[0]}" if names[1:] == names[:1] else ", ".join(names)


def _cases(verb: str, *rows: tuple[str, ...]) -> list[Case]:
    return [Case(verb, tuple(operands), cost) for *operands, cost in rows]


CASES: tuple[Case, ...] = (
    *_cases(
        "A @ x",
        ("dense", "vector", "n^2"),
        (LOW_RANK, "vector", "n"),
        ("kron", "vector", "n^1.5"),
        (TT, "vector", "n^1.5"),
        ("btt", "vector", "n^1.5"),
        ("monarch", "vector", "n^1.5"),
        (BLOCKS, "vector", "n^2"),
        (BLAST, "vector", "n"),
        ("circulant", "vector", "n log n"),
        ("toeplitz", "vector", "n log n"),
        ("convolution(kernel_size=9)", "vector", "n"),
        ("permutation", "vector", "n"),
        ("diagonal", "vector", "n"),
    ),
    *_cases(
        "A @ B",
        (LOW_RANK, LOW_RANK, "n"),
        (LOW_RANK, "btt", "n^1.5"),
        ("kron", "kron", "n^1.5"),
        ("kron", TT, "n^1.5"),
        (TT, TT, "n^1.5"),
        (BLOCKS, BLOCKS, "n^3"),
        ("circulant", "circulant", "n log n"),
        ("permutation", "permutation", "n"),
        ("permutation", "dense", "n^2"),
        ("diagonal", "diagonal", "n"),
        ("diagonal", "btt", "n^1.5"),
    ),
    *_cases(
        "A + B",
        (LOW_RANK, LOW_RANK, "n"),
        ("kron", "kron", "n"),
        (TT, TT, "n"),
        ("btt", "btt", "n^1.5"),
        (BLOCKS, BLOCKS, "n^2"),
        ("circulant", "toeplitz", "n"),
        ("diagonal", "diagonal", "n"),
    ),
    *_cases(
        "kron(A, B)",
        ("small diagonal", "small diagonal", "n"),
        ("small permutation", "small permutation", "n"),
    ),
    *_cases(
        "inv(A) @ x",
        (UPDATE, "vector", "n"),
        ("kron", "vector", "n^1.5"),
        ("btt", "vector", "n^2"),
        ("monarch", "vector", "n^2"),
        (BLOCKS, "vector", "n^3"),
        ("circulant", "vector", "n log n"),
        ("diagonal", "vector", "n"),
    ),
    *_cases(
        "slogdet(A)",
        (UPDATE, "n"),
        ("kron", "n^1.5"),
        ("btt", "n^2"),
        ("monarch", "n^2"),
        (BLOCKS, "n^3"),
        ("circulant", "n log n"),
        ("permutation", "n log n"),
        ("diagonal", "n"),
    ),
    *_cases("trace(A)", (LOW_RANK, "n"), ("btt", "n"), ("monarch", "n")),
    *_cases("diag(A)", (LOW_RANK, "n"), ("kron", "n"), (TT, "n"), ("btt", "n"), ("monarch", "n")),
    *_cases("eig(A)", ("kron", "n^1.5"), (BLOCKS, "n^3"), ("circulant", "n log n"), ("diagonal", "n log n")),
    *_cases("exp(A)", (BLOCKS, "n^3"), ("circulant", "n log n"), ("diagonal", "n")),
    *_cases("compress(A)", (LOW_RANK, "n"), (TT, "n"), ("btt(rank=2)", "n^1.5")),
    *_cases("svd(A)", (LOW_RANK, "n"), ("kron", "n^1.5"), (BLOCKS, "n^3"), ("circulant", "n log n")),
)

# Roots of the sizes, so that every size is a square: a factor of about 1.4 apart, without large primes for the FFT.
ROOTS = tuple(sorted([*(2**k for k in range(3, 12)), *(3 * 2**k for k in range(2, 10))]))
LARGEST = ROOTS[-1] ** 2


# ------------------------------------------------------------------------------------------------------------ measuring

LONGEST = 0.1  # seconds of a run at which the sizes stop growing
PATIENCE = 2  # the same for all that a size takes: operands, compiling, runs
MOST_NUMBERS = 3e7  # of all operands: 120 MB in float32
FEWEST = 3  # sizes of a fit


@dataclass(frozen=True)
class Growth:
    """The times of one case, and the power of n that they and the stated cost follow.

    The fit takes the sizes whose time is more than twice that of the smallest, and of these the time beyond that of the
    smallest: what a call costs however small its operands are.

    Attributes:
        verb: What was run.
        operands: On what.
        cost: The stated cost.
        sizes: All sizes that were run.
        seconds: The fastest of some runs at each.
        fitted: How many of the sizes, the largest, are in the fit.
        stated: The power of n that the stated cost follows over the sizes of the fit; it is above 1 for n log n.  None,
            as are the others, where fewer than three sizes take long enough.
        exponent: That of the measured times.
        error: Its standard error.
    """

    verb: str
    operands: str
    cost: str
    sizes: list[int]
    seconds: list[float]
    fitted: int = 0
    stated: float | None = None
    exponent: float | None = None
    error: float | None = None


def growth(case: Case, library: Library, largest: int = LARGEST) -> Growth:
    """Time a case at growing sizes, until a run takes `LONGEST` or the operands get too large, and fit the power."""
    run = library.compiled(VERBS[case.verb])
    sizes: list[int] = []
    seconds: list[float] = []
    spent = 0.0
    for root in ROOTS[:: library.stride]:
        start = time.perf_counter()
        if root**2 > largest or (seconds and seconds[-1] > LONGEST) or (len(sizes) >= FEWEST and spent > PATIENCE):
            break
        operands = [library.operand(name, root) for name in case.operands]
        if sum(map(library.numbers, operands)) > MOST_NUMBERS:
            break
        sizes.append(root**2)
        seconds.append(_fastest(run, operands))
        spent = time.perf_counter() - start
    return _fitted(Growth(case.verb, case.label, case.cost, sizes, seconds))


def _fitted(row: Growth) -> Growth:
    """The row with its fit, if enough of the sizes take long enough."""
    call = row.seconds[0]
    taken = next((k for k, t in enumerate(reversed(row.seconds)) if t < 2 * call), 0)
    if taken < FEWEST:
        return row
    sizes, seconds = row.sizes[-taken:], [t - call for t in row.seconds[-taken:]]
    found, stated = fit(sizes, seconds), fit(sizes, [COSTS[row.cost](n) for n in sizes])
    return replace(row, fitted=taken, stated=stated.exponent, exponent=found.exponent, error=found.error)


def _fastest(run: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Seconds of the fastest of up to nine runs, after one that is not counted: others may use the machine, too."""
    run(*operands)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 9 and sum(times) < LONGEST):
        start = time.perf_counter()
        run(*operands)
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Library:
    """torch or JAX: random operands, and verbs as users run them.

    Attributes:
        backend: ``"torch"`` or ``"jax"``.
        stride: Every which size is run; JAX compiles anew for each.
    """

    backend: str

    @property
    def stride(self) -> int:
        """1 for torch, 3 for JAX."""
        return 1 if self.backend == "torch" else 3

    @property
    def threads(self) -> str:
        """How it computes, in words."""
        return "one thread" if self.backend == "torch" else "all cores"

    def prepare(self) -> None:
        """One thread: with more, small sizes would run on one and large ones on several, which bends the lines.

        Not in JAX, where batches of inverses wait for each other forever on one thread.
        """
        if self.backend == "torch":
            import torch

            torch.set_num_threads(1)

    def operand(self, name: str, root: int) -> Any:
        """A vector, or an operator of ``root**2`` rows (``root`` rows for a small one), the same at every call."""
        small, kind = name.startswith("small "), name.removeprefix("small ")
        n = root if small else root**2
        if kind == "vector":
            return self._normal(n)
        if kind == "diagonal":
            return Diagonal(self._normal(n))
        if kind == UPDATE:  # far from singular
            return Diagonal(self._normal(n) ** 2 + 1) + self.operand(LOW_RANK, root)
        if kind == "permutation":
            return Permutation(self._normal(n).argsort())
        plan = structure(kind).plan(n, n)
        return plan.operator([self._normal(*shape) / shape[-1] ** 0.5 for shape in plan.stored_shapes])

    def numbers(self, operand: Any) -> int:
        """How many numbers an operand holds."""
        arrays = operand.arrays_flat() if hasattr(operand, "arrays_flat") else [operand]
        return sum(math.prod(array.shape) for array in arrays)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as users run it, waiting for its result: in JAX under jit."""
        if self.backend == "torch":
            return function
        import jax

        run = jax.jit(function)
        return lambda *operands: jax.block_until_ready(run(*operands))

    def _normal(self, *shape: int) -> Any:
        """Normal numbers, drawn by numpy, since JAX would compile a generator for every shape."""
        numbers = np.random.default_rng(0).standard_normal(shape, np.float32)
        if self.backend == "torch":
            import torch

            return torch.from_numpy(numbers)
        import jax

        return jax.numpy.asarray(numbers)


# ------------------------------------------------------------------------------------------------------------ reporting


def costs(*, backend: str, largest: int, out: Path | None, console: Console) -> list[Growth]:
    """Time every case, print the table, and write the numbers to ``out`` if it is given.

    An interrupt leaves what was finished, and is raised again.
    """
    library = Library(backend)
    library.prepare()
    rows: list[Growth] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(CASES))
            for case in CASES:
                progress.update(task, description=f"{case.verb}: {case.label}")
                rows.append(growth(case, library, largest))
                progress.advance(task)
    finally:
        if rows:
            _report(rows, backend, out, console)
    return rows


def _report(rows: Sequence[Growth], backend: str, out: Path | None, console: Console) -> None:
    console.print(cost_table(rows, backend))
    console.print(
        "Each fit takes the sizes n whose time is over twice that of the smallest, less that of the smallest: "
        "what a call costs, however small. A dash: fewer than three sizes take that long."
    )
    if out is not None:
        write_json(out, {"machine": machine(), "backend": backend, "rows": [asdict(row) for row in rows]})
        console.print(f"written to {out}")


COST_COLUMNS = ("verb", "on", "n", "ms", "stated", "measured")


def cost_cells(row: Growth) -> tuple[str, ...]:
    """A row of the table of costs: the sizes of the fit, the time at the largest, and both powers of n."""
    largest = _thousands(row.sizes[-1])
    sizes = f"{_thousands(row.sizes[-row.fitted])} – {largest}" if row.fitted else f"to {largest}"
    return (
        row.verb,
        row.operands,
        sizes,
        f"{1000 * row.seconds[-1]:.2f}",
        f"{row.cost} ({row.stated:.2f})" if "log" in row.cost and row.stated else row.cost,
        "–" if row.exponent is None else f"{row.exponent:.2f} ± {row.error:.2f}",
    )


def _thousands(n: int) -> str:
    """576, 9.2k, 2.4M."""
    return str(n) if n < 1000 else f"{n / 1e3:.3g}k" if n < 999_500 else f"{n / 1e6:.3g}M"


def cost_table(rows: Sequence[Growth], backend: str) -> Table:
    """The powers of n, a section a verb."""
    result = table(
        f"Growth of the time with the size n ({backend}, float32, {Library(backend).threads})", COST_COLUMNS, []
    )
    for column in result.columns[2:]:
        column.no_wrap = True
    result.columns[1].justify, result.columns[1].no_wrap, result.columns[1].min_width = "left", False, 16
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        result.add_row(*cost_cells(row), end_section=following is None or following.verb != row.verb)
    return result
