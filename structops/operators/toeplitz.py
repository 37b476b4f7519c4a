"""Toeplitz matrices: constant along diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm, LinearOperator
from structops.algebra.counting import factors, macs
from structops.algebra.diagonal import diagonal_length, diagonal_rule
from structops.algebra.scalar import scalar_of, scale_rule
from structops.algebra.sum import sum_rule
from structops.chain import Factor
from structops.operator import StructuredOperator, check_arrays, check_axes
from structops.operators.circulant import Circulant, cyclic_convolve, fft_macs
from structops.spec import Plan, Structure, check_sizes, register


def fast_length(n: int) -> int:
    """The next number without prime factors above 5, for which FFTs are fast."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def toeplitz_product(first_column: Array, first_row: Array, x: Array) -> Array:
    """``y_i = sum_j T_ij x_j`` on the last axis: the matrix is a corner of a circulant of size out + in - 1 or more."""
    rows, cols = first_column.shape[0], first_row.shape[0]
    dtype = _array.promote(first_column.dtype, first_row.dtype)
    xp = _array.namespace(x)
    length = fast_length(rows + cols - 1)
    gap = _array.pad(first_column, [(0, length - rows - cols + 1)])
    column = xp.concat([_array.cast(gap, dtype), _array.cast(xp.flip(first_row[1:], axis=0), dtype)])
    return cyclic_convolve(column, _array.pad(x, [(0, length - cols)]))[..., :rows]


