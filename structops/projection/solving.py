"""Inverses, Gram matrices and singular vectors, in double precision and in pieces of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from structops import _array
from structops._array import Array, Dtype

PIECE = 2**22  # numbers that are worked on at a time, 32 MiB in double precision


def pieces(shape: Sequence[int], leading: int, most: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Indices of the first axes that cut an array, in order, in parts of at most ``PIECE`` numbers where they can.

    Args:
        shape: Of the array.
        leading: How many axes may be cut.
        most: Another limit.
    """
    most, axis = most or PIECE, 0
    while axis < leading and math.prod(shape[axis:]) > most:
        axis += 1
    if axis == 0:
        yield ()
        return
    step = max(1, most // max(math.prod(shape[axis:]), 1))
    for outer in _indices(shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*outer, slice(start, min(start + step, shape[axis - 1])))


def _indices(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """All indices of an array, each as slices of length 1."""
    if not shape:
        yield ()
        return
    for k in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (slice(k, k + 1), *rest)


def runs(count: int, width: int) -> Iterator[slice]:
    """Slices of 0 ... count - 1 of as many items of ``width`` numbers as make a piece."""
    step = max(1, PIECE // max(width, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


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


def gram(matrix: Array) -> Array:
    """``M M^H`` of stacks (blocks, m, n) of matrices in double precision, in pieces along n."""
    wide, total = _array.wide(matrix), None
    for part in runs(int(matrix.shape[-1]), int(matrix.shape[0]) * int(matrix.shape[1])):
        columns = _array.cast(matrix[..., part], wide)
        product = columns @ _array.adjoint(columns)
        total = product if total is None else total + product
    return total


def leading_vectors(positive: Array, rank: int) -> Array:
    """Eigenvectors of the ``rank`` largest eigenvalues of stacks of positive semidefinite matrices, largest first."""
    xp = _array.namespace(positive)
    _, vectors = xp.linalg.eigh(positive)
    n = int(vectors.shape[-1])
    return xp.flip(vectors[..., max(n - rank, 0) :], axis=-1)


def has_double(like: Array) -> bool:
    """Whether squares of numbers like these keep all their digits in double precision."""
    return str(_array.wide(like)).endswith(("float64", "complex128"))


def working(W: Array) -> Dtype:
    """The dtype in which W is decomposed: its own from 32 bits on, else float32."""
    name = str(W.dtype).rpartition(".")[2]
    return W.dtype if name in ("float32", "float64", "complex64", "complex128") else _array.namespace(W).float32
