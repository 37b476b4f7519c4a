"""Permutation matrices."""

from __future__ import annotations

import sys
from typing import Any, Self

import numpy as np

from structops import _array, _cola
from structops._array import Array, Dtype
from structops._cola import Algorithm, LinearOperator
from structops.algebra.determinant import determinant_rule
from structops.algebra.diagonal import diagonal_length, diagonal_rule
from structops.algebra.eigen import Spectrum
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import product_rule, transposed
from structops.algebra.scalar import Identity
from structops.algebra.svd import SVD, svd_rule
from structops.chain_operator import ChainOperator
from structops.errors import BackendError, ShapeError
from structops.operator import StructuredOperator, check_arrays, check_axes
from structops.pattern import Step


class Permutation(StructuredOperator, _cola.Permutation):
    r"""A permutation of the features.

    **Definition.** \(y_i = x_{\mathrm{perm}[i]}\): a gather, so the matrix has ones at (i, perm[i]).

    Args:
        perm: Integers, shape (n,), each of 0 ... n - 1 once (checked where the values can be read).
        dtype: Dtype of the matrix; the library's default floating dtype if not given.

    Raises:
        ShapeError: It is not a vector, or not a permutation.
        BackendError: It is no torch or JAX array, or not of integers.

    **Shapes.** ``A @ X``: (n,) or (n, k); ``X @ A``: (..., n).

    **Cost.** 0 parameters, 0 MACs; moves n numbers per vector.

    **Numerics.** Exact.

    **References.** CoLA's ``Permutation``, on a base that can be copied and compiled.

    Example:
        >>> import torch
        >>> Permutation(torch.tensor([2, 0, 1])) @ torch.tensor([10., 20., 30.])
        tensor([30., 10., 20.])
    """

    leaves = ("perm",)
    static = ("_dtype",)
    perm: Array
    _dtype: Dtype

    def __init__(self, perm: Array, dtype: Dtype = None) -> None:
        check_arrays("Permutation", [perm])
        check_axes("Permutation: perm", perm, "(n)")
        if _array.is_floating(perm.dtype) or "bool" in str(perm.dtype):
            raise BackendError(f"Permutation: perm must hold integers, got {perm.dtype}")
        if _array.is_concrete(perm) and not _is_permutation(perm):
            raise ShapeError(f"Permutation: perm must hold each of 0 ... {perm.shape[0] - 1} once")
        self.perm, self._dtype = perm, _default_float(perm) if dtype is None else dtype

    @classmethod
    def unchecked(cls, perm: Array, dtype: Dtype) -> Self:
        """The operator of indices that are known to be a permutation, such as the result of a rule."""
        return cls.tree_unflatten(((dtype,), frozenset()), (perm,))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (int(self.perm.shape[0]),) * 2

    @property
    def inferred(self) -> set[type]:
        """Unitary."""
        return {_cola.Unitary}

    @property
    def dtype(self) -> Dtype:
        """The dtype that was declared; products promote with it."""
        return self._dtype

    def _matmat(self, X: Array) -> Array:
        return _array.cast(X[self.perm], _array.promote(self.dtype, X.dtype))

    def _rmatmat(self, X: Array) -> Array:
        return _array.cast(X[..., self.inverse_perm], _array.promote(self.dtype, X.dtype))

    @property
    def inverse_perm(self) -> Array:
        """Where every feature goes: the permutation of the transpose."""
        return _array.namespace(self.perm).argsort(self.perm)

    def transposed(self) -> Self:
        """The inverse permutation."""
        return self.tree_unflatten(((self._dtype,), frozenset()), (self.inverse_perm,))

    def conj(self) -> Self:
        """Itself: the entries are 0 and 1."""
        return self

    def _converted(self, device: Any, dtype: Dtype) -> Self:
        result = super()._converted(device, dtype)  # the indices keep their dtype
        result._dtype = self._dtype if dtype is None else dtype
        return result

    def parameter_counts(self) -> dict[int, int]:
        """No parameters."""
        return {}


def _is_permutation(perm: Array) -> bool:
    # By numpy: under jit, JAX would trace what it computes from constants, too.
    values = np.asarray(perm.cpu() if _array.backend_of(perm) == "torch" else perm)
    return np.array_equal(np.sort(values), np.arange(len(values)))


