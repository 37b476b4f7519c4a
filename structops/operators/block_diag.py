"""Block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array
from structops.algebra.counting import factors
from structops.algebra.product import product_rule, scaled
from structops.algebra.scalar import scale_rule
from structops.algebra.sum import sum_rule
from structops.chain import Chain
from structops.errors import ShapeError, StructureError
from structops.modes import common_divisors
from structops.operators.composite import CompositeOperator, fused
from structops.operators.dense import Dense
from structops.spec import Structure, check_blocks, check_budget, check_count, check_sizes, register


@cache
def block_diag_chain(blocks: int, rows: int, cols: int) -> Chain:
    """``y_cb = sum_d M_cbd x_cd``."""
    return Chain("cd, cbd -> cb", {"c": blocks, "b": rows, "d": cols})


class BlockDiag(CompositeOperator, _cola.BlockDiag):
    r"""Matrices or operators along the diagonal, zeros elsewhere.

    **Definition.** \(A = M_1 \oplus \ldots \oplus M_b\), every \(M_t\) repeated ``multiplicities[t]`` times in a row.
    Equal blocks are the chain ``cd, cbd -> cb``.

    Args:
        *Ms: Matrices (m_t, n_t), or operators, which keep their own structure.
        multiplicities: How often each is repeated; once by default.

    Raises:
        ShapeError: A block is not a matrix, there is none, or the multiplicities do not fit.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (sum n,) or (sum n, k); ``X @ A``: (..., sum m).

    **Cost.** Parameters: those of every block once.  MACs per vector: those of every block, times its multiplicity.

    **Numerics.** One batched matrix product where all blocks are arrays of one shape, else one product a block.

    **References.** CoLA's ``BlockDiag``, on a base that can be copied and compiled.

    Example:
        >>> import torch
        >>> BlockDiag(torch.ones(2, 3), torch.ones(2, 3))
        BlockDiag(4x6; blocks 2x3, 2x3; 12 params, 0.5 of dense; torch.float32)
    """

    static = (*CompositeOperator.static, "multiplicities")
    multiplicities: tuple[int, ...]

    def __init__(self, *Ms: Any, multiplicities: Sequence[int] | None = None) -> None:
        counts = (1,) * len(Ms) if multiplicities is None else tuple(multiplicities)
        if len(counts) != len(Ms) or any(count < 1 for count in counts):
            raise ShapeError(f"BlockDiag: {len(Ms)} blocks need as many multiplicities of at least 1, got {counts}")
        self._set(Ms)
        self.multiplicities = counts
        equal = len({tuple(M.shape) for M in self.Ms}) == 1 and set(counts) == {1}
        if equal and all(isinstance(M, Dense) for M in self.Ms):
            self._set_chain(block_diag_chain(len(self.Ms), *self.Ms[0].shape))

    @classmethod
    def from_factors(cls, chain: Chain, factors: Sequence[Array]) -> Self:
        """The operator from one stored factor ``(blocks, m, n)``, as views of its blocks."""
        (stacked,) = factors
        return cls(*(stacked[index] for index in range(stacked.shape[0])))

    @property
    def shape(self) -> tuple[int, int]:
        """``(sum m, sum n)`` over all repeats."""
        pairs = list(zip(self.Ms, self.multiplicities, strict=True))
        return sum([M.shape[0] * c for M, c in pairs]), sum([M.shape[1] * c for M, c in pairs])

    def chain_arrays(self, matrices: list[Array]) -> list[Array]:
        """All blocks in one array."""
        return [_array.namespace(matrices[0]).stack(matrices)]

    def _apply_parts(self, x: Array) -> Array:
        lead, start, parts = tuple(x.shape[:-1]), 0, []
        for M, count in zip(self.Ms, self.multiplicities, strict=True):
            stop = start + M.shape[1] * count
            part = M._matmat(x[..., start:stop].reshape((-1, M.shape[1])).mT).mT
            parts.append(part.reshape((*lead, M.shape[0] * count)))
            start = stop
        return _array.namespace(x).concat(parts, axis=-1)

    def describe(self) -> str:
        """Shape, structure and repeats of the blocks."""
        texts = [
            self.describe_part(M) + (f" times {count}" if count > 1 else "")
            for M, count in zip(self.Ms, self.multiplicities, strict=True)
        ]
        shown = texts if len(texts) <= 4 else [*texts[:2], f"... {len(texts) - 3} more ...", texts[-1]]
        return "blocks " + ", ".join(shown)


@register
@dataclass(frozen=True)
class BlockDiagStructure(Structure):
    """``block_diag(blocks)``: by default 4 blocks.

    Args:
        blocks: Number of blocks; must divide both sizes.
        params: In place of the blocks, the fewest that keep within this share of the dense parameters.
    """

    name = "block_diag"
    blocks: int | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "blocks", self.blocks)
        check_budget(self, self.params, "blocks", self.blocks)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """One factor of in * out / blocks parameters.

        Raises:
            StructureError: ``blocks`` does not divide a size, or no common divisor keeps within the budget.
        """
        check_sizes(self, in_features, out_features)
        if self.params is not None:
            common = common_divisors(in_features, out_features)
            within = [d for d in common if 1 / d <= self.params * (1 + 1e-9)]
            if not within:
                raise StructureError(
                    f"{self}: {in_features} and {out_features} divide into {', '.join(map(str, common))} blocks, "
                    f"so params must be at least {1 / common[-1]:.4g}"
                )
            blocks = within[0]
        else:
            blocks = self.blocks or 4
        check_blocks(self, blocks, in_features, out_features)
        return block_diag_chain(blocks, out_features // blocks, in_features // blocks)

    build = staticmethod(BlockDiag.from_factors)


@factors.dispatch
def factors_block_diag_chain(A: BlockDiag) -> tuple:
    """Those of its chain; where blocks differ, those of any block-diagonal operator."""
    return A.chain.factors if A.is_chain else factors.invoke(_cola.BlockDiag)(A)


def conforms(A: _cola.BlockDiag, B: _cola.BlockDiag, axis: int, other: int) -> bool:
    """Whether the blocks of A along one axis are those of B along another, repeats included."""
    return tuple(A.multiplicities) == tuple(B.multiplicities) and [M.shape[axis] for M in A.Ms] == [
        M.shape[other] for M in B.Ms
    ]


@product_rule.dispatch
def blocks_times_blocks(A: BlockDiag, B: BlockDiag) -> _cola.LinearOperator | None:
    """Block by block, where the sizes between them agree."""
    if not conforms(A, B, 1, 0):
        return None
    return BlockDiag(*map(fused, A.Ms, B.Ms), multiplicities=A.multiplicities)


@sum_rule.dispatch
def blocks_plus_blocks(A: BlockDiag, B: BlockDiag) -> _cola.LinearOperator | None:
    """Block by block, where all shapes agree."""
    if not (conforms(A, B, 0, 0) and conforms(A, B, 1, 1)):
        return None
    return BlockDiag(*(M + N for M, N in zip(A.Ms, B.Ms, strict=True)), multiplicities=A.multiplicities)


@scale_rule.dispatch
def scale_blocks(A: BlockDiag, c: object) -> _cola.LinearOperator | None:
    """Every block takes the number."""
    return BlockDiag(*(scaled(M, c) for M in A.Ms), multiplicities=A.multiplicities)
