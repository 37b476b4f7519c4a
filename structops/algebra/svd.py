"""Singular values: ``so.svd``, from the structure where there is a rule, else dense, with a warning."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from structops import _array, _cola
from structops._array import Array
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.scalar import Identity, Zero, like
from structops.errors import DensifyWarning
from structops.operator import check_precision


class SVD(NamedTuple):
    """``A = U diag(S) Vh``, unpacked as ``U, S, Vh``.

    Attributes:
        U: Left singular vectors, an operator (out, k) with orthonormal columns.
        S: Singular values, an array (k,), descending.
        Vh: Right singular vectors, an operator (k, in) with orthonormal rows.
    """

    U: LinearOperator
    S: Array
    Vh: LinearOperator


@dispatch
def svd_rule(A: LinearOperator) -> SVD | None:
    """The decomposition from the structure, values descending, or None."""
    return None


def svd(A: LinearOperator) -> SVD:
    r"""The reduced singular value decomposition of an operator.

    **Definition.** \(A = U\,\mathrm{diag}(S)\,V^H\) with \(U^H U = V^H V = I\), the values descending.

    Args:
        A: An operator of any shape.

    Returns:
        ``U, S, Vh`` with k singular values: min(out, in), or the rank of a `LowRank`, since the others are 0.

    Raises:
        BackendError: A has 16 bits.

    Warns:
        DensifyWarning: A has no rule, and its matrix of out * in numbers was built.

    **Cost.** LowRank: (in + out) rank^2.  Kron: that of its factors, and n log n to sort; the vectors stay Kronecker
    products.  BlockDiag: that of its blocks.  Circulant: n log n.  Diagonal, Permutation, Identity: a sort at most.
    Dense and all others: out * in * min(out, in).

    **Numerics.** The library's dense decomposition of the parts.  Gradients with respect to vectors exist where values
    are distinct.

    **References.** Golub and Van Loan, "Matrix Computations", section 2.4; CoLA's wheel has no such verb.

    Example:
        >>> import torch
        >>> import structops as so
        >>> U, S, Vh = svd(so.LowRank(torch.eye(4, 2), 3 * torch.eye(2, 5)))
        >>> S
        tensor([3., 3.])
    """
    check_precision("a singular value decomposition", A.dtype)
    result = svd_rule(A)
    if result is None:
        rows, cols = A.shape
        if not isinstance(A, _cola.Dense):
            warnings.warn(
                f"svd of {A!r} builds its matrix of {rows} x {cols} numbers: the structure has no rule",
                DensifyWarning,
                stacklevel=2,
            )
        result = dense_svd(A.to_dense())
    return result


def dense_svd(matrix: Array) -> SVD:
    """The decomposition of an array."""
    U, S, Vh = _array.namespace(matrix).linalg.svd(matrix, full_matrices=False)
    return SVD(_declared(_cola.lazify(U), _cola.Stiefel), S, _cola.lazify(Vh))


def _declared(A: LinearOperator, *properties: type) -> LinearOperator:
    A.annotations = A.annotations | set(properties)
    return A


@svd_rule.dispatch
def svd_scalar(A: _cola.ScalarMul) -> SVD | None:
    """``c = (c / |c|) |c|``."""
    size, phase = _array.polar(A.c)
    identity = Identity(A.shape[0], like=A.c)
    return SVD(identity * phase, size * _array.ones((A.shape[0],), size), identity)


@svd_rule.dispatch
def svd_unitary(A: Identity) -> SVD | None:
    """All values are 1."""
    return SVD(A, _array.ones((A.shape[0],), like(A)), A)


@svd_rule.dispatch
def svd_zero(A: Zero) -> SVD | None:
    """Any vectors will do; the first unit vectors."""
    rows, cols = A.shape
    k, zero = min(rows, cols), like(A)
    U, Vh = _array.eye(rows, zero)[:, :k], _array.eye(cols, zero)[:k]
    return SVD(_cola.lazify(U), _array.zeros((k,), zero), _cola.lazify(Vh))
