"""The closure table holds: every cell by structure and by value, every pair raises nothing, and every rule is one."""

from __future__ import annotations

import itertools
import numbers
import operator as py
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import plum
import pytest

import structops as so
from structops import _cola
from structops.algebra.closure import BINARY, ROWS, UNARY, closure
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import Product, product_rule
from structops.algebra.scalar import scale_rule
from structops.algebra.sum import Sum, sum_rule
from structops.testing import Case, assert_close, operator_cases, representatives, to_backend, to_numpy
from structops.testing.cases import identity_case, multiple_case, zero_case
from structops.testing.checks import draw_like, norm

Pair = tuple[Any, np.ndarray]  # an operator, and its matrix built in another way
VERBS: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray]]] = {
    "@": (py.matmul, np.matmul),
    "+": (py.add, np.add),
    "kron": (so.kron, np.kron),
}
CASES = {case.structure.__name__: case for case in representatives()}
CASES |= {"Identity": identity_case(4), "Zero": zero_case(4, 4), "ScalarMul": multiple_case(4)}


def build(name: str, backend: str = "torch", dtype: str = "float64", seed: int = 0) -> Pair:
    """The 4 x 4 operator of a row of the table."""
    return CASES[name].build(backend, dtype, seed)


def assert_matrix(A: Any, M: np.ndarray, scale: float) -> None:
    """The value, and products from both sides; ``scale`` is the norm of what was multiplied or added."""
    rng = np.random.default_rng(0)
    x, Y = draw_like(A, rng, (M.shape[1],)), draw_like(A, rng, (2, M.shape[0]))
    assert tuple(A.shape) == M.shape
    assert_close(A.to_dense(), M, scale=scale)
    assert_close(A @ x, M @ to_numpy(x), scale=scale * norm(x))
    assert_close(Y @ A, to_numpy(Y) @ M, scale=scale * norm(Y))


def scale_of(M: np.ndarray, N: np.ndarray) -> float:
    """The norms that rounding errors of a product or sum are relative to; sizes are below a hundred."""
    return 10 * (1 + norm(M)) * (1 + norm(N))


# ------------------------------------------------------------------------------------------------------------- the data


def test_the_table_knows_every_structure() -> None:
    assert {*so.OPERATORS, "Identity", "Zero", "ScalarMul"} == set(ROWS)
    named = [names for lines in BINARY.values() for key in lines for names in key] + [
        names for verb in ("T", "H", "c *") for names in UNARY[verb]
    ]
    assert {name for names in named for name in names.split()} <= {*ROWS, "*"}


def test_every_line_is_the_first_that_matches_some_cell() -> None:
    """No line is there in vain, and none hides another."""
    for verb, lines in BINARY.items():
        for (left, right), result in lines.items():
            rows, columns = (ROWS if names == "*" else names.split() for names in (left, right))
            cells = itertools.product(rows, columns)
            expected = {(r, c): {"left": r, "right": c}.get(result, result) for r, c in cells}
            assert any(closure(verb, r, c) == name for (r, c), name in expected.items()), (verb, left, right)


def test_what_the_table_has_no_line_for() -> None:
    with pytest.raises(KeyError):
        closure("-", "Dense", "Dense")
    with pytest.raises(KeyError):
        closure("nothing", "Dense")


# ----------------------------------------------------------------------------------------------------------- every cell


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("row", ROWS)
def test_every_cell(row: str, verb: str, dtype: str) -> None:
    combine, expected = VERBS[verb]
    for column in ROWS:
        (A, M), (B, N) = build(row, dtype=dtype, seed=1), build(column, dtype=dtype, seed=2)
        result, dense = combine(A, B), expected(M, N)
        assert type(result).__name__ == closure(verb, row, column), column
        assert result.dtype == A.dtype
        assert_matrix(result, dense, scale_of(M, N))
        assert_close(result.T.to_dense(), dense.T, scale=scale_of(M, N))
        assert_close(result.H.to_dense(), dense.conj().T, scale=scale_of(M, N))


@pytest.mark.jax
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("row", ROWS)
def test_every_cell_is_the_same_under_jit(row: str, verb: str) -> None:
    """A rule sees types and sizes alone; the values on JAX are asserted in ``test_operators.py``."""
    import jax

    A, _ = build(row, "jax", seed=1)
    others = [build(column, "jax", seed=2)[0] for column in ROWS]
    results = jax.eval_shape(lambda A, others: [VERBS[verb][0](A, B) for B in others], A, others)
    for column, result in zip(ROWS, results, strict=True):
        assert type(result).__name__ == closure(verb, row, column), column


