"""Inverses of positive semidefinite matrices that may be singular."""

from __future__ import annotations

from structops import _array
from structops._array import Array


def root_and_inverse(C: Array) -> tuple[Array, Array]:
    """``C^(1/2)`` and the pseudo-inverse of stacks of positive semidefinite matrices.

    Eigenvalues below eps * n * the largest count as zero.
    """
    xp = _array.namespace(C)
    values, vectors = xp.linalg.eigh((C + _array.adjoint(C)) / 2)
    floor = float(xp.finfo(C.dtype).eps) * int(C.shape[-1]) * xp.max(xp.abs(values), axis=-1, keepdims=True)
    is_seen = values > floor
    safe = xp.where(is_seen, values, xp.ones_like(values))
    roots = xp.where(is_seen, xp.sqrt(safe), xp.zeros_like(values))
    inverses = xp.where(is_seen, 1 / safe, xp.zeros_like(values))
    back = _array.adjoint(vectors)
    return (vectors * roots[..., None, :]) @ back, (vectors * inverses[..., None, :]) @ back


def positive_inverse(C: Array) -> Array:
    """The pseudo-inverse of stacks of positive semidefinite matrices."""
    return root_and_inverse(C)[1]
