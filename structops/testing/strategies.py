"""Hypothesis strategies for operators: they draw structures, sizes, ranks and blocks, and leave the numbers to a seed.

from hypothesis import given
from structops.testing import strategies

@given(strategies.operator_cases(), strategies.dtypes(), strategies.seeds())
def test_mine(case, dtype, seed):
    A, dense = case.build("torch", dtype, seed)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from structops.operators import OPERATORS
from structops.testing.arrays import DTYPES
from structops.testing.cases import Case, Indices, btt_cores, identity_case, multiple_case, tt_cores, zero_case

Draw = Callable[[st.SearchStrategy[Any]], Any]

SMALL = st.integers(1, 3)
SIDE = st.integers(1, 6)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of the numbers."""
    return st.integers(0, 2**32 - 1)


def dtypes(*names: str) -> st.SearchStrategy[str]:
    """Names of dtypes; of all by default."""
    return st.sampled_from(names or DTYPES)


def operator_cases(*names: str, nested: bool = True) -> st.SearchStrategy[Case]:
    """Cases of the named structures; of all by default.

    Args:
        *names: Keys of `structops.OPERATORS`.
        nested: Whether Kron and BlockDiag may hold operators, too.
    """
    simple = {name: strategy for name, strategy in SIMPLE.items() if name in OPERATORS}
    part = st.one_of(st.tuples(SMALL, SMALL), *simple.values()) if nested else st.tuples(SMALL, SMALL)
    known = {**simple, "Kron": _krons(part), "BlockDiag": _block_diags(part)}
    return st.one_of(*(known[name] for name in names or known))


@st.composite
def cases_of_shape(draw: Draw, rows: int, cols: int) -> Case:
    """Cases of any structure that has matrices of this shape, the identity, its multiples and zero among them."""
    return draw(st.one_of(*(_of_shape(name, rows, cols) for name in ANY_SHAPE + (SQUARE if rows == cols else ()))))


ANY_SHAPE: tuple[str, ...] = (
    *("Dense", "LowRank", "Kron", "TT", "BTT", "Monarch", "BlockDiag", "BLAST", "Einsum", "Toeplitz", "Convolution"),
    "Zero",
)
SQUARE: tuple[str, ...] = ("Circulant", "Permutation", "Diagonal", "Identity", "ScalarMul")