class Toeplitz(StructuredOperator):
    r"""A Toeplitz matrix, square or rectangular: a convolution with every offset.

    **Definition.** \(A_{ij} = c_{i-j}\) for \(i \ge j\) and \(r_{j-i}\) otherwise, as ``scipy.linalg.toeplitz``;
    ``first_row[0]`` is ignored.

    Args:
        first_column: \(c\), shape (out_features,).
        first_row: \(r\), shape (in_features,).

    Raises:
        ShapeError: One is not a vector.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out).

    **Cost.** out + in - 1 parameters.  MACs per vector, by our convention for FFTs: 2 L log2 L + 2 L with L the
    smallest length from out + in - 1 on without prime factors above 5.

    **Numerics.** FFT products: an error of some epsilon * log n relative to the norm of the result, not entrywise;
    16-bit inputs are transformed in float32.

    **References.** Gray, "Toeplitz and Circulant Matrices" (2006); SciPy's ``toeplitz`` for the arguments.

    Example:
        >>> import torch
        >>> Toeplitz(torch.tensor([0., 1., 2.]), torch.tensor([9., 5.])).to_dense().round().int().tolist()
        [[0, 5], [1, 0], [2, 1]]
    """

    leaves = ("column", "row")
    static = ("is_transposed",)
    column: Array
    row: Array
    is_transposed: bool  # column and row trade places, but for the head of the row, which is the column's

    def __init__(self, first_column: Array, first_row: Array) -> None:
        check_arrays("Toeplitz", [first_column, first_row])
        check_axes("Toeplitz: first_column", first_column, "(out_features)")
        check_axes("Toeplitz: first_row", first_row, "(in_features)")
        self.column, self.row, self.is_transposed = first_column, first_row, False

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        sizes = int(self.column.shape[0]), int(self.row.shape[0])
        return sizes[::-1] if self.is_transposed else sizes

    @property
    def first_column(self) -> Array:
        """The first column."""
        return _with_head(self.row, self.column) if self.is_transposed else self.column

    @property
    def first_row(self) -> Array:
        """The first row; its head may differ from the matrix, where that of the column counts."""
        return self.column if self.is_transposed else self.row

    def _matmat(self, X: Array) -> Array:
        return toeplitz_product(self.first_column, self.first_row, X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        flipped = self.transposed()
        return toeplitz_product(flipped.first_column, flipped.first_row, X)

    def transposed(self) -> Self:
        """Column and row trade places; the arrays stay."""
        return self.tree_unflatten(((not self.is_transposed,), frozenset()), (self.column, self.row))

    def parameter_counts(self) -> dict[int, int]:
        """``first_row[0]`` is no parameter."""
        return {id(self.row): int(self.row.shape[0]) - 1, id(self.column): int(self.column.shape[0])}


def _with_head(row: Array, column: Array) -> Array:
    dtype = _array.promote(row.dtype, column.dtype)
    return _array.namespace(row).concat([_array.cast(column[:1], dtype), _array.cast(row[1:], dtype)])


def toeplitz_factor(out_features: int, in_features: int) -> Factor:
    """One convolution with as many taps as inputs, one channel in and out, at every output."""
    return Factor("diagonals", (in_features + out_features - 1,), fan_in=in_features, fan_out=1, sharing=out_features)


@factors.dispatch
def factors_toeplitz(A: Toeplitz) -> tuple:
    """One factor."""
    return (toeplitz_factor(*A.shape),)


@macs.dispatch
def macs_toeplitz(A: Toeplitz) -> int:
    """By the convention for FFTs, at the length of the circulant around it."""
    return fft_macs(fast_length(sum(A.shape) - 1))


@dataclass(frozen=True)
class ToeplitzPlan(Plan):
    """One vector of diagonals, from the top right to the bottom left."""

    def product(self, factors: Sequence[Array], x: Array) -> Array:
        """By FFT."""
        return toeplitz_product(*self._column_and_row(factors), x)

    def operator(self, factors: Sequence[Array]) -> Toeplitz:
        """The operator of these diagonals."""
        return Toeplitz(*self._column_and_row(factors))

    def _column_and_row(self, factors: Sequence[Array]) -> tuple[Array, Array]:
        diagonals = factors[0].reshape((-1,))
        xp = _array.namespace(diagonals)
        return diagonals[self.in_features - 1 :], xp.flip(diagonals[: self.in_features], axis=0)


@register
@dataclass(frozen=True)
class ToeplitzStructure(Structure):
    """``toeplitz``: one vector of out + in - 1 diagonals, from the top right to the bottom left.

    Its factor has fan-in in_features, fan-out 1 and is shared over out_features positions; muP's rule for that shape is
    a heuristic that the paper does not test.
    """

    name = "toeplitz"

    def plan(self, in_features: int, out_features: int) -> Plan:
        """One vector of in_features + out_features - 1 parameters."""
        check_sizes(self, in_features, out_features)
        count = in_features + out_features - 1
        factor = toeplitz_factor(out_features, in_features)
        return ToeplitzPlan(in_features, out_features, (factor,), fft_macs(fast_length(count)), ((1, 1, count),))


@sum_rule.dispatch
def toeplitz_plus_toeplitz(A: Toeplitz, B: Toeplitz | Circulant) -> LinearOperator | None:
    """Diagonals add up; a circulant is Toeplitz."""
    row = B.first_row if isinstance(B, Toeplitz) else B.T.first_column  # type: ignore[attr-defined]
    return Toeplitz(A.first_column + B.first_column, A.first_row + row)


@scale_rule.dispatch
def scale_toeplitz(A: Toeplitz, c: object) -> LinearOperator | None:
    """Column and row take the number."""
    return A.with_leaves(A.column * c, A.row * c)


@sum_rule.dispatch
def toeplitz_plus_multiple(A: Toeplitz | Circulant, B: _cola.ScalarMul | _cola.Identity) -> LinearOperator | None:
    """A multiple of the identity is Toeplitz, and circulant."""
    column = A.first_column
    head = column[:1] + scalar_of(B)
    column = _array.namespace(column).concat([head, _array.cast(column[1:], head.dtype)])
    return Circulant(column) if isinstance(A, Circulant) else Toeplitz(column, A.first_row)


@diagonal_rule.dispatch
def diagonal_of_toeplitz(A: Toeplitz, k: int, alg: Algorithm) -> Any:
    """One number, repeated."""
    length = diagonal_length(A, k)
    if not length:
        return _array.zeros((0,), A.column, A.dtype)
    value = A.first_column[-k] if k <= 0 else A.first_row[k]
    return value * _array.ones((length,), A.column, A.dtype)
