"""One choice among the factors that give the same matrix: equal norms, and signs that depend on the values alone.

Two neighbouring factors can be scaled by inverse numbers, one for every value of the labels that they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from structops import _array
from structops._array import Array
from structops.projection.target import ordered

ROUNDS = 8  # of balancing; two factors need one, and every round brings the others nearer


def balanced(names: Sequence[str], factors: Sequence[Array]) -> list[Array]:
    """The same matrix with equal Frobenius norms on both sides of every bond, one index at a time.

    The entry of largest modulus among those of a factor at one index of the bond is positive, but for the last factor.
    """
    result = list(factors)
    for _ in range(ROUNDS if len(names) > 2 else 1):
        for k in range(len(names) - 1):
            _balance(names, result, k)
    return result


def _balance(names: Sequence[str], factors: list[Array], k: int) -> None:
    """Scale factors k and k + 1 inversely."""
    shared = "".join(label for label in names[k] if label in names[k + 1])
    first, last = (_rows(factors[i], names[i], shared) for i in (k, k + 1))
    xp = _array.namespace(first)
    norms = [xp.sqrt((xp.abs(rows) ** 2).sum(1)) for rows in (first, last)]
    one = xp.ones_like(norms[0])
    is_zero = (norms[0] == 0) | (norms[1] == 0)
    ratio = xp.sqrt(xp.where(is_zero, one, norms[1]) / xp.where(is_zero, one, norms[0]))
    largest = xp.take_along_axis(first, xp.argmax(xp.abs(first), axis=1)[:, None], axis=1)[:, 0]
    _, phase = _array.polar(largest)
    scales = ratio * _array.namespace(phase).conj(phase), phase / ratio
    for i, scale in zip((k, k + 1), scales, strict=True):
        factors[i] = factors[i] * _spread(scale, factors[i], names[i], shared)


def _rows(array: Array, name: str, shared: str) -> Array:
    """A factor as (values of the shared labels, all else)."""
    order = shared + "".join(label for label in name if label not in shared)
    moved = ordered(array, name, order)
    return moved.reshape((math.prod(moved.shape[: len(shared)]), -1))


def _spread(scale: Array, array: Array, name: str, shared: str) -> Array:
    """One number per value of the shared labels, along the axes of a factor."""
    sizes = [array.shape[name.index(label)] for label in shared]
    there = "".join(label for label in name if label in shared)
    moved = ordered(scale.reshape(tuple(sizes)), shared, there)
    return moved.reshape(tuple(n if label in shared else 1 for n, label in zip(array.shape, name, strict=True)))
