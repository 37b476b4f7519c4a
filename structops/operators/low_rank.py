"""Low rank: two thin matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm, LinearOperator
from structops.algebra.determinant import combined, determinant_rule
from structops.algebra.inverse import inverse_rule, pinv_rule, reciprocal
from structops.algebra.product import product_rule
from structops.algebra.rounding import HasRank
from structops.algebra.sum import Sum
from structops.algebra.svd import SVD, svd_rule
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError
from structops.operator import StructuredOperator, check_arrays, check_axes, promoted_parts
from structops.operators.dense import Dense
from structops.spec import (
    Structure,
    check_budget,
    check_count,
    check_sizes,
    largest_within,
    register,
    warn_wasteful_rank,
)


@cache
def low_rank_chain(out_features: int, rank: int, in_features: int) -> Chain:
    """``y_i = sum_s left_is sum_j right_sj x_j``."""
    return Chain("j, sj, is -> i", {"i": out_features, "j": in_features, "s": rank})


class LowRank(HasRank, ChainOperator):
    r"""The product of a tall and a wide matrix.

    **Definition.** \(A = \mathrm{left}\,\mathrm{right}\), \(y_i = \sum_s L_{is} \sum_j R_{sj} x_j\); the chain
    ``j, sj, is -> i``.

    Args:
        left: Shape (out_features, rank).
        right: Shape (rank, in_features); applied first.

    Raises:
        ShapeError: One is not a matrix, or their ranks differ.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out).

    **Cost.** rank * (in + out) parameters and MACs per vector.

    **Numerics.** Two matrix products in the dtype of the inputs.

    **References.** "Compute Better Spent" (arXiv 2406.06248), section 2.

    Example:
        >>> import torch
        >>> LowRank(torch.ones(8, 2), torch.ones(2, 6))
        LowRank(8x6; factors 2x6, 8x2; 28 params, 0.583 of dense; torch.float32)
    """

    def __init__(self, left: Array, right: Array) -> None:
        check_arrays("LowRank", [left, right])
        check_axes("LowRank: left", left, "(out_features, rank)")
        check_axes("LowRank: right", right, "(rank, in_features)")
        if left.shape[1] != right.shape[0]:
            raise ShapeError(
                f"LowRank: left (out, rank) and right (rank, in) must agree on the rank, "
                f"got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        self._set(low_rank_chain(left.shape[0], left.shape[1], right.shape[1]), [right, left])

    @property
    def left(self) -> Array:
        """The factor applied last, (out_features, rank)."""
        return self.arrays[1].mT if self.is_transposed else self.arrays[1]

    @property
    def right(self) -> Array:
        """The factor applied first, (rank, in_features)."""
        return self.arrays[0].mT if self.is_transposed else self.arrays[0]

    def untransposed(self) -> LowRank:
        """The transpose of a low-rank matrix has the textbook axes, too."""
        return LowRank(self.left, self.right) if self.is_transposed else self

    @property
    def rank(self) -> int:
        """The inner size; the matrix rank is at most this."""
        return int(self.right.shape[0])


@register
@dataclass(frozen=True)
class LowRankStructure(Structure):
    """``low_rank(rank)``: by default the authors' rank for MLPs, the root of the smaller side, rounded up.

    Args:
        rank: Inner size.
        params: In place of the rank, the largest that keeps within this share of the dense parameters.
    """

    name = "low_rank"
    rank: int | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "rank", self.rank)
        check_budget(self, self.params, "rank", self.rank)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """Two factors of rank * in and out * rank parameters."""
        check_sizes(self, in_features, out_features)
        if self.params is not None:
            dense = in_features * out_features

            def cost(rank: int) -> int:
                return low_rank_chain(out_features, rank, in_features).num_params

            rank = largest_within(self, self.params, dense, cost, "rank")
        else:
            rank = self.rank or math.isqrt(min(in_features, out_features) - 1) + 1
        warn_wasteful_rank(self, "rank", rank, min(in_features, out_features))
        return low_rank_chain(out_features, rank, in_features)

    build = staticmethod(LowRank.from_factors)


@product_rule.dispatch(precedence=2)
def low_rank_times_any(A: LowRank, B: LinearOperator) -> LinearOperator | None:
    """B is applied to the rows on the right."""
    A, B = promoted_parts((A, B), every=True)
    return LowRank(A.left, A.right @ B)


@product_rule.dispatch(precedence=3)
def any_times_low_rank(A: LinearOperator, B: LowRank) -> LinearOperator | None:
    """A is applied to the columns on the left."""
    A, B = promoted_parts((A, B), every=True)
    return LowRank(A @ B.left, B.right)


@product_rule.dispatch(precedence=4)
def low_rank_times_low_rank(A: LowRank, B: LowRank) -> LinearOperator | None:
    """The smaller of the two ranks."""
    A, B = promoted_parts((A, B), every=True)
    between = A.right @ B.left
    return LowRank(A.left, between @ B.right) if A.rank <= B.rank else LowRank(A.left @ between, B.right)


# ---------------------------------------------------------------------------------------------------- low-rank updates


def low_rank_update(A: Sum, alg: Algorithm) -> tuple[LinearOperator, LinearOperator, LowRank] | None:
    """For ``X + L`` with L of low rank and an X that has a direct inverse: X, its inverse, and L; else None."""
    if len(A.Ms) != 2:
        return None
    for X, L in (A.Ms, A.Ms[::-1]):
        if isinstance(L, LowRank) and not isinstance(X, LowRank) and isinstance(X, StructuredOperator):
            inverse = X.H if X.isa(_cola.Unitary) else inverse_rule(X, alg)
            if inverse is not None:
                return X, inverse, L
    return None


def capacitance(inverse: LinearOperator, L: LowRank) -> tuple[Array, Array, Array]:
    """``I + V X^-1 U``, ``X^-1 U`` and ``V X^-1`` for ``L = U V``."""
    left, right = inverse @ L.left, L.right @ inverse
    return _array.eye(L.rank, left) + L.right @ left, left, right


@inverse_rule.dispatch
def inverse_of_update(A: Sum, alg: Algorithm) -> LinearOperator | None:
    """Woodbury: of ``X + U V`` it is ``X^-1 - X^-1 U (I + V X^-1 U)^-1 V X^-1``, again X's kind plus low rank."""
    update = low_rank_update(A, alg)
    if update is None:
        return None
    _, inverse, L = update
    small, left, right = capacitance(inverse, L)
    return inverse + LowRank(left, _array.namespace(small).linalg.solve(small, -right))


