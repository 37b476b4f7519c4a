"""Products: which neighbours become one operator, and the lazy product of those that do not.

``A @ B`` flattens both sides, takes numbers to the front, drops identities, and asks `product_rule` about every pair of
neighbours, from the left.  A rule depends on types and sizes alone, never on values, so that the type of a result is
the same under ``jit``.  A pair without a rule stays a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from numbers import Number
from typing import Any, Self

import numpy as np

from structops import _array, _cola
from structops._array import Array
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.counting import merged_counts
from structops.algebra.properties import common, is_transpose_of
from structops.algebra.scalar import ScalarMul, Zero, dtype_with, kept_by_scaling, like, scalar_of, scale_rule
from structops.errors import ShapeError
from structops.operator import StructuredOperator, apply_left, kind_of, promoted, promoted_parts


@dispatch
def product_rule(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    """``A @ B`` as one operator, or None where the structures have no common one."""
    return None


def transposed(result: LinearOperator | None) -> LinearOperator | None:
    """The transpose of what a rule gave, for rules that ask about transposes: ``A B = (B^T A^T)^T``."""
    return None if result is None else result.T


class Product(StructuredOperator, _cola.Product):
    r"""The product of operators that have no common structure.

    **Definition.** \(A = M_1 M_2 \ldots M_k\); the last is applied first.

    Args:
        *Ms: Operators, each with as many columns as the next has rows.

    Raises:
        ShapeError: Sizes do not fit.

    **Cost.** Parameters and MACs of all parts; an array that occurs twice counts once.

    **Numerics.** One product a part.
    """

    leaves = ("Ms",)
    Ms: tuple[LinearOperator, ...]

    def __init__(self, *Ms: LinearOperator) -> None:
        check_product(Ms)
        self.Ms = promoted_parts(Ms)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows of the first, columns of the last)``."""
        return self.Ms[0].shape[0], self.Ms[-1].shape[1]

    @property
    def inferred(self) -> set[type]:
        """Products of unitary operators are unitary."""
        return common(self.Ms, _cola.Stiefel)

    def _matmat(self, X: Array) -> Array:
        for M in reversed(self.Ms):
            X = M._matmat(X)
        return X

    def _rmatmat(self, X: Array) -> Array:
        for M in self.Ms:
            X = apply_left(M, X)
        return X

    def transposed(self) -> Self:
        """The transposes in reverse order."""
        return self.with_leaves(tuple(_cola.transpose(M) for M in reversed(self.Ms)))

    def parameter_counts(self) -> dict[int, int]:
        """Those of all parts; an array that occurs twice once."""
        return merged_counts(self.Ms)

    def describe(self) -> str:
        """The parts."""
        return " @ ".join(f"{kind_of(M)} {M.shape[0]}x{M.shape[1]}" for M in self.Ms)


def check_product(operators: Sequence[LinearOperator]) -> None:
    """Each has as many columns as the next has rows.

    Raises:
        ShapeError: One has not; the message shows both.
    """
    for left, right in pairwise(operators):
        if left.shape[1] != right.shape[0]:
            raise ShapeError(
                f"cannot multiply {left!r} by {right!r}: {left.shape[1]} columns against {right.shape[0]} rows"
            )


def product(*operators: LinearOperator) -> LinearOperator:
    """The product of operators, merged where neighbours have a rule.

    Raises:
        ShapeError: Sizes do not fit.
    """
    check_product(operators)
    shape = operators[0].shape[0], operators[-1].shape[1]
    numbers, terms = _factored(operators)
    if any(isinstance(M, Zero) for M in terms):
        return Zero(*shape, like=like(operators[0], _array.promote(*(M.dtype for M in operators))))
    stack: list[LinearOperator] = []
    for M in terms:
        stack.append(M)
        while len(stack) > 1 and (merged := product_rule(*stack[-2:])) is not None:
            more, parts = _factored([merged])
            numbers += more
            stack[-2:] = parts
    if not stack:  # identities and numbers alone
        stack = [next((M for M in operators if isinstance(M, _cola.Identity)), operators[0])]
        numbers = numbers if isinstance(stack[0], _cola.Identity) else numbers[1:]
    result = stack[0] if len(stack) == 1 else Product(*stack)
    return reduce(scaled, numbers, promoted(result, operators))


def _factored(operators: Iterable[LinearOperator]) -> tuple[list[Any], list[LinearOperator]]:
    """Numbers, and all other operators but identities, with products taken apart."""
    numbers: list[Any] = []
    others: list[LinearOperator] = []
    for M in operators:
        c = scalar_of(M)
        if isinstance(M, _cola.Product):
            more, parts = _factored(M.Ms)
            numbers += more
            others += parts
        elif c is None:
            others.append(M)
        elif not isinstance(c, int):
            numbers.append(c)
    return numbers, others


def scaled(A: LinearOperator, c: Any) -> LinearOperator:
    """``c * A``: in the structure of A where it has a rule, else the product of a `ScalarMul` and A.

    A real number keeps self-adjoint operators self-adjoint, one of at least 0 keeps positive semidefinite ones so, and
    one of modulus 1 unitary ones; the value of an array is not looked at.

    Args:
        A: An operator.
        c: A number or an array without axes; cast to the dtype of A unless it is complex.

    Raises:
        ShapeError: ``c`` has axes.
    """
    if isinstance(c, np.generic):
        c = c.item()  # numpy's numbers would promote
    if not isinstance(c, Number):
        if c.ndim:
            raise ShapeError(
                f"c * A takes a number, got shape {tuple(c.shape)}; row by row that is so.Diagonal(c) @ A, "
                f"column by column A @ so.Diagonal(c)"
            )
        c = c if _array.is_complex(c.dtype) else _array.cast(c, A.dtype)
    elif c == 1:
        return A
    elif c == 0:
        return Zero(*A.shape, like=like(A))
    result = scale_rule(A, c)
    if result is None:
        result = Product(ScalarMul(like(A, dtype_with(A.dtype, c)) + c, A.shape[0]), A)
    if isinstance(result, StructuredOperator):
        result.annotations = result.annotations | kept_by_scaling(A, c)
    return result


@scale_rule.dispatch
def scale_product(A: _cola.Product, c: object) -> LinearOperator | None:
    """The first part that can takes the number."""
    for k, M in enumerate(A.Ms):
        part = scale_rule(M, c)
        if part is not None:
            return Product(*A.Ms[:k], part, *A.Ms[k + 1 :])
    return None


# ------------------------------------------------------------------------------------------------- what CoLA calls them


def _dot(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    result = product(A, B)
    if isinstance(result, StructuredOperator) and is_transpose_of(A, B):
        result.annotations = result.annotations | {_cola.PSD}
    return result


# Above CoLA's rules for identities, which look at neither shapes nor dtypes.
@_cola.dot.dispatch(precedence=23)
def dot_structures(A: StructuredOperator, B: StructuredOperator) -> LinearOperator:
    """Two structures."""
    return _dot(A, B)


@_cola.dot.dispatch(precedence=22)
def dot_structure_left(A: StructuredOperator, B: LinearOperator) -> LinearOperator:
    """A structure, and an operator of CoLA."""
    return _dot(A, B)


@_cola.dot.dispatch(precedence=21)
def dot_structure_right(A: LinearOperator, B: StructuredOperator) -> LinearOperator:
    """An operator of CoLA, and a structure."""
    B._check_library(A)
    return _dot(A, B)


@_cola.mul.dispatch(precedence=1)
def mul_structure(A: StructuredOperator, c: object) -> LinearOperator:
    """A number, and a structure."""
    return scaled(A, c)
