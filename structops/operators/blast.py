"""BLAST: blocks of a matrix that share their bases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from structops._array import Array
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError
from structops.modes import common_divisors
from structops.operator import check_arrays, check_axes
from structops.spec import (
    Structure,
    check_blocks,
    check_budget,
    check_count,
    check_sizes,
    largest_within,
    register,
    warn_wasteful_rank,
)


@cache
def blast_chain(out_blocks: int, rows: int, in_blocks: int, cols: int, rank: int) -> Chain:
    """``y_im = sum_r left_imr sum_j coupling_ijr sum_n right_jnr x_jn``."""
    return Chain("jn, jnr, ijr, imr -> im", {"i": out_blocks, "m": rows, "j": in_blocks, "n": cols, "r": rank})


class BLAST(ChainOperator):
    r"""A block matrix whose blocks share row and column bases and differ in a diagonal between them.

    **Definition.** Block (i, j) is \(U_i \,\mathrm{diag}(s_{ij})\, V_j^T\); the chain ``jn, jnr, ijr, imr -> im``.

    Args:
        left: \(U\), shape (out_blocks, m, rank); applied last.
        coupling: \(s\), shape (out_blocks, in_blocks, rank).
        right: \(V\), shape (in_blocks, n, rank); applied first.

    Raises:
        ShapeError: An array has not three axes, or blocks or ranks disagree.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in_blocks * n,) or (in_blocks * n, k); ``X @ A``: (..., out_blocks * m).

    **Cost.** rank * (in + out + in_blocks * out_blocks) parameters and MACs per vector.

    **Numerics.** Three batched matrix products in the dtype of the inputs.

    **References.** Lee et al., "BLAST" (arXiv 2410.21262), equation 2.

    Example:
        >>> import torch
        >>> BLAST(torch.ones(2, 4, 3), torch.ones(2, 2, 3), torch.ones(2, 5, 3))
        BLAST(8x10; factors 2x5x3, 2x2x3, 2x4x3; 66 params, 0.825 of dense; torch.float32)
    """

    def __init__(self, left: Array, coupling: Array, right: Array) -> None:
        check_arrays("BLAST", [left, coupling, right])
        check_axes("BLAST: left", left, "(out_blocks, m, rank)")
        check_axes("BLAST: coupling", coupling, "(out_blocks, in_blocks, rank)")
        check_axes("BLAST: right", right, "(in_blocks, n, rank)")
        (i, m, rank), (j, n, _) = left.shape, right.shape
        if tuple(coupling.shape) != (i, j, rank) or right.shape[2] != rank:
            raise ShapeError(
                f"BLAST: left (i, m, r), coupling (i, j, r) and right (j, n, r) must agree, "
                f"got {tuple(left.shape)}, {tuple(coupling.shape)} and {tuple(right.shape)}"
            )
        self._set(blast_chain(i, m, j, n, rank), [right, coupling, left])


@register
@dataclass(frozen=True)
class BLASTStructure(Structure):
    """``blast(rank, blocks)``: by default the root of the smaller side as rank, and at most 4 blocks.

    Args:
        rank: Size of the shared bases.
        blocks: Blocks of either side; must divide both sizes.
        params: In place of the rank, the largest that keeps within this share of the dense parameters.
    """

    name = "blast"
    rank: int | None = None
    blocks: int | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "rank", self.rank)
        check_count(self, "blocks", self.blocks)
        check_budget(self, self.params, "rank", self.rank)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """Three factors: into the bases, between blocks, out of the bases.

        Raises:
            StructureError: ``blocks`` does not divide a size.
        """
        check_sizes(self, in_features, out_features)
        blocks = self.blocks or max(d for d in common_divisors(in_features, out_features) if d <= 4)
        check_blocks(self, blocks, in_features, out_features)

        def at(rank: int) -> Chain:
            return blast_chain(blocks, out_features // blocks, blocks, in_features // blocks, rank)

        if self.params is not None:
            dense = in_features * out_features
            rank = largest_within(self, self.params, dense, lambda r: at(r).num_params, "rank")
        else:
            rank = self.rank or math.isqrt(min(in_features, out_features) - 1) + 1
        warn_wasteful_rank(self, "rank", rank, min(in_features, out_features))
        return at(rank)

    build = staticmethod(BLAST.from_factors)