@pytest.mark.torch
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("row", ROWS)
def test_transposed_operands(row: str, verb: str) -> None:
    combine, expected = VERBS[verb]
    A, M = build(row, dtype="complex128", seed=1)
    for column in ROWS:
        B, N = build(column, dtype="complex128", seed=2)
        for left, right, dense in (
            (A.T, B, expected(M.T, N)),
            (A, B.T, expected(M, N.T)),
            (A.H, B.T, expected(M.conj().T, N.T)),
        ):
            result = combine(left, right)
            assert_close(result.to_dense(), dense, scale=scale_of(M, N))
            assert_close(result.T.to_dense(), dense.T, scale=scale_of(M, N))


@pytest.mark.torch
@pytest.mark.parametrize("row", ROWS)
def test_transposing_and_scaling(row: str) -> None:
    import torch

    A, M = build(row, seed=1)
    for verb, result, dense in (
        ("T", A.T, M.T),
        ("H", A.H, M.T),
        ("c *", 3 * A, 3 * M),
        ("c *", A * -0.5, -0.5 * M),
        ("c *", A / 4, M / 4),
        ("c *", 2j * A, 2j * M),
        ("c *", torch.tensor(2.5) * A, 2.5 * M),
        ("c *", torch.tensor(1j) * A, 1j * M),
        ("c *", -A, -M),
    ):
        assert type(result).__name__ == closure(verb, row), verb
        assert_matrix(result, dense, 10 * (1 + norm(M)))
        assert_close(result.H.to_dense(), dense.conj().T, scale=10 * (1 + norm(M)))
    assert 1 * A is A
    assert isinstance(0 * A, so.Zero)


@pytest.mark.torch
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("row", ROWS)
def test_dtypes_meet(row: str, verb: str) -> None:
    import torch

    combine, expected = VERBS[verb]
    A, M = build(row, dtype="float32", seed=1)
    for column, (dtype, result) in itertools.product(
        ROWS, {"complex64": torch.complex64, "bfloat16": torch.float32}.items()
    ):
        B, N = build(column, dtype=dtype, seed=2)
        for C, dense in ((combine(A, B), expected(M, N)), (combine(B, A), expected(N, M))):
            assert C.dtype == result, (column, dtype)
            assert C.to_dense().dtype == result, (column, dtype)
            limit = "bfloat16" if dtype == "bfloat16" else "float32"
            assert_close(C.to_dense(), dense, scale=scale_of(M, N), dtype=limit)


# ---------------------------------------------------------------------------------------------------------- every pair


@pytest.mark.torch
@pytest.mark.parametrize("verb", ["@", "+"])
@pytest.mark.parametrize("case", operator_cases(), ids=str)
def test_every_pair_of_cases_whose_sizes_fit(case: Case, verb: str) -> None:
    combine, expected = VERBS[verb]
    A, M = case.build("torch", seed=1)
    for other in operator_cases():
        if (case.shape[1] == other.shape[0]) if verb == "@" else case.shape == other.shape:
            B, N = other.build("torch", seed=2)
            for left, P, right, Q in ((A, M, B, N), *(((A, M, B.T, N.T),) if N.shape[0] == N.shape[1] else ())):
                assert_close(combine(left, right).to_dense(), expected(P, Q), scale=scale_of(M, N), what=f"{other}")


OURS = ("Product of ours", "Sum of ours", "product of sums", "sum of products")


def others() -> dict[str, Pair]:
    """4 x 4 operators that are in no row: products and sums, ours and CoLA's, and CoLA's own."""
    (D, M), (C, N) = build("Dense", seed=3), build("Circulant", seed=4)
    d, perm = to_backend(np.arange(1.0, 5.0), "torch"), to_backend(np.array([2, 0, 3, 1]), "torch")
    stock = _cola.Dense(to_backend(M, "torch"))
    return {
        "Product of ours": (Product(D, C), M @ N),
        "Sum of ours": (Sum(D, C), M + N),
        "product of sums": (Product(Sum(D, C), D), (M + N) @ M),
        "sum of products": (Sum(Product(D, C), C), M @ N + N),
        "Dense": (stock, M),
        "Product": (_cola.Product(stock, stock), M @ M),
        "Sum": (_cola.Sum(stock, stock), 2 * M),
        "Diagonal": (_cola.Diagonal(d), np.diag(np.arange(1.0, 5.0))),
        "Identity": (_cola.Identity((4, 4), d.dtype), np.eye(4)),
        "ScalarMul": (_cola.ScalarMul(2.5, (4, 4), d.dtype, d.device), 2.5 * np.eye(4)),
        "Permutation": (_cola.Permutation(perm, d.dtype), np.eye(4)[[2, 0, 3, 1]]),
        "scaled": (2 * stock, 2 * M),
        "Transpose": (_cola.Transpose(_cola.Product(stock, stock)), (M @ M).T),
        "Sliced": (_cola.Sliced(_cola.Dense(to_backend(np.vstack([M, N]), "torch")), (slice(0, 4), slice(0, 4))), M),
    }


