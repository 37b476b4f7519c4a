"""Kronecker products: which pairs become one operator.  All others are a `Kron`, which lies with the structures."""

from __future__ import annotations

from structops import _array
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.scalar import Identity, Zero, like


@dispatch
def kron_rule(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    """The Kronecker product of A and B as one operator of a simpler kind than `Kron`, or None."""
    return None


@kron_rule.dispatch
def kron_identities(A: Identity, B: Identity) -> LinearOperator | None:
    """An identity."""
    return Identity(A.shape[0] * B.shape[0], like=like(A, _array.promote(A.dtype, B.dtype)))


@kron_rule.dispatch(precedence=1)
def kron_zero_left(A: Zero, B: LinearOperator) -> LinearOperator | None:
    """Zero."""
    return _zero(A, B)


@kron_rule.dispatch(precedence=2)
def kron_zero_right(A: LinearOperator, B: Zero) -> LinearOperator | None:
    """Zero."""
    return _zero(A, B)


@kron_rule.dispatch(precedence=3)
def kron_zeros(A: Zero, B: Zero) -> LinearOperator | None:
    """Zero."""
    return _zero(A, B)


def _zero(A: LinearOperator, B: LinearOperator) -> Zero:
    dtype = _array.promote(A.dtype, B.dtype)
    return Zero(A.shape[0] * B.shape[0], A.shape[1] * B.shape[1], like=like(A, dtype))
