"""Inverses and pseudo-inverses: which structures have direct ones; for all others CoLA's algorithms.

``cola.linalg.inv`` and ``solve`` ask `inverse_rule`, ``pinv`` asks `pinv_rule`.  A structure without a rule goes where
CoLA sends it: LU or Cholesky up to 1000 x 1000, CG or GMRES beyond.
"""

from __future__ import annotations

from structops import _array, _cola
from structops._cola import Algorithm, LinearOperator
from structops._plum import dispatch
from structops.algebra.product import Product, product
from structops.algebra.properties import common
from structops.algebra.scalar import Identity, ScalarMul, Zero
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError, StructureError
from structops.operator import StructuredOperator, check_precision


@dispatch
def inverse_rule(A: LinearOperator, alg: Algorithm) -> LinearOperator | None:
    """The inverse of a square A from its structure, or None; ``alg`` is for parts that have no direct inverse.

    Raises:
        StructureError: A is singular whatever its numbers are.
    """
    return None


@dispatch
def pinv_rule(A: LinearOperator, alg: Algorithm) -> LinearOperator | None:
    """The pseudo-inverse of A from its structure, or None."""
    return None


@_cola.rules(_cola.inv).dispatch(precedence=2)
def inv_structured(A: StructuredOperator, alg: Algorithm) -> LinearOperator:
    """CoLA's ``inv`` for our operators.

    Raises:
        ShapeError: A is not square.
        StructureError: A is singular whatever its numbers are.
        BackendError: A has 16 bits.
    """
    check_square(A, "an inverse", "cola.linalg.pinv takes any shape")
    check_precision("an inverse", A.dtype)
    if A.isa(_cola.Unitary):
        return A.H
    result = inverse_rule(A, alg)
    if result is None:
        return _cola.rules(_cola.inv).invoke(LinearOperator, type(alg))(A, alg)
    if isinstance(result, StructuredOperator):
        result.annotations = result.annotations | common([A], _cola.SelfAdjoint)
    return result


@_cola.rules(_cola.pinv).dispatch(precedence=2)
def pinv_structured(A: StructuredOperator, alg: Algorithm) -> LinearOperator:
    """CoLA's ``pinv`` for our operators.

    Raises:
        BackendError: A has 16 bits.
    """
    check_precision("a pseudo-inverse", A.dtype)
    if A.isa(_cola.Unitary):
        return A.H
    result = pinv_rule(A, alg)
    return _cola.rules(_cola.pinv).invoke(LinearOperator, type(alg))(A, alg) if result is None else result


def check_square(A: LinearOperator, what: str, instead: str = "") -> None:
    """A has as many rows as columns.

    Raises:
        ShapeError: It has not.
    """
    if A.shape[0] != A.shape[1]:
        raise ShapeError(f"{what} needs a square operator, got {A!r}{'; ' + instead if instead else ''}")


def is_square(A: LinearOperator) -> bool:
    """Whether A has as many rows as columns."""
    return bool(A.shape[0] == A.shape[1])


def singular(A: LinearOperator, why: str) -> StructureError:
    """The error for an operator that is singular whatever its numbers are."""
    return StructureError(f"{A!r} is singular: {why}; cola.linalg.pinv gives its pseudo-inverse")


# --------------------------------------------------------------------------------------------------------------- chains


def has_square_factors(A: ChainOperator) -> bool:
    """Whether every factor has square blocks and nothing is padded: then A is a product of invertible maps."""
    chain = A.chain
    return chain.shape == (chain.padded_out, chain.padded_in) and all(f.fan_in == f.fan_out for f in chain.factors)


@inverse_rule.dispatch
def inverse_chain(A: ChainOperator, alg: Algorithm) -> LinearOperator | None:
    """Of square blocks: the transposed chain with inverse blocks, of the same structure and as many parameters.

    One block alone is a dense matrix, and left to CoLA.
    """
    chain = A.chain
    if chain.rank_bound < A.shape[0]:
        raise singular(A, f"its structure caps the rank at {chain.rank_bound}")
    if not has_square_factors(A) or (len(chain.factors) == 1 and chain.factors[0].blocks == 1):
        return None
    if A.is_transposed:
        return inverse_chain(A.T, alg).T
    inverted = _array.decomposed(_array.namespace(A.arrays[0]).linalg.inv, A.stored_factors())
    return type(A).from_factors(chain, [F.mT for F in inverted]).T


# ------------------------------------------------------------------------------------------------ products and scalars


@inverse_rule.dispatch
def inverse_product(A: Product, alg: Algorithm) -> LinearOperator | None:
    """The inverses in reverse order, where all parts are square; a narrow part between makes it singular."""
    if min(M.shape[1] for M in A.Ms) < A.shape[0]:
        raise singular(A, f"its parts cap the rank at {min(M.shape[1] for M in A.Ms)}")
    if not all(map(is_square, A.Ms)):
        return None
    return product(*(_cola.inv(M, alg) for M in reversed(A.Ms)))


@inverse_rule.dispatch
def inverse_scalar(A: _cola.ScalarMul, alg: Algorithm) -> LinearOperator | None:
    """The reciprocal."""
    return ScalarMul(1 / A.c, A.shape[0])


@inverse_rule.dispatch
def inverse_identity(A: Identity, alg: Algorithm) -> LinearOperator | None:
    """Itself."""
    return A


@inverse_rule.dispatch
def inverse_zero(A: Zero, alg: Algorithm) -> LinearOperator | None:
    """There is none."""
    raise singular(A, "it is zero")


@pinv_rule.dispatch
def pinv_scalar(A: _cola.ScalarMul, alg: Algorithm) -> LinearOperator | None:
    """The reciprocal, and 0 of 0."""
    return ScalarMul(reciprocal(A.c), A.shape[0])


@pinv_rule.dispatch
def pinv_identity(A: Identity, alg: Algorithm) -> LinearOperator | None:
    """Itself."""
    return A


@pinv_rule.dispatch
def pinv_zero(A: Zero, alg: Algorithm) -> LinearOperator | None:
    """Its transpose."""
    return A.T


def reciprocal(values: _array.Array, tolerance: float | None = None) -> _array.Array:
    """``1 / value``, and 0 where the modulus is at most ``tolerance`` times the largest (by default eps times n)."""
    xp = _array.namespace(values)
    size = xp.abs(values)
    if tolerance is None:
        tolerance = xp.finfo(values.dtype).eps * max(values.shape, default=1)
    small = size <= tolerance * xp.max(size)
    # The safe value in the first where keeps its gradient from being infinite times zero.
    return xp.where(small, xp.zeros_like(values), 1 / xp.where(small, xp.ones_like(values), values))
