"""Sums: which terms become one operator, and the lazy sum of those that do not.

``A + B`` flattens both sides, drops zeros, and asks `sum_rule` about every pair of terms.  As for products, a rule
depends on types and sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Self

from structops import _array, _cola
from structops._array import Array
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.counting import merged_counts
from structops.algebra.product import scaled
from structops.algebra.properties import common, same
from structops.algebra.scalar import ScalarMul, Zero, like, scalar_of, scale_rule
from structops.errors import ShapeError
from structops.operator import StructuredOperator, apply_left, kind_of, promoted, promoted_parts


@dispatch
def sum_rule(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    """``A + B`` as one operator, or None where the structures have no common one.

    Sums commute, and are asked about in both orders: a rule is written for one.
    """
    return None


class Sum(StructuredOperator, _cola.Sum):
    r"""The sum of operators that have no common structure.

    **Definition.** \(A = M_1 + \ldots + M_k\).

    Args:
        *Ms: Operators of one shape.

    Raises:
        ShapeError: Shapes differ.

    **Cost.** Parameters and MACs of all parts; an array that occurs twice counts once, additions do not count.

    **Numerics.** One product a part.
    """

    leaves = ("Ms",)
    Ms: tuple[LinearOperator, ...]

    def __init__(self, *Ms: LinearOperator) -> None:
        check_sum(Ms)
        self.Ms = promoted_parts(Ms)

    @property
    def shape(self) -> tuple[int, int]:
        """That of every part."""
        rows, cols = self.Ms[0].shape
        return rows, cols

    @property
    def inferred(self) -> set[type]:
        """Sums of self-adjoint operators are self-adjoint, of positive semidefinite ones positive semidefinite."""
        return common(self.Ms, _cola.SelfAdjoint)

    def _matmat(self, X: Array) -> Array:
        return reduce(lambda y, M: y + M._matmat(X), self.Ms[1:], self.Ms[0]._matmat(X))

    def _rmatmat(self, X: Array) -> Array:
        return reduce(lambda y, M: y + apply_left(M, X), self.Ms[1:], apply_left(self.Ms[0], X))

    def transposed(self) -> Self:
        """The transposes."""
        return self.with_leaves(tuple(_cola.transpose(M) for M in self.Ms))

    def parameter_counts(self) -> dict[int, int]:
        """Those of all parts; an array that occurs twice once."""
        return merged_counts(self.Ms)

    def describe(self) -> str:
        """The parts."""
        return " + ".join(kind_of(M) for M in self.Ms)


def check_sum(operators: Sequence[LinearOperator]) -> None:
    """All have one shape.

    Raises:
        ShapeError: They have not; the message shows both.
    """
    first, *others = operators
    for M in others:
        if tuple(M.shape) != tuple(first.shape):
            raise ShapeError(f"cannot add {first!r} and {M!r}")


def add(*operators: LinearOperator) -> LinearOperator:
    """The sum of operators, merged where two of them have a rule.

    Raises:
        ShapeError: Shapes differ.
    """
    check_sum(operators)
    terms: list[LinearOperator] = []
    for M in operators:
        for term in M.Ms if isinstance(M, _cola.Sum) else (M,):
            _insert(terms, term)
    nonzero = [term for term in terms if not isinstance(term, Zero)] or terms[:1]
    return promoted(nonzero[0] if len(nonzero) == 1 else Sum(*nonzero), operators)


def _insert(terms: list[LinearOperator], term: LinearOperator) -> None:
    """Add a term to the one that it merges with, and that sum again, or append it."""
    for k, other in enumerate(terms):
        merged = _merged(other, term)
        if merged is not None:
            del terms[k]
            return _insert(terms, merged)
    terms.append(term)
    return None


def _merged(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    if same(A, B):
        return scaled(A, 2)
    if isinstance(A, Zero) or isinstance(B, Zero):
        return B if isinstance(A, Zero) else A
    for left, right in ((A, B), (B, A)):
        merged = sum_rule(left, right)
        if merged is not None:
            if isinstance(merged, StructuredOperator):
                merged.annotations = merged.annotations | common((A, B), _cola.SelfAdjoint)
            return merged
    return None


@sum_rule.dispatch
def sum_scalars(A: _cola.ScalarMul | _cola.Identity, B: _cola.ScalarMul | _cola.Identity) -> LinearOperator | None:
    """Numbers add up."""
    zero = like(A, _array.promote(A.dtype, B.dtype))
    return ScalarMul(zero + scalar_of(A) + scalar_of(B), A.shape[0])


@scale_rule.dispatch
def scale_sum(A: _cola.Sum, c: object) -> LinearOperator | None:
    """Every part takes the number."""
    return Sum(*(scaled(M, c) for M in A.Ms))


# ------------------------------------------------------------------------------------------------- what CoLA calls them


@_cola.add.dispatch(precedence=3)
def add_structures(A: StructuredOperator, B: StructuredOperator) -> LinearOperator:
    """Two structures."""
    return add(A, B)


@_cola.add.dispatch(precedence=2)
def add_structure_left(A: StructuredOperator, B: LinearOperator) -> LinearOperator:
    """A structure, and an operator of CoLA."""
    return add(A, B)


@_cola.add.dispatch(precedence=1)
def add_structure_right(A: LinearOperator, B: StructuredOperator) -> LinearOperator:
    """An operator of CoLA, and a structure."""
    B._check_library(A)
    return add(A, B)
