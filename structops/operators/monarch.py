"""Monarch: two block-diagonal matrices with a stride permutation between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from structops._array import Array
from structops.algebra.rounding import HasRank
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError, StructureError
from structops.operator import check_arrays, check_axes
from structops.spec import Structure, check_budget, check_count, check_sizes, register


@cache
def monarch_chain(
    blocks: int, right: tuple[int, int], left: tuple[int, int], out_features: int, in_features: int
) -> Chain:
    """The chain of blocks ``right`` (q, p) and ``left`` (s, q), for ``blocks`` of each.

    The state after ``right`` is flattened block-major (k, q) and re-read as (r, l), l the block of ``left``.  Where
    ``blocks`` divides q this is BTT of rank q / blocks, where q divides ``blocks`` finer labels say the same, and only
    where neither divides the chain has to regroup.
    """
    (q, p), (s, inner) = right, left
    if q == inner and q % blocks == 0:
        sizes = {"a": s, "b": blocks, "c": blocks, "d": p, "s": q // blocks}
        pattern = "cd, csbd, bacs -> ab"
    elif q == inner and blocks % q == 0:
        sizes = {"a": s, "b": q, "c": q, "d": p, "e": blocks // q}
        pattern = "ced, cebd, ebac -> aeb"
    else:
        sizes = {"k": blocks, "p": p, "q": q, "r": inner, "l": blocks, "s": s}
        pattern = "kp, kqp, kq=rl, lsr -> sl"
    return Chain(pattern, sizes, in_features, out_features)


class Monarch(HasRank, ChainOperator):
    r"""The product of two block-diagonal matrices with a permutation between them.

    **Definition.** With b blocks, \(z_{kq} = \sum_p R_{kqp} x_{kp}\); z is flattened k-major and re-read as \(z_{rl}\)
    with \(l < b\); \(y_{sl} = \sum_r L_{lsr} z_{rl}\), flattened s-major.  With b = root of d this is BTT of rank 1.

    Args:
        left: Shape (blocks, s, q); applied last.
        right: Shape (blocks, q, p); applied first.
        in_features: True input size where blocks * p is padded.
        out_features: True output size where blocks * s is padded.

    Raises:
        ShapeError: The arrays have not three axes, or differ in blocks or q; or a true size exceeds the padded one.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out), where in = blocks * p and out = blocks * s unless
    padded.

    **Cost.** Parameters and MACs per vector: blocks * q * (p + s); 2 d^2 / blocks for square sizes.

    **Numerics.** Two batched matrix products in the dtype of the inputs.

    **References.** Dao et al., "Monarch" (arXiv 2204.00595); "Compute Better Spent" (arXiv 2406.06248), section 2.  Any
    number of blocks, also where it divides neither side or q.

    Example:
        >>> import torch
        >>> Monarch(torch.ones(4, 2, 4), torch.ones(4, 4, 3))
        Monarch(8x12; 4 blocks of 4x3, then of 2x4; 80 params, 0.833 of dense; torch.float32)
    """

    def __init__(
        self, left: Array, right: Array, *, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        check_arrays("Monarch", [left, right])
        check_axes("Monarch: left", left, "(blocks, s, q)")
        check_axes("Monarch: right", right, "(blocks, q, p)")
        blocks, q, p = right.shape
        if left.shape[0] != blocks or left.shape[2] != q:
            raise ShapeError(
                f"Monarch: left (blocks, s, q) and right (blocks, q, p) must agree on blocks and q, "
                f"got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        s = left.shape[1]
        for name, true, size in (("in_features", in_features, p), ("out_features", out_features, s)):
            if true is not None and not 1 <= true <= blocks * size:
                raise ShapeError(
                    f"Monarch: {name} must lie between 1 and the {blocks * size} of the blocks, got {true}"
                )
        chain = monarch_chain(blocks, (q, p), (s, q), out_features or blocks * s, in_features or blocks * p)
        self._set(chain, [right, left])

    @classmethod
    def textbook_shapes(cls, chain: Chain) -> tuple[tuple[int, ...], ...]:
        """``(blocks, q, p)`` and ``(blocks, s, q)``, which is how factors are stored."""
        return tuple((f.blocks, f.fan_out, f.fan_in) for f in chain.factors)

    @property
    def left(self) -> Array:
        """The blocks applied last, (blocks, s, q); of the original if this is a transpose."""
        return self.textbook[0]

    @property
    def right(self) -> Array:
        """The blocks applied first, (blocks, q, p); of the original if this is a transpose."""
        return self.textbook[1]

    @property
    def blocks(self) -> int:
        """Number of blocks of either factor."""
        return int(self.left.shape[0])

    def describe(self) -> str:
        """Blocks of both factors in order of application."""
        first, last = self.chain.factors
        padded = (self.chain.padded_out, self.chain.padded_in)
        text = f"{self.blocks} blocks of {first.fan_out}x{first.fan_in}, then of {last.fan_out}x{last.fan_in}"
        return text if padded == self.shape else f"{text}, padded to {padded[0]}x{padded[1]}"


@register
@dataclass(frozen=True)
class MonarchStructure(Structure):
    """``monarch(blocks)``: by default root-in_features blocks, rounded up, as the authors.

    Sizes that ``blocks`` does not divide are padded, and the parameters of the padded blocks are counted.

    Args:
        blocks: Number of blocks of both factors.
        params: In place of the blocks, the fewest that keep within this share of the dense parameters.
    """

    name = "monarch"
    blocks: int | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "blocks", self.blocks)
        check_budget(self, self.params, "blocks", self.blocks)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """Two factors; the narrower side is the width between them."""
        check_sizes(self, in_features, out_features)
        if self.params is not None:
            return self._within(self.params, in_features, out_features)
        return self._chain(self.blocks or math.isqrt(in_features - 1) + 1, in_features, out_features)

    @staticmethod
    def _chain(blocks: int, in_features: int, out_features: int) -> Chain:
        p, s = -(-in_features // blocks), -(-out_features // blocks)
        q = min(p, s)
        return monarch_chain(blocks, (q, p), (s, q), out_features, in_features)

    def _within(self, params: float, in_features: int, out_features: int) -> Chain:
        budget = math.floor(params * in_features * out_features + 1e-9)
        blocks, least = 1, math.inf
        while blocks:
            chain = self._chain(blocks, in_features, out_features)
            if chain.num_params <= budget:
                return chain
            least = min(least, chain.num_params)
            # Parameters fall only where a block gets shorter: the next number of blocks at which one does.
            heights = [(size, -(-size // blocks)) for size in (in_features, out_features)]
            blocks = min((-(-size // (height - 1)) for size, height in heights if height > 1), default=0)
        raise StructureError(
            f"{self}: no number of blocks keeps within {budget} parameters at {out_features}x{in_features}; "
            f"the least is {least}"
        )

    build = staticmethod(Monarch.from_factors)
