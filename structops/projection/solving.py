"""Inverses of positive semidefinite matrices that may be singular, and the precision to compute them in."""

from __future__ import annotations

import sys

from structops import _array
from structops._array import Array, Dtype


def wide(like: Array) -> Dtype:
    """Double precision, real or complex as the array is, where the library and the device have it."""
    if _array.backend_of(like) == "torch":
        torch = sys.modules["torch"]
        has, names = like.device.type != "mps", torch
    else:
        jax = sys.modules["jax"]
        has, names = jax.config.jax_enable_x64, jax.numpy
    if not has:
        return like.dtype
    return names.complex128 if _array.is_complex(like.dtype) else names.float64


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