@pytest.mark.torch
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", others())
def test_pairs_with_lazy_operators_and_those_of_cola(name: str, verb: str) -> None:
    combine, expected = VERBS[verb]
    B, N = others()[name]
    # ``test_operators.py`` has the structures beside the operators of CoLA.
    rows = [row for row in ROWS if name in OURS or row not in so.OPERATORS]
    ours = {row: build(row, seed=1) for row in rows} | {key: others()[key] for key in OURS}
    for A, M in ours.values():
        for left, P, right, Q in ((A, M, B, N), (B, N, A, M)):
            result = combine(left, right)
            assert_close(result.to_dense(), expected(P, Q), scale=scale_of(M, N))
            assert_close(result.T.to_dense(), expected(P, Q).T, scale=scale_of(M, N))


@pytest.mark.torch
def test_operators_of_cola_are_converted_with_all_that_they_hold() -> None:
    import torch

    stock = _cola.Dense(to_backend(np.ones((4, 4)), "torch"))
    identity = so.Identity(4, like=torch.ones((), dtype=torch.complex128))
    result = identity @ _cola.Adjoint(_cola.Sum(stock, _cola.Product(stock, stock)))
    assert result.dtype == result.A.dtype == result.A.Ms[1].dtype == result.A.Ms[1].Ms[0].dtype == torch.complex128


# -------------------------------------------------------------------------------------------------------- one rule each


def known_classes() -> list[type]:
    """All operators of CoLA and of structops; tests define some of their own, too."""

    def below(cls: type) -> Iterator[type]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    found = dict.fromkeys(below(_cola.LinearOperator))
    return [cls for cls in found if cls.__module__.split(".")[0] in ("cola", "structops")]


def kinds(verb: Any, position: int) -> list[type]:
    """One class of all those that the rules of a verb cannot tell apart; asking about all pairs takes long."""
    found = {}
    for cls in known_classes():
        fits = tuple(plum.Signature(cls) <= plum.Signature(rule.types[position]) for rule in verb.methods)
        found[fits] = cls
    return list(found.values())


@pytest.mark.parametrize(
    "verb",
    [product_rule, sum_rule, kron_rule, _cola.dot, _cola.add, _cola.kron],
    ids=lambda verb: f"{verb.__module__}.{verb.__name__}",
)
def test_no_pair_of_classes_is_ambiguous(verb: Any) -> None:
    for left, right in itertools.product(kinds(verb, 0), kinds(verb, 1)):
        verb.resolve_method(plum.Signature(left, right))  # raises where two rules fit equally well


@pytest.mark.parametrize("verb", [scale_rule, _cola.mul], ids=lambda verb: verb.__name__)
def test_no_multiple_is_ambiguous(verb: Any) -> None:
    for cls, number in itertools.product(kinds(verb, 0), (int, float, complex, np.float64, np.ndarray, numbers.Number)):
        verb.resolve_method(plum.Signature(cls, number))


@pytest.mark.parametrize("verb", [_cola.transpose, _cola.adjoint], ids=lambda verb: verb.__name__)
def test_no_transpose_is_ambiguous(verb: Any) -> None:
    for cls in kinds(verb, 0):
        verb.resolve_method(plum.Signature(cls))


# --------------------------------------------------------------------------------------------------------- wrong shapes


@pytest.mark.torch
@pytest.mark.parametrize("verb", ["@", "+"])
@pytest.mark.parametrize("row", ROWS)
def test_wrong_shapes_are_one_error_that_names_both(row: str, verb: str) -> None:
    A, _ = build(row)
    for other in (so.LowRank, so.Dense, Product, Sum, so.Zero, _cola.Dense):
        B = wrong_shape(other)
        for left, right in ((A, B), (B.T, A)):
            (m, n), (k, p) = left.shape, right.shape
            shown = rf"{type(left).__name__}.*{type(right).__name__}"
            with pytest.raises(so.ShapeError, match=shown) as caught:
                VERBS[verb][0](left, right)
            assert f"{m}x{n}" in str(caught.value)
            assert f"{k}x{p}" in str(caught.value)


def wrong_shape(kind: Any) -> Any:
    """A 3 x 2 operator."""
    D = so.Dense(to_backend(np.ones((3, 2)), "torch"))
    square = so.Dense(to_backend(np.ones((2, 2)), "torch"))
    return {
        so.LowRank: lambda: so.LowRank(D.A[:, :1], D.A[:1]),
        so.Dense: lambda: D,
        Product: lambda: Product(D, square),
        Sum: lambda: Sum(D, D),
        so.Zero: lambda: so.Zero(3, 2, like=D.A),
        _cola.Dense: lambda: _cola.Dense(D.A),
    }[kind]()
