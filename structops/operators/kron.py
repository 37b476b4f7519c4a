"""Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm
from structops.algebra.counting import factors, kronecker_factors, macs, positions
from structops.algebra.determinant import combined, determinant_rule, of_zero
from structops.algebra.diagonal import diagonal_rule, trace_rule
from structops.algebra.eigen import Spectrum, eigen, eigen_rule, function_rule, power_rule
from structops.algebra.inverse import inverse_rule, is_square, pinv_rule, singular
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import product_rule
from structops.algebra.scalar import scale_rule
from structops.algebra.svd import SVD, svd, svd_rule
from structops.chain import Chain
from structops.operator import StructuredOperator
from structops.operators.composite import CompositeOperator, as_part, fused, like_part, part_inverse, part_pinv
from structops.operators.dense import Dense
from structops.operators.diagonal import through_spectrum
from structops.operators.permutation import ascending, descending
from structops.operators.train import Modes, check_modes, check_pad, resolve_modes, train_chain
from structops.spec import Structure, check_count, check_sizes, register, warn_capped_rank


@cache
def kron_chain(out_modes: Modes, in_modes: Modes, in_features: int = 0, out_features: int = 0) -> Chain:
    """The chain of a tensor-train of rank 1, without the rank labels: ``cd, bd, ac -> ab``."""
    train = train_chain("tt", out_modes, in_modes, (1,) * (len(out_modes) - 1))
    inputs, outputs = train.terms[0], train.terms[-1]
    factors = [o + i for o, i in zip(reversed(outputs), reversed(inputs), strict=True)]
    return Chain(", ".join([inputs, *factors]) + " -> " + outputs, train.sizes, in_features, out_features)


class Kron(CompositeOperator, _cola.Kronecker):
    r"""The Kronecker product of any number of matrices or operators.

    **Definition.** \(A = M_1 \otimes \ldots \otimes M_c\): entry \((i_1 \ldots i_c), (j_1 \ldots j_c)\) is
    \(\prod_t M_t[i_t, j_t]\), in mixed radix with the first factor the most significant, as ``numpy.kron``.  Two
    factors are the chain ``cd, bd, ac -> ab``.

    Args:
        *Ms: Matrices (m_t, n_t), or operators, which keep their own structure.  The last is applied first.

    Raises:
        ShapeError: A factor is not a matrix, or there is none.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (prod n,) or (prod n, k); ``X @ A``: (..., prod m).

    **Cost.** Parameters: sum of m_t n_t.  MACs per vector: sum of (n_1...n_t)(m_t...m_c); each parameter is used many
    times per vector.

    **Numerics.** One matrix product a factor in the dtype of the inputs.

    **References.** Van Loan, "The ubiquitous Kronecker product" (2000); "Compute Better Spent" (arXiv 2406.06248),
    section 2.

    Example:
        >>> import torch
        >>> Kron(torch.ones(4, 2), torch.ones(4, 5))
        Kron(16x10; factors 4x2, 4x5; 28 params, 0.175 of dense; torch.float32)
    """

    def __init__(self, *Ms: Any) -> None:
        self._set(Ms)
        if all(isinstance(M, Dense) for M in self.Ms):
            out_modes, in_modes = zip(*(M.shape for M in self.Ms), strict=True)
            self._set_chain(kron_chain(out_modes, in_modes))

    @classmethod
    def from_factors(cls, chain: Chain, factors: Sequence[Array]) -> Self:
        """The operator from stored factors ``(1, m, n)`` in order of application, as views."""
        return cls(*(array.reshape(array.shape[-2:]) for array in reversed(factors)))

    @property
    def shape(self) -> tuple[int, int]:
        """``(prod m, prod n)``."""
        return math.prod([M.shape[0] for M in self.Ms]), math.prod([M.shape[1] for M in self.Ms])

    @property
    def applied(self) -> tuple[_cola.LinearOperator, ...]:
        """The factors in order of application: the last first, the first first in a transpose."""
        return self.Ms if self.is_transposed else self.Ms[::-1]

    def chain_arrays(self, matrices: list[Array]) -> list[Array]:
        """The factors in order of application."""
        return matrices if self.is_transposed else matrices[::-1]

    def _apply_parts(self, x: Array) -> Array:
        axes = list(range(1, len(self.Ms) + 1))
        state = x.reshape((-1, *(M.shape[1] for M in self.Ms)))
        for axis in axes if self.is_transposed else axes[::-1]:
            state = _apply_on_axis(self.Ms[axis - 1], state, axis)
        return state.reshape((*x.shape[:-1], self.shape[0]))

    def describe(self) -> str:
        """Every factor."""
        return "factors " + ", ".join(map(self.describe_part, self.Ms))


def _apply_on_axis(M: _cola.LinearOperator, state: Array, axis: int) -> Array:
    """``M`` applied to one axis of ``state``."""
    order = (axis, *(i for i in range(state.ndim) if i != axis))
    moved = _array.permute(state, order)
    result = M._matmat(moved.reshape((M.shape[1], -1))).reshape((M.shape[0], *moved.shape[1:]))
    return _array.permute(result, tuple(order.index(i) for i in range(state.ndim)))


@register
@dataclass(frozen=True)
class KronStructure(Structure):
    """``kron(num_factors, modes, pad)``.

    Args:
        num_factors: Number of factors.
        modes: ``"balanced"``, ``"greedy"`` or explicit ``((m...), (n...))``, output first.
        pad: Whether sizes without suitable modes are padded to the next that has them, as in `TrainStructure`.  The
            matrix is then the upper left part of a Kronecker product, which has neither its inverse nor its spectrum:
            the operator is a `TT` of rank 1.
    """

    name = "kron"
    num_factors: int = 2
    modes: str | tuple[Modes, Modes] = "balanced"
    pad: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "num_factors", self.num_factors)
        check_modes(self, self.modes, self.num_factors)
        check_pad(self, self.pad)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """One factor a mode, the least significant first."""
        check_sizes(self, in_features, out_features)
        modes = resolve_modes(self, self.modes, self.num_factors, in_features, out_features, self.pad)
        chain = kron_chain(*modes, in_features, out_features)
        warn_capped_rank(self, chain, "choose modes")
        return chain

    @staticmethod
    def build(chain: Chain, factors: Sequence[Array]) -> Any:
        """A `Kron`, or where the chain is padded a `TT`."""
        if chain.shape == (chain.padded_out, chain.padded_in):
            return Kron.from_factors(chain, factors)
        from structops.operators.tt import TT  # which needs Kron

        cores = [array.reshape((1, *array.shape[-2:], 1)) for array in reversed(factors)]
        return TT(cores, in_features=chain.in_features, out_features=chain.out_features)


@factors.dispatch(precedence=1)
def factors_kron(A: Kron) -> tuple:
    """Those of its chain; where factors are operators, theirs, shared over the positions of the other axes."""
    return A.chain.factors if A.is_chain else kronecker_factors(A.applied)


@macs.dispatch(precedence=1)
def macs_kron(A: Kron) -> int:
    """Each factor once per position of the other axes."""
    if A.is_chain:
        return A.chain.macs
    return sum(macs(M) * count for M, count in zip(A.applied, positions(A.applied), strict=True))


def kron(A: Any, B: Any) -> _cola.LinearOperator:
    """The Kronecker product of two operators or matrices, lazily: structures and matrices give a `Kron`.

    Raises:
        BackendError: numpy arrays, or a mixture of libraries.
    """
    return _cola.kron(*(M if isinstance(M, _cola.LinearOperator) else Dense(M) for M in (A, B)))


@_cola.kron.dispatch(precedence=3)
def kron_structures(A: StructuredOperator, B: StructuredOperator) -> _cola.LinearOperator:
    """A x (B x C) = (A x B) x C = A x B x C, where the two have no simpler product."""
    return _kron(A, B)


@_cola.kron.dispatch(precedence=2)
def kron_structure_left(A: StructuredOperator, B: _cola.LinearOperator) -> _cola.LinearOperator:
    """Any operator may be a factor."""
    return _kron(A, B)


@_cola.kron.dispatch(precedence=1)
def kron_structure_right(A: _cola.LinearOperator, B: StructuredOperator) -> _cola.LinearOperator:
    """Any operator may be a factor."""
    return _kron(A, B)


def _kron(A: Any, B: Any) -> _cola.LinearOperator:
    (A if isinstance(A, StructuredOperator) else B)._check_library(B if isinstance(A, StructuredOperator) else A)
    merged = kron_rule(A, B)
    return Kron(*_kron_factors(A), *_kron_factors(B)) if merged is None else merged


def _kron_factors(A: _cola.LinearOperator) -> tuple[_cola.LinearOperator, ...]:
    """The factors of a Kronecker product; a transpose stays whole, since it applies them in the other order."""
    return A.Ms if isinstance(A, _cola.Kronecker) and not getattr(A, "is_transposed", False) else (A,)


@product_rule.dispatch
def kron_times_kron(A: Kron, B: Kron) -> _cola.LinearOperator | None:
    """The mixed product: factor by factor, where the sizes between them agree."""
    if [M.shape[1] for M in A.Ms] != [M.shape[0] for M in B.Ms]:
        return None
    return Kron(*map(fused, A.Ms, B.Ms))


@scale_rule.dispatch
def scale_kron(A: Kron, c: object) -> _cola.LinearOperator | None:
    """The smallest factor that can takes the number."""
    for k in sorted(range(len(A.Ms)), key=lambda k: math.prod(A.Ms[k].shape)):
        part = scale_rule(A.Ms[k], c)
        if part is not None:
            return Kron(*A.Ms[:k], part, *A.Ms[k + 1 :])
    return None


# ---------------------------------------------------------------------------------------------------- linear algebra


@inverse_rule.dispatch
def inverse_kron(A: Kron, alg: Algorithm) -> _cola.LinearOperator | None:
    """Factor by factor; with factors that are not square the matrix is singular."""
    if not all(map(is_square, A.Ms)):
        raise singular(A, "its factors are not square")
    return Kron(*(part_inverse(M, alg) for M in A.Ms))


@pinv_rule.dispatch
def pinv_kron(A: Kron, alg: Algorithm) -> _cola.LinearOperator | None:
    """Factor by factor, of any shape."""
    return Kron(*(part_pinv(M, alg) for M in A.Ms))


@determinant_rule.dispatch
def determinant_kron(A: Kron, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """Each factor's as often as the others have rows; with factors that are not square it is zero."""
    if not all(map(is_square, A.Ms)):
        return of_zero(A)
    powers = [A.shape[0] // M.shape[0] for M in A.Ms]
    return combined([_cola.slogdet(M, log_alg, trace_alg) for M in A.Ms], powers)


@diagonal_rule.dispatch
def diagonal_of_kron(A: Kron, k: int, alg: Algorithm) -> Any:
    """All products of the diagonals' entries, where all factors are square."""
    if k != 0 or not all(map(is_square, A.Ms)):
        return None
    return outer([_cola.diag(M, 0, alg) for M in A.Ms])


@trace_rule.dispatch
def trace_of_kron(A: Kron, alg: Algorithm) -> Any:
    """The product of traces, where all factors are square."""
    return math.prod(_cola.trace(M, alg) for M in A.Ms) if all(map(is_square, A.Ms)) else None


@eigen_rule.dispatch
def eigen_kron(A: Kron, alg: Algorithm) -> Spectrum | None:
    """All products of eigenvalues; the vectors are Kronecker products."""
    if not all(map(is_square, A.Ms)):
        return None
    return ascending(*_unsorted_spectrum(A, alg))


def _unsorted_spectrum(A: Kron, alg: Algorithm) -> Spectrum:
    parts = [eigen(M, alg) for M in A.Ms]
    return Spectrum(outer([values for values, _ in parts]), Kron(*(as_part(V) for _, V in parts)))


def outer(vectors: Sequence[Array]) -> Array:
    """All products of one entry each, the first index the most significant."""
    dtype = _array.promote(*(v.dtype for v in vectors))
    first, *others = (_array.cast(v, dtype) for v in vectors)
    for v in others:
        first = (first[:, None] * v[None, :]).reshape((-1,))
    return first


@function_rule.dispatch
def function_of_kron(f: Callable, A: Kron, alg: Algorithm) -> _cola.LinearOperator | None:
    """Through the eigenvectors of the factors: a product of a Kronecker product, a diagonal, and another."""
    if not all(map(is_square, A.Ms)):
        return None
    return through_spectrum(f, A, _unsorted_spectrum(A, alg))


@power_rule.dispatch
def power_of_kron(A: Kron, alpha: float, alg: Algorithm) -> _cola.LinearOperator | None:
    """Factor by factor for a whole number or positive semidefinite factors; else the branch could be another."""
    if not all(map(is_square, A.Ms)) or not (alpha.is_integer() or all(M.isa(_cola.PSD) for M in A.Ms)):
        return None
    return Kron(*(like_part(M, _cola.pow(M, alpha, alg)) for M in A.Ms))


@svd_rule.dispatch
def svd_kron(A: Kron) -> SVD | None:
    """All products of singular values; the vectors are Kronecker products."""
    parts = [svd(M) for M in A.Ms]
    U, Vh = (Kron(*(as_part(part[side]) for part in parts)) for side in (0, 2))
    return descending(U, outer([part.S for part in parts]), Vh)