@st.composite
def _of_shape(draw: Draw, name: str, m: int, n: int) -> Case:
    rank = draw(st.integers(1, 2))
    if name in ("Kron", "TT", "BTT", "Einsum", "BLAST"):
        (a, b), (c, d) = draw(_split(m)), draw(_split(n))
        return {
            "Kron": lambda: _case("Kron", (a, c), (b, d)),
            "TT": lambda: _case("TT", tt_cores((a, b), (c, d), rank)),
            "BTT": lambda: _case("BTT", btt_cores((a, b), (c, d), rank)),
            "Einsum": lambda: _case("Einsum", [(rank, b, c, d), (a, b, c, rank)], pattern="cd, sbcd, abcs -> ab"),
            "BLAST": lambda: _case("BLAST", (a, b, rank), (a, c, rank), (c, d, rank)),
        }[name]()
    if name == "BlockDiag":
        if min(m, n) == 1:
            return _case("BlockDiag", (m, n))
        a, c = draw(st.integers(1, m - 1)), draw(st.integers(1, n - 1))
        return _case("BlockDiag", (a, c), (m - a, n - c))
    if name == "Monarch":
        b, q = draw(SMALL), draw(SMALL)
        return _case("Monarch", (b, -(-m // b), q), (b, q, -(-n // b)), in_features=n, out_features=m)
    if name == "Convolution":
        spatial = draw(st.sampled_from([s for s in range(1, min(m, n) + 1) if m % s == n % s == 0]))
        padding = draw(st.sampled_from(["same", "circular"]))
        taps = draw(st.integers(1, spatial if padding == "circular" else 3))
        return _case("Convolution", (m // spatial, n // spatial, taps), spatial_shape=(spatial,), padding=padding)
    return {
        "Dense": lambda: _case("Dense", (m, n)),
        "LowRank": lambda: _case("LowRank", (m, rank), (rank, n)),
        "Toeplitz": lambda: _case("Toeplitz", (m,), (n,)),
        "Circulant": lambda: _case("Circulant", (n,)),
        "Permutation": lambda: _case("Permutation", Indices(n)),
        "Diagonal": lambda: _case("Diagonal", (n,)),
        "Identity": lambda: identity_case(n),
        "ScalarMul": lambda: multiple_case(n),
        "Zero": lambda: zero_case(m, n),
    }[name]()


def _split(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Two factors of a size."""
    return st.sampled_from([(d, size // d) for d in range(1, size + 1) if size % d == 0])


def _case(name: str, *arguments: Any, **options: Any) -> Case:
    return Case(OPERATORS[name], arguments, options)


@st.composite
def _trains(draw: Draw, name: str) -> Case:
    count = draw(st.integers(1, 3))
    out_modes, in_modes, ranks = (tuple(draw(SMALL) for _ in range(length)) for length in (count, count, count - 1))
    return _case(name, (tt_cores if name == "TT" else btt_cores)(out_modes, in_modes, *ranks))


@st.composite
def _monarchs(draw: Draw) -> Case:
    b, p, q, s = draw(st.integers(1, 4)), draw(SMALL), draw(st.integers(1, 4)), draw(SMALL)
    cut = {"in_features": b * p - draw(st.integers(0, b - 1)), "out_features": b * s - draw(st.integers(0, b - 1))}
    return _case("Monarch", (b, s, q), (b, q, p), **(cut if draw(st.booleans()) else {}))


@st.composite
def _blasts(draw: Draw) -> Case:
    i, m, j, n, r = (draw(SMALL) for _ in range(5))
    return _case("BLAST", (i, m, r), (i, j, r), (j, n, r))


@st.composite
def _convolutions(draw: Draw) -> Case:
    padding = draw(st.sampled_from(["valid", "same", "circular"]))
    axes = draw(st.integers(1, 2))
    taps = tuple(draw(SMALL) for _ in range(axes))
    spatial = tuple(draw(st.integers(1 if padding == "same" else t, 4)) for t in taps)
    return _case("Convolution", (draw(SMALL), draw(SMALL), *taps), spatial_shape=spatial, padding=padding)


@st.composite
def _einsums(draw: Draw) -> Case:
    """Any chain: every factor contracts, keeps or skips each label of the state, and emits new ones."""
    fresh = iter("abcdefghijklmnopqrstuvwxyz")
    size: dict[str, int] = {}

    def emit(least: int, most: int) -> list[str]:
        labels = list(itertools.islice(fresh, draw(st.integers(least, most))))
        size.update({label: draw(SMALL) for label in labels})
        return labels

    def shuffled(labels: list[str]) -> str:
        return "".join(draw(st.permutations(labels)))

    state = emit(1, 3)
    terms, shapes = [shuffled(state)], []
    for _ in range(draw(st.integers(1, 3))):
        roles = {label: draw(st.sampled_from(["contracted", "batch", "shared"])) for label in state}
        kept = [label for label in state if roles[label] != "contracted"]
        touched = [label for label in state if roles[label] != "shared"]
        emitted = emit(0 if kept and touched else 1, 2)
        terms.append(shuffled(touched + emitted))
        shapes.append(tuple(size[label] for label in terms[-1]))
        state = kept + emitted
        if draw(st.integers(0, 3)) == 0:
            before, count = shuffled(state), math.prod(size[label] for label in state)
            first = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
            state = [next(fresh), next(fresh)]
            size.update(zip(state, (first, count // first), strict=True))
            terms.append(f"{before}={shuffled(state)}")
    pattern = ", ".join(terms) + " -> " + shuffled(state)
    named = {label for term in terms[1:] if "=" not in term for label in term}
    return _case("Einsum", shapes, pattern=pattern, sizes={k: n for k, n in size.items() if k not in named})


@st.composite
def _krons(draw: Draw, part: st.SearchStrategy[Any]) -> Case:
    return _case("Kron", *_parts(draw, part, most=2))


@st.composite
def _block_diags(draw: Draw, part: st.SearchStrategy[Any]) -> Case:
    parts = list(_parts(draw, part, most=3))
    return _case("BlockDiag", *parts, multiplicities=tuple(draw(st.integers(1, 2)) for _ in parts))


def _parts(draw: Draw, part: st.SearchStrategy[Any], most: int) -> Iterator[Any]:
    """Parts, often the same one again: blocks of one shape make a chain."""
    first = draw(part)
    for _ in range(draw(st.integers(1, most))):
        yield first if draw(st.booleans()) else draw(part)


# Matrices of at most some dozen rows, none of which holds others.
SIMPLE: dict[str, st.SearchStrategy[Case]] = {
    "Dense": st.builds(lambda m, n: _case("Dense", (m, n)), SIDE, SIDE),
    "LowRank": st.builds(lambda m, r, n: _case("LowRank", (m, r), (r, n)), SIDE, SMALL, SIDE),
    "TT": _trains("TT"),
    "BTT": _trains("BTT"),
    "Monarch": _monarchs(),
    "BLAST": _blasts(),
    "Circulant": st.builds(lambda n: _case("Circulant", (n,)), SIDE),
    "Toeplitz": st.builds(lambda m, n: _case("Toeplitz", (m,), (n,)), SIDE, SIDE),
    "Convolution": _convolutions(),
    "Permutation": st.builds(lambda n: _case("Permutation", Indices(n)), SIDE),
    "Einsum": _einsums(),
    "Diagonal": st.builds(lambda n: _case("Diagonal", (n,)), SIDE),
}
