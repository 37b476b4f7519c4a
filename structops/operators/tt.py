"""Tensor-train: a chain of small cores that every block shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from structops import _array
from structops._array import Array
from structops._cola import LinearOperator
from structops.algebra.bonds import sum_chains
from structops.algebra.kronecker import kron_rule
from structops.algebra.product import product_rule
from structops.algebra.sum import sum_rule
from structops.operators.kron import Kron
from structops.operators.train import TrainOperator, TrainStructure
from structops.spec import register


class TT(TrainOperator):
    r"""A tensor-train matrix (also called matrix product operator).

    **Definition.** With rows and columns in mixed radix, \(i = (i_1 \ldots i_c)\) and \(j = (j_1 \ldots j_c)\),

    \[ A[(i_1 \ldots i_c), (j_1 \ldots j_c)] = \sum_{s_1 \ldots s_{c-1}} \prod_t G_t[s_{t-1}, i_t, j_t, s_t]. \]

    Two cores are the chain ``cd, sbd, acs -> ab``, a sum of ``rank`` Kronecker products.

    Args:
        cores: ``cores[t]`` has shape (r_{t-1}, m_t, n_t, r_t) with output modes m, input modes n and r_0 = r_c = 1.
            The first is the most significant; the last is applied first.
        in_features: True input size where the modes pad it.
        out_features: True output size where the modes pad it.

    Raises:
        ShapeError: A core has not four axes, the ranks do not chain, or an outer rank is not 1; or a true size exceeds
            the padded one.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out), where in = prod n and out = prod m unless padded.

    **Cost.** Parameters: sum of r_{t-1} m_t n_t r_t.  MACs per vector: sum of r_{t-1} r_t (n_1...n_t)(m_t...m_c); each
    parameter is used many times per vector.

    **Numerics.** One matrix product a core in the dtype of the inputs.

    **References.** Oseledets, "Tensor-Train Decomposition" (2011); "Compute Better Spent" (arXiv 2406.06248), section
    2.

    Example:
        >>> import torch
        >>> TT([torch.ones(1, 4, 2, 3), torch.ones(3, 4, 5, 1)])
        TT(16x10; modes 4x4 by 2x5, rank 3; 84 params, 0.525 of dense; torch.float32)
    """

    kind = "tt"
    axes = "(r_{t-1}, m_t, n_t, r_t)"

    @property
    def cores(self) -> tuple[Array, ...]:
        """The cores in textbook order; those of a transpose have m and n swapped."""
        return tuple(core.swapaxes(1, 2) for core in self.textbook) if self.is_transposed else self.textbook

    def untransposed(self) -> TT:
        """The transpose of a tensor-train has the textbook axes, too."""
        rows, cols = self.shape
        return TT(self.cores, in_features=cols, out_features=rows) if self.is_transposed else self


@register
@dataclass(frozen=True)
class TTStructure(TrainStructure):
    """``tt(rank, num_cores, modes, params, pad)``; see `TrainStructure`."""

    name = "tt"
    build = staticmethod(TT.from_factors)


def cores_of(A: TT | Kron) -> tuple[Array, ...]:
    """The cores of a tensor-train; matrices of a Kronecker product are cores of rank 1."""
    return A.cores if isinstance(A, TT) else tuple(M.A[None, :, :, None] for M in A.Ms)


def is_train(A: TT | Kron) -> bool:
    """Whether a Kronecker product is one of matrices."""
    return isinstance(A, TT) or A.is_chain


@product_rule.dispatch
def train_times_train(A: TT, B: TT | Kron) -> LinearOperator | None:
    """Where the modes between them agree and pad nothing, cores multiply and so do ranks."""
    if not is_train(B):
        return None
    left, right = cores_of(A), cores_of(B)
    between = [core.shape[2] for core in left]
    if between != [core.shape[1] for core in right] or math.prod(between) != A.shape[1]:
        return None
    cores = [_core_product(G, H) for G, H in zip(left, right, strict=True)]
    return TT(cores, in_features=B.shape[1], out_features=A.shape[0])


@product_rule.dispatch
def kron_times_train(A: Kron, B: TT) -> LinearOperator | None:
    """A Kronecker product of matrices is a tensor-train of rank 1."""
    return train_times_train(TT(cores_of(A)), B) if is_train(A) else None


def _core_product(G: Array, H: Array) -> Array:
    """``K[(r p), i, j, (s q)] = sum_k G[r, i, k, s] H[p, k, j, q]``."""
    (r, m, _, s), (p, _, n, q) = G.shape, H.shape
    dtype = _array.promote(G.dtype, H.dtype)
    xp = _array.namespace(G)
    K = xp.tensordot(_array.cast(G, dtype), _array.cast(H, dtype), axes=((2,), (1,)))  # r, i, s, p, j, q
    return _array.permute(K, (0, 3, 1, 4, 2, 5)).reshape((r * p, m, n, s * q))


@sum_rule.dispatch
def train_plus_kron(A: TT, B: Kron) -> LinearOperator | None:
    """Ranks add up."""
    return sum_chains(A, TT(cores_of(B))) if is_train(B) else None


@sum_rule.dispatch
def kron_plus_kron(A: Kron, B: Kron) -> LinearOperator | None:
    """Two Kronecker products of equal modes are a tensor-train of rank 2."""
    return sum_chains(TT(cores_of(A)), TT(cores_of(B))) if is_train(A) and is_train(B) else None


@kron_rule.dispatch
def kron_trains(A: TT, B: TT) -> LinearOperator | None:
    """Cores one after the other; rows and columns that pad a tensor-train would lie in between."""
    return None if A.is_padded or B.is_padded else TT([*A.cores, *B.cores])