def _default_float(perm: Array) -> Dtype:
    if _array.backend_of(perm) == "torch":
        return sys.modules["torch"].get_default_dtype()
    return _array.namespace(perm).zeros(0).dtype


@product_rule.dispatch
def permutation_times_permutation(A: Permutation, B: Permutation) -> LinearOperator | None:
    """``y = (x[B])[A] = x[B[A]]``."""
    return Permutation.unchecked(B.perm[A.perm], _array.promote(A.dtype, B.dtype))


@kron_rule.dispatch
def kron_permutations(A: Permutation, B: Permutation) -> LinearOperator | None:
    """Digits permute one by one."""
    perm = A.perm[:, None] * B.perm.shape[0] + B.perm[None, :]
    return Permutation.unchecked(perm.reshape((-1,)), _array.promote(A.dtype, B.dtype))


@product_rule.dispatch
def permutation_times_chain(P: Permutation, A: ChainOperator) -> LinearOperator | None:
    """The factor that is applied last takes the permutation, if it emits all output labels."""
    if A.is_transposed:
        return transposed(chain_times_permutation(A.T, P.T))
    return _reordered(A, P.perm, at_output=True)


@product_rule.dispatch
def chain_times_permutation(A: ChainOperator, P: Permutation) -> LinearOperator | None:
    """The factor that is applied first takes the permutation, if it contracts all input labels."""
    if A.is_transposed:
        return transposed(permutation_times_chain(P.T, A.T))
    return _reordered(A, P.inverse_perm, at_output=False)


def _reordered(A: ChainOperator, perm: Array, *, at_output: bool) -> LinearOperator | None:
    """The chain with the entries of its last or first factor along the output or input labels in another order."""
    outer, position = (A.chain.terms[-1], len(A.arrays) - 1) if at_output else (A.chain.terms[0], 0)
    step = A.chain.steps[-1 if at_output else 0]
    if not isinstance(step, Step) or set(step.emitted if at_output else step.contracted) != set(outer):
        return None
    if A.shape != (A.chain.padded_out, A.chain.padded_in):
        return None  # the padding would have to stay at the end
    rest = "".join(label for label in step.labels if label not in outer)
    order = tuple(step.labels.index(label) for label in outer + rest)
    array = A.label_arrays[position]
    moved = _array.permute(array, order)
    mixed = moved.reshape((A.chain.size(outer), -1))[perm].reshape(moved.shape)
    arrays = list(A.label_arrays)
    arrays[position] = _array.permute(mixed, tuple(order.index(axis) for axis in range(array.ndim)))
    return type(A).from_arrays(A.chain, arrays)


# ---------------------------------------------------------------------------------------------------- linear algebra


@determinant_rule.dispatch
def determinant_permutation(A: Permutation, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """1 for an even permutation and -1 for an odd one."""
    one = _array.ones((), A.perm, A.dtype)
    return one * (1 - 2 * _array.parity(A.perm)), _array.zeros((), A.perm, _array.real_of(A.dtype))


@diagonal_rule.dispatch
def diagonal_of_permutation(A: Permutation, k: int, alg: Algorithm) -> Any:
    """Ones where a feature stays in its place, or moves by k."""
    start = max(-k, 0)
    part = slice(start, start + diagonal_length(A, k))
    return _array.cast(A.perm[part] == _array.counted(A.perm)[part] + k, A.dtype)


@svd_rule.dispatch
def svd_permutation(A: Permutation) -> SVD | None:
    """All values are 1."""
    ones = _array.ones((A.shape[0],), A.perm, _array.real_of(A.dtype))
    return SVD(A, ones, Identity(A.shape[0], like=_array.ones((), A.perm, A.dtype)))


def ascending(values: Array, vectors: LinearOperator) -> Spectrum:
    """Eigenvalues by modulus, the smallest first, and the vectors in that order."""
    xp = _array.namespace(values)
    order = xp.argsort(xp.abs(values))
    return Spectrum(values[order], vectors @ Permutation.unchecked(order, vectors.dtype).T)


def descending(U: LinearOperator, S: Array, Vh: LinearOperator) -> SVD:
    """Singular values, the largest first, and the vectors in that order."""
    xp = _array.namespace(S)
    P = Permutation.unchecked(xp.flip(xp.argsort(S), axis=0), S.dtype)
    return SVD(U @ P.T, S[P.perm], P @ Vh)
