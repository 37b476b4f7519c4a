"""Diagonal matrices, which most chains take into one of their factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm, LinearOperator
from structops.algebra.determinant import determinant_rule, of_eigenvalues
from structops.algebra.diagonal import diagonal_length, diagonal_rule
from structops.algebra.eigen import Spectrum, eigen_rule, function_rule
from structops.algebra.inverse import inverse_rule, pinv_rule, reciprocal
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import product_rule, transposed
from structops.algebra.scalar import Identity, scalar_of
from structops.algebra.sum import sum_rule
from structops.algebra.svd import SVD, svd_rule
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.operator import check_arrays, check_axes
from structops.operators.permutation import ascending, descending


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
        return transposed(chain_times_diagonal(A.T, D))  # type: ignore[arg-type]
    return _absorbed(A, D.diag, A.chain.terms[-1], len(A.arrays) - 1, A.chain.padded_out)


@product_rule.dispatch
def chain_times_diagonal(A: ChainOperator, D: _cola.Diagonal) -> LinearOperator | None:
    """The factor that is applied first takes the diagonal, if all input labels are its own."""
    if A.is_transposed:
        return transposed(diagonal_times_chain(D, A.T))  # type: ignore[arg-type]
    return _absorbed(A, D.diag, A.chain.terms[0], 0, A.chain.padded_in)


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


# -------------------------------------------------------------------------------------------------- linear algebra


@inverse_rule.dispatch(precedence=1)
def inverse_diagonal(A: Diagonal, alg: Algorithm) -> LinearOperator | None:
    """Reciprocals."""
    return Diagonal(1 / A.diag)


@pinv_rule.dispatch
def pinv_diagonal(A: Diagonal, alg: Algorithm) -> LinearOperator | None:
    """Reciprocals, and 0 of what is 0 beside the largest."""
    return Diagonal(reciprocal(A.diag))


@determinant_rule.dispatch(precedence=1)
def determinant_diagonal(A: Diagonal, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """The product of the entries."""
    return of_eigenvalues(A.diag)


@diagonal_rule.dispatch(precedence=1)
def diagonal_of_diagonal(A: Diagonal, k: int, alg: Algorithm) -> Any:
    """The entries, or zeros beside them."""
    return A.diag if k == 0 else _array.zeros((diagonal_length(A, k),), A.diag)


@eigen_rule.dispatch
def eigen_diagonal(A: Diagonal, alg: Algorithm) -> Spectrum | None:
    """The entries, and unit vectors."""
    return ascending(A.diag, Identity(A.shape[0], like=A.diag))


@function_rule.dispatch
def function_of_diagonal(f: Callable, A: Diagonal, alg: Algorithm) -> LinearOperator | None:
    """Entry by entry."""
    return Diagonal(f(A.diag))


@svd_rule.dispatch
def svd_diagonal(A: Diagonal) -> SVD | None:
    """The moduli; the phases go with the left vectors."""
    size, phase = _array.polar(A.diag)
    U = Diagonal(phase)
    U.annotations = U.annotations | {_cola.Unitary}
    return descending(U, size, Identity(A.shape[0], like=A.diag))


def through_spectrum(f: Callable, A: LinearOperator, spectrum: Spectrum) -> LinearOperator:
    """``V f(values) V^-1``, with ``V^H`` for the inverse where A is self-adjoint."""
    V = spectrum.vectors
    return V @ Diagonal(f(spectrum.values)) @ (V.H if A.isa(_cola.SelfAdjoint) else _cola.inv(V))
