"""Multiples of the identity, and how structures take a number into their arrays."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array, Dtype
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.counting import factors
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError
from structops.operator import StructuredOperator, check_arrays


class ScalarOperator(StructuredOperator):
    """Base of the operators that hold one number, which also tells the library, the dtype and the device."""

    leaves = ("c",)
    static = ("_shape",)
    c: Array
    _shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self._shape

    def transposed(self) -> Self:
        """The same number, rows and columns exchanged."""
        return self.tree_unflatten(((self._shape[::-1],), frozenset()), (self.c,))

    def parameter_counts(self) -> dict[int, int]:
        """No parameters: the number is a constant."""
        return {}

    def _fill(self, c: Array, rows: int, cols: int) -> None:
        name = type(self).__name__
        check_arrays(name, [c])
        if c.ndim or min(rows, cols) < 1:
            raise ShapeError(
                f"{name} takes a number and sizes of at least 1, got shape {tuple(c.shape)} and {rows}x{cols}"
            )
        self.c, self._shape = c, (rows, cols)

    def _promoted(self, X: Array) -> Dtype:
        return _array.promote(self.dtype, X.dtype)


class ScalarMul(ScalarOperator, _cola.ScalarMul):
    r"""A number times the identity.

    **Definition.** \(A = c\,I_n\).

    Args:
        c: An array without axes.
        size: \(n\).

    Raises:
        ShapeError: ``c`` has axes, or the size is below 1.
        BackendError: ``c`` is no torch or JAX array.

    **Cost.** No parameters; n MACs per vector.
    """

    def __init__(self, c: Array, size: int) -> None:
        self._fill(c, size, size)

    def _matmat(self, X: Array) -> Array:
        return _array.cast(self.c, self._promoted(X)) * X

    def _rmatmat(self, X: Array) -> Array:
        return self._matmat(X)


class Identity(ScalarOperator, _cola.Identity):
    r"""The identity; products with it are the other side.

    **Definition.** \(A_{ij} = 1\) for \(i = j\), else 0.

    Args:
        size: Number of rows and of columns.
        like: An array of the library, the dtype and the device that the identity is for.

    Raises:
        ShapeError: The size is below 1.
        BackendError: ``like`` is no torch or JAX array.

    **Shapes.** ``A @ X``: (n,) or (n, k); ``X @ A``: (..., n).

    **Cost.** 0 parameters, 0 MACs.

    **Numerics.** Exact.

    **References.** CoLA's ``Identity``, on a base that can be copied and compiled.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> Identity(3, like=x) @ x
        tensor([1., 1., 1.])
    """

    def __init__(self, size: int, *, like: Array) -> None:
        check_arrays("Identity", [like])
        self._fill(_array.ones((), like), size, size)

    @property
    def inferred(self) -> set[type]:
        """Unitary and positive."""
        return {_cola.Unitary, _cola.PSD}

    def _matmat(self, X: Array) -> Array:
        return _array.cast(X, self._promoted(X))

    def _rmatmat(self, X: Array) -> Array:
        return self._matmat(X)


class Zero(ScalarOperator):
    r"""The zero matrix; sums with it are the other side, products with it are zero.

    **Definition.** \(A_{ij} = 0\).

    Args:
        rows: Number of rows.
        cols: Number of columns.
        like: An array of the library, the dtype and the device that the matrix is for.

    Raises:
        ShapeError: A size is below 1.
        BackendError: ``like`` is no torch or JAX array.

    **Shapes.** ``A @ X``: (cols,) or (cols, k); ``X @ A``: (..., rows).

    **Cost.** 0 parameters, 0 MACs.

    **Numerics.** Exact.

    **References.** The neutral element of the sum.

    Example:
        >>> import torch
        >>> Zero(2, 3, like=torch.ones(1)) @ torch.ones(3)
        tensor([0., 0.])
    """

    def __init__(self, rows: int, cols: int, *, like: Array) -> None:
        check_arrays("Zero", [like])
        self._fill(_array.zeros((), like), rows, cols)

    @property
    def inferred(self) -> set[type]:
        """A square zero is positive semidefinite."""
        return {_cola.PSD} if self.shape[0] == self.shape[1] else set()

    def _matmat(self, X: Array) -> Array:
        return _array.zeros((self.shape[0], X.shape[1]), X, self._promoted(X))

    def _rmatmat(self, X: Array) -> Array:
        return _array.zeros((*X.shape[:-1], self.shape[1]), X, self._promoted(X))


@factors.dispatch
def factors_zero(A: Zero) -> tuple:
    """None."""
    return ()


def scalar_of(A: LinearOperator) -> Any:
    """The number c of ``c * identity``, None for any other operator."""
    if isinstance(A, _cola.Identity):
        return 1
    return A.c if isinstance(A, _cola.ScalarMul) else None


def like(A: LinearOperator, dtype: Dtype = None) -> Array:
    """An array without axes on the device of A and in its dtype, or in that which is given."""
    arrays = A.arrays_flat() if isinstance(A, StructuredOperator) else []
    if arrays:
        return _array.zeros((), arrays[0], A.dtype if dtype is None else dtype)
    return A.xnp.array(0.0, dtype=A.dtype if dtype is None else dtype, device=A.device)


# ---------------------------------------------------------------------------------------------------------- c times A


@dispatch
def scale_rule(A: LinearOperator, c: object) -> LinearOperator | None:
    """``c * A`` in the structure of A, or None.  ``c`` is a Python number or an array without axes."""
    return None


def dtype_with(dtype: Dtype, c: Any) -> Dtype:
    """The dtype of c times numbers of a dtype."""
    if isinstance(c, Number):
        return _array.complex_of(dtype) if isinstance(c, complex) else dtype
    return _array.promote(dtype, c.dtype)


def kept_by_scaling(A: LinearOperator, c: Any) -> set[type]:
    """The properties of A that c * A has, too."""
    is_number = isinstance(c, Number)
    is_real = not isinstance(c, complex) if is_number else not _array.is_complex(c.dtype)
    kept = {p for p in A.annotations if issubclass(p, _cola.Stiefel) and is_number and abs(c) == 1}
    if is_real and A.isa(_cola.SelfAdjoint):
        kept.add(_cola.PSD if is_number and c >= 0 and A.isa(_cola.PSD) else _cola.SelfAdjoint)
    return kept


@scale_rule.dispatch
def scale_chain(A: ChainOperator, c: object) -> LinearOperator:
    """The smallest factor takes the number."""
    smallest = min(range(len(A.arrays)), key=lambda k: math.prod(A.arrays[k].shape))
    arrays = tuple(a * c if k == smallest else a for k, a in enumerate(A.arrays))
    return A.with_leaves(arrays)


@scale_rule.dispatch
def scale_scalar(A: _cola.ScalarMul | _cola.Identity, c: object) -> LinearOperator:
    """Numbers multiply."""
    mine: Any = like(A, dtype_with(A.dtype, c)) + scalar_of(A)
    return ScalarMul(mine * c, A.shape[0])


@scale_rule.dispatch
def scale_zero(A: Zero, c: object) -> LinearOperator:
    """Zero stays zero."""
    return A
