"""Dense: one block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from structops import _array, _cola
from structops._array import Array
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.operator import check_arrays, check_axes
from structops.spec import Structure, check_sizes, register


@cache
def dense_chain(out_features: int, in_features: int) -> Chain:
    """``y_i = sum_j A_ij x_j``."""
    return Chain("j, ij -> i", {"i": out_features, "j": in_features})


class Dense(ChainOperator, _cola.Dense):
    r"""A matrix of numbers without structure.

    **Definition.** \(y_i = \sum_j A_{ij} x_j\), the chain ``j, ij -> i``.

    Args:
        A: Shape (out_features, in_features).

    Raises:
        ShapeError: ``A`` is not a matrix.
        BackendError: ``A`` is no torch or JAX array.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out).

    **Cost.** in * out parameters and MACs per vector.

    **Numerics.** One matrix product in the dtype of its inputs.

    **References.** CoLA's ``Dense``, on a base that can be copied and compiled.

    Example:
        >>> import torch
        >>> Dense(torch.ones(2, 3))
        Dense(2x3; factors 2x3; 6 params, 1 of dense; torch.float32)
    """

    def __init__(self, A: Array) -> None:
        check_arrays("Dense", [A])
        check_axes("Dense: A", A, "(out_features, in_features)")
        self._set(dense_chain(*A.shape), [A])

    @property
    def A(self) -> Array:
        """The matrix; a view if this is a transpose."""
        return self.arrays[0].mT if self.is_transposed else self.arrays[0]

    def untransposed(self) -> Dense:
        """The transpose of a matrix is a matrix."""
        return Dense(self.A) if self.is_transposed else self

    def to_dense(self) -> Array:
        """The matrix itself; a copy if it is a transposed view."""
        return _array.contiguous(self.A)


@register
@dataclass(frozen=True)
class DenseStructure(Structure):
    """``dense``: the layer that all others are compared with."""

    name = "dense"

    def chain(self, in_features: int, out_features: int) -> Chain:
        """One factor of in * out parameters."""
        check_sizes(self, in_features, out_features)
        return dense_chain(out_features, in_features)

    build = staticmethod(Dense.from_factors)
