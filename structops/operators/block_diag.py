"""Block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm
from structops.algebra.counting import factors
from structops.algebra.determinant import combined, determinant_rule, of_zero
from structops.algebra.diagonal import diagonal_rule, trace_rule
from structops.algebra.eigen import Spectrum, eigen, eigen_rule, exp_rule, function_rule, power_rule
from structops.algebra.inverse import inverse_rule, is_square, pinv_rule, singular
from structops.algebra.product import product_rule, scaled
from structops.algebra.scalar import scale_rule
from structops.algebra.sum import sum_rule
from structops.algebra.svd import SVD, svd, svd_rule
from structops.chain import Chain
from structops.errors import ShapeError, StructureError
from structops.modes import common_divisors
from structops.operators.composite import CompositeOperator, fused, like_part, part_inverse, part_pinv
from structops.operators.dense import Dense
from structops.operators.diagonal import Diagonal
from structops.operators.permutation import ascending, descending
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
    """Every block takes the number; one that occurs twice stays one."""
    blocks = {id(M): scaled(M, c) for M in A.Ms}
    return BlockDiag(*(blocks[id(M)] for M in A.Ms), multiplicities=A.multiplicities)


@product_rule.dispatch
def diagonal_times_blocks(D: _cola.Diagonal, A: BlockDiag) -> _cola.LinearOperator | None:
    """Every block takes its part of the diagonal; blocks that repeat would no longer be equal."""
    if set(A.multiplicities) != {1}:
        return None
    parts = _cut(D.diag, [M.shape[0] for M in A.Ms])
    return BlockDiag(*(Diagonal(part) @ M for part, M in zip(parts, A.Ms, strict=True)))


@product_rule.dispatch
def blocks_times_diagonal(A: BlockDiag, D: _cola.Diagonal) -> _cola.LinearOperator | None:
    """Every block takes its part of the diagonal; blocks that repeat would no longer be equal."""
    if set(A.multiplicities) != {1}:
        return None
    parts = _cut(D.diag, [M.shape[1] for M in A.Ms])
    return BlockDiag(*(M @ Diagonal(part) for part, M in zip(parts, A.Ms, strict=True)))


def _cut(diag: Array, sizes: Sequence[int]) -> list[Array]:
    parts, start = [], 0
    for size in sizes:
        parts.append(diag[start : start + size])
        start += size
    return parts


# ---------------------------------------------------------------------------------------------------- linear algebra


@inverse_rule.dispatch
def inverse_blocks(A: BlockDiag, alg: Algorithm) -> _cola.LinearOperator | None:
    """Block by block; with blocks that are not square the matrix is singular."""
    if not all(map(is_square, A.Ms)):
        raise singular(A, "its blocks are not square")
    return BlockDiag(*(part_inverse(M, alg) for M in A.Ms), multiplicities=A.multiplicities)


@pinv_rule.dispatch
def pinv_blocks(A: BlockDiag, alg: Algorithm) -> _cola.LinearOperator | None:
    """Block by block."""
    return BlockDiag(*(part_pinv(M, alg) for M in A.Ms), multiplicities=A.multiplicities)


@determinant_rule.dispatch
def determinant_blocks(A: BlockDiag, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """The product of those of the blocks; with blocks that are not square it is zero."""
    if not all(map(is_square, A.Ms)):
        return of_zero(A)
    return combined([_cola.slogdet(M, log_alg, trace_alg) for M in A.Ms], list(A.multiplicities))


@diagonal_rule.dispatch
def diagonal_of_blocks(A: BlockDiag, k: int, alg: Algorithm) -> Any:
    """Those of the blocks, where all are square."""
    if k != 0 or not all(map(is_square, A.Ms)):
        return None
    diagonals = [(_cola.diag(M, 0, alg), count) for M, count in zip(A.Ms, A.multiplicities, strict=True)]
    dtype = _array.promote(*(d.dtype for d, _ in diagonals))
    return _array.namespace(diagonals[0][0]).concat([_array.cast(d, dtype) for d, n in diagonals for _ in range(n)])


@trace_rule.dispatch
def trace_of_blocks(A: BlockDiag, alg: Algorithm) -> Any:
    """The sum of those of the blocks, where all are square."""
    if not all(map(is_square, A.Ms)):
        return None
    first, *others = (_cola.trace(M, alg) * n for M, n in zip(A.Ms, A.multiplicities, strict=True))
    return sum(others, first)


@eigen_rule.dispatch
def eigen_blocks(A: BlockDiag, alg: Algorithm) -> Spectrum | None:
    """Those of the blocks; their vectors are block-diagonal."""
    if not all(map(is_square, A.Ms)):
        return None
    parts = [eigen(M, alg) for M in A.Ms]
    dtype = _array.promote(*(values.dtype for values, _ in parts))
    repeated = [_array.cast(v, dtype) for (v, _), n in zip(parts, A.multiplicities, strict=True) for _ in range(n)]
    vectors = BlockDiag(*(V for _, V in parts), multiplicities=A.multiplicities)
    return ascending(_array.namespace(repeated[0]).concat(repeated), vectors)


@function_rule.dispatch
def function_of_blocks(f: Callable, A: BlockDiag, alg: Algorithm) -> _cola.LinearOperator | None:
    """Block by block."""
    if not all(map(is_square, A.Ms)):
        return None
    return BlockDiag(*(like_part(M, _cola.apply_unary(f, M, alg)) for M in A.Ms), multiplicities=A.multiplicities)


@exp_rule.dispatch
def exp_of_blocks(A: BlockDiag, alg: Algorithm) -> _cola.LinearOperator | None:
    """Block by block."""
    if not all(map(is_square, A.Ms)):
        return None
    return BlockDiag(*(like_part(M, _cola.exp(M, alg)) for M in A.Ms), multiplicities=A.multiplicities)


@power_rule.dispatch
def power_of_blocks(A: BlockDiag, alpha: float, alg: Algorithm) -> _cola.LinearOperator | None:
    """Block by block."""
    if not all(map(is_square, A.Ms)):
        return None
    return BlockDiag(*(like_part(M, _cola.pow(M, alpha, alg)) for M in A.Ms), multiplicities=A.multiplicities)


@svd_rule.dispatch
def svd_blocks(A: BlockDiag) -> SVD | None:
    """Those of the blocks; their vectors are block-diagonal."""
    parts = [svd(M) for M in A.Ms]
    values = [S for (_, S, _), n in zip(parts, A.multiplicities, strict=True) for _ in range(n)]
    U, Vh = (
        BlockDiag(*(part[side] for part in parts), multiplicities=A.multiplicities)  # type: ignore[arg-type]
        for side in (0, 2)
    )
    return descending(U, _array.namespace(values[0]).concat(values), Vh)
