"""Properties of CoLA (SelfAdjoint, PSD, Unitary, Stiefel) that follow from those of the parts, never from values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from structops import _array, _cola
from structops._cola import LinearOperator
from structops.operator import StructuredOperator

PROPERTIES = (_cola.SelfAdjoint, _cola.PSD, _cola.Stiefel, _cola.Unitary)


def common(operators: Iterable[LinearOperator], *families: type) -> set[type]:
    """The properties in the families (all by default) that every operator has; a PSD one is self-adjoint, too."""
    Ms = list(operators)
    found = {p for p in PROPERTIES if not families or issubclass(p, families)}
    return {p for p in found if all(M.isa(p) for M in Ms)}


def is_transpose_of(A: LinearOperator, B: LinearOperator) -> bool:
    """Whether A is ``B.T`` for a real B, seen from the arrays: they are the same objects in the same places.

    Complex adjoints hold other arrays, and are not recognised; ``cola.PSD`` declares such a product.
    """
    if type(A) is not type(B) or A.shape != B.shape[::-1] or not isinstance(A, StructuredOperator):
        return False
    return not _array.is_complex(A.dtype) and same(A.T, B)


def same(A: Any, B: Any) -> bool:
    """Whether two operators hold the very same arrays in the same places."""
    if A is B:
        return True
    if isinstance(A, tuple) and isinstance(B, tuple):
        return len(A) == len(B) and all(map(same, A, B))
    if type(A) is not type(B) or not isinstance(A, StructuredOperator):
        return False
    (mine, (values, _)), (theirs, (others, _)) = A.tree_flatten(), B.tree_flatten()
    return values == others and same(mine, theirs)