@determinant_rule.dispatch
def determinant_of_update(A: Sum, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """The determinant lemma: of ``X + U V`` it is ``det(X) det(I + V X^-1 U)``."""
    update = low_rank_update(A, _cola.Auto())
    if update is None:
        return None
    X, inverse, L = update
    small, *_ = capacitance(inverse, L)
    sign, log = _array.namespace(small).linalg.slogdet(small)
    return combined([_cola.slogdet(X, log_alg, trace_alg), (sign, log)], [1, 1])


@pinv_rule.dispatch
def pinv_low_rank(A: LowRank, alg: Algorithm) -> LinearOperator | None:
    """By its singular values: low rank again."""
    U, S, Vh = svd_rule(A)
    values = reciprocal(S, float(_array.namespace(S).finfo(S.dtype).eps) * max(A.shape))
    return LowRank(_array.adjoint(Vh.A) * values, _array.adjoint(U.A))


@svd_rule.dispatch
def svd_low_rank(A: LowRank) -> SVD | None:
    """QR of both factors, and the singular value decomposition of what is between: O((in + out) rank^2)."""
    xp = _array.namespace(A.left)
    Q, R = xp.linalg.qr(A.left)
    P, T = xp.linalg.qr(_array.adjoint(A.right))
    U, S, Vh = xp.linalg.svd(R @ _array.adjoint(T), full_matrices=False)
    return SVD(Dense(Q @ U), S, Dense(Vh @ _array.adjoint(P)))
