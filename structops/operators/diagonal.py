"""Diagonal matrices, which most chains take into one of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from structops import _array, _cola
from structops._array import Array
from structops._cola import LinearOperator
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import product_rule
from structops.algebra.scalar import scalar_of
from structops.algebra.sum import sum_rule
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.operator import check_arrays, check_axes
from structops.operators.block_diag import BlockDiag
from structops.operators.circulant import Circulant
from structops.operators.toeplitz import Toeplitz


@cache
def diagonal_chain(size: int) -> Chain:
    """``y_a = d_a x_a``: as many blocks of 1 x 1 as there are features."""
    return Chain("a, a -> a", {"a": size})


class Diagonal(ChainOperator, _cola.Diagonal):
    r"""A diagonal matrix.

    **Definition.** \(y_i = d_i x_i\), the chain ``a, a -> a``.

    Args:
        diag: \(d\), shape (n,).

    Raises:
        ShapeError: It is not a vector.
        BackendError: It is no torch or JAX array.

    **Shapes.** ``A @ X``: (n,) or (n, k); ``X @ A``: (..., n).

    **Cost.** n parameters and MACs per vector.

    **Numerics.** One product an entry in the dtype of the inputs.

    **References.** CoLA's ``Diagonal``, on a base that can be copied and compiled.

    Example:
        >>> import torch
        >>> Diagonal(torch.tensor([2., 3.])) @ torch.ones(2)
        tensor([2., 3.])
    """

    def __init__(self, diag: Array) -> None:
        check_arrays("Diagonal", [diag])
        check_axes("Diagonal: diag", diag, "(n)")
        self._set(diagonal_chain(int(diag.shape[0])), [diag])

    @property
    def diag(self) -> Array:
        """The diagonal."""
        return self.arrays[0]

    @property
    def inferred(self) -> set[type]:
        """A real diagonal is self-adjoint."""
        return set() if _array.is_complex(self.dtype) else {_cola.SelfAdjoint}

    def _matmat(self, X: Array) -> Array:
        return self._rmatmat(X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        dtype = _array.promote(self.dtype, X.dtype)
        return _array.cast(X, dtype) * _array.cast(self.diag, dtype)


@product_rule.dispatch(precedence=1)
def diagonal_times_diagonal(A: _cola.Diagonal, B: _cola.Diagonal) -> LinearOperator | None:
    """Entries multiply."""
    return Diagonal(A.diag * B.diag)


@sum_rule.dispatch(precedence=1)
def diagonal_plus_diagonal(A: _cola.Diagonal, B: _cola.Diagonal) -> LinearOperator | None:
    """Entries add up."""
    return Diagonal(A.diag + B.diag)


@sum_rule.dispatch
def diagonal_plus_multiple(A: _cola.Diagonal, B: _cola.ScalarMul | _cola.Identity) -> LinearOperator | None:
    """The number is added to every entry."""
    return Diagonal(A.diag + scalar_of(B))


@kron_rule.dispatch
def kron_diagonals(A: _cola.Diagonal, B: _cola.Diagonal) -> LinearOperator | None:
    """All products of entries."""
    return Diagonal((A.diag[:, None] * B.diag[None, :]).reshape((-1,)))


@product_rule.dispatch
def diagonal_times_chain(D: _cola.Diagonal, A: ChainOperator) -> LinearOperator | None:
    """The factor that is applied last takes the diagonal, if all output labels are its own."""
    if A.is_transposed:
        return _transposed(chain_times_diagonal(A.T, D))  # type: ignore[arg-type]
    return _absorbed(A, D.diag, A.chain.terms[-1], len(A.arrays) - 1, A.chain.padded_out)


@product_rule.dispatch
def chain_times_diagonal(A: ChainOperator, D: _cola.Diagonal) -> LinearOperator | None:
    """The factor that is applied first takes the diagonal, if all input labels are its own."""
    if A.is_transposed:
        return _transposed(diagonal_times_chain(D, A.T))  # type: ignore[arg-type]
    return _absorbed(A, D.diag, A.chain.terms[0], 0, A.chain.padded_in)


def _transposed(A: LinearOperator | None) -> LinearOperator | None:
    return None if A is None else A.T


def _absorbed(A: ChainOperator, diag: Array, outer: str, position: int, padded: int) -> LinearOperator | None:
    """The chain with one factor multiplied, entry by entry, by a diagonal with the labels ``outer``."""
    name = A.chain.factor_steps[position].labels
    if not set(outer) <= set(name) or any(step not in A.chain.factor_steps for step in _beside(A.chain, position)):
        return None
    diag = _array.pad(diag, [(0, padded - int(diag.shape[0]))]).reshape(A.chain.shape_of(outer))
    ordered = [label for label in name if label in outer]
    diag = _array.permute(diag, tuple(outer.index(label) for label in ordered))
    diag = diag.reshape(tuple(A.chain.size(label) if label in outer else 1 for label in name))
    arrays = list(A.label_arrays)
    arrays[position] = arrays[position] * diag
    return type(A).from_arrays(A.chain, arrays)


def _beside(chain: Chain, position: int) -> Sequence[Any]:
    """The steps between the factor and its end of the chain; a regroup there changes what the labels mean."""
    return chain.steps[:1] if position == 0 else chain.steps[-1:]


@product_rule.dispatch
def diagonal_times_blocks(D: _cola.Diagonal, A: BlockDiag) -> LinearOperator | None:
    """Every block takes its part of the diagonal; blocks that repeat would no longer be equal."""
    if set(A.multiplicities) != {1}:
        return None
    parts = _cut(D.diag, [M.shape[0] for M in A.Ms])
    return BlockDiag(*(Diagonal(part) @ M for part, M in zip(parts, A.Ms, strict=True)))


@product_rule.dispatch
def blocks_times_diagonal(A: BlockDiag, D: _cola.Diagonal) -> LinearOperator | None:
    """Every block takes its part of the diagonal; blocks that repeat would no longer be equal."""
    if set(A.multiplicities) != {1}:
        return None
    parts = _cut(D.diag, [M.shape[1] for M in A.Ms])
    return BlockDiag(*(M @ Diagonal(part) for part, M in zip(parts, A.Ms, strict=True)))


def _cut(diag: Array, sizes: Sequence[int]) -> list[Array]:
    parts, start = [], 0
    for size in sizes:
        parts.append(diag[start : start + size])
        start += size
    return parts


@sum_rule.dispatch
def toeplitz_plus_multiple(A: Toeplitz | Circulant, B: _cola.ScalarMul | _cola.Identity) -> LinearOperator | None:
    """A multiple of the identity is Toeplitz, and circulant."""
    c = scalar_of(B)
    column = A.first_column
    head = column[:1] + c
    column = _array.namespace(column).concat([head, _array.cast(column[1:], head.dtype)])
    return Circulant(column) if isinstance(A, Circulant) else Toeplitz(column, A.first_row)
