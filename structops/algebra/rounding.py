"""Rank reduction: ``A.round(rank)`` and ``so.compress``, along the bonds of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from structops._array import Array
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.algebra.bonds import rounded, train_of
from structops.chain_operator import ChainOperator
from structops.errors import StructureError
from structops.operator import check_precision

Optimality = Literal["exact", "quasi"]


class Compression(NamedTuple):
    """What `compress` returns.

    Attributes:
        operator: The operator of smaller rank, of the same structure.
        error: ``|A - operator| / |A|`` in the Frobenius norm.
        optimality: ``"exact"`` if no operator of this structure and rank is nearer, ``"quasi"`` if the error is at
            most sqrt(number of bonds) times the least.
    """

    operator: LinearOperator
    error: Array
    optimality: Optimality


@dispatch
def compress_rule(A: LinearOperator, rank: int | tuple) -> Compression | None:
    """The nearest operator of A's structure of a smaller rank, or None."""
    return None


def compress(A: LinearOperator, rank: int | Sequence[int]) -> Compression:
    r"""The nearest operator of the same structure of a smaller rank.

    **Definition.** \(\arg\min_B \|A - B\|_F\) over operators B of A's structure, modes and the given rank.  Low
    rank and all chains of two factors (TT, BTT, Monarch, whose blocks are decomposed one by one): the minimum, by
    Eckart and Young.  Trains of c > 2 cores: at most \(\sqrt{c - 1}\) times the least error.

    Args:
        A: A `LowRank`, `TT`, `BTT`, `Monarch` (blocks that divide the width between them), or an `Einsum` whose
            neighbouring factors share one label that is neither input nor output.
        rank: The new rank, or one for every bond in textbook order (first core first).  A bond that is shorter already
            stays.

    Returns:
        The operator, its relative error, and what is known about the optimum.

    Raises:
        StructureError: A has no rank that could be cut, or the rank is not a positive whole number.
        BackendError: A has 16 bits.

    **Cost.** LowRank: (in + out) r^2.  A train: sum over cores of their entries times r.

    **Numerics.** QR and singular value decompositions in the dtype of A; the error is computed from the singular values
    that are dropped, so it is right to about eps relative to ``|A|``.

    **References.** Oseledets, "Tensor-Train Decomposition" (2011), algorithm 2; Eckart and Young (1936).

    Example:
        >>> import torch
        >>> import structops as so
        >>> A = so.LowRank(torch.eye(3), torch.diag(torch.tensor([3., 2., 0.])))
        >>> B, error, optimality = compress(A, 1)
        >>> B.rank, round(float(error), 4), optimality
        (1, 0.5547, 'exact')
    """
    check_precision("rank reduction", A.dtype)
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,)
    if not ranks or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
        raise StructureError(f"rank must be a whole number of at least 1, or one for every bond, got {rank!r}")
    result = compress_rule(A, rank if isinstance(rank, int) else ranks)
    if result is None:
        raise StructureError(
            f"{A!r} has no rank to reduce; LowRank, TT, BTT of two cores and more have one, and Monarch and Einsum "
            f"where neighbouring factors share one inner label and nothing is padded"
        )
    return result


@compress_rule.dispatch
def compress_chain(A: ChainOperator, rank: int | tuple) -> Compression | None:
    """A chain whose neighbours share one bond each; see `structops.algebra.bonds.rounded`."""
    if A.is_transposed:
        result = compress_chain(A.T, rank)
        return None if result is None else result._replace(operator=result.operator.T)
    chain = A.chain
    bonds = train_of(chain)
    if not bonds or A.shape != (chain.padded_out, chain.padded_in):  # what is cut away would count in the optimum
        return None
    ranks = (rank,) * len(bonds) if isinstance(rank, int) else rank[::-1]
    if len(ranks) != len(bonds):
        raise StructureError(f"{A!r} has {len(bonds)} bonds, got {len(ranks)} ranks")
    cut, arrays, error = rounded(chain, A.label_arrays, ranks)
    return Compression(type(A).from_arrays(cut, arrays), error, "exact" if len(bonds) == 1 else "quasi")


class HasRank:
    """What operators with a rank offer beside `compress`."""

    def round(self, rank: int | Sequence[int]) -> Any:
        """The nearest operator of this structure of a smaller rank; see `structops.compress`, which also has the error.

        Args:
            rank: The new rank, or one for every bond in textbook order.

        Raises:
            StructureError: There is no rank that could be cut.
        """
        return compress(self, rank).operator  # type: ignore[arg-type]
