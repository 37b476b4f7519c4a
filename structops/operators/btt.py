"""Block tensor-train: a tensor-train whose cores differ from block to block."""

from __future__ import annotations

from dataclasses import dataclass

from structops._array import Array
from structops.errors import StructureError
from structops.operators.train import Modes, TrainOperator, TrainStructure
from structops.spec import check_blocks, check_count, register


class BTT(TrainOperator):
    r"""A block tensor-train matrix: every parameter is used once per vector.

    **Definition.** With rows and columns in mixed radix, \(i = (i_1 \ldots i_c)\) and \(j = (j_1 \ldots j_c)\),

    \[ A[i, j] = \sum_{s_1 \ldots s_{c-1}} \prod_t G_t[s_{t-1}, i_t \ldots i_c, j_1 \ldots j_t, s_t]. \]

    Two cores are the chain ``cd, sbcd, abcs -> ab``.  Monarch with root-d blocks is rank 1; a tensor-train is the case
    of cores that do not depend on the block.

    Args:
        cores: ``cores[t]`` has shape (r_{t-1}, m_t, ..., m_c, n_1, ..., n_t, r_t) with output modes m, input modes n
            and r_0 = r_c = 1.  The first is the most significant; the last is applied first.
        in_features: True input size where the modes pad it.
        out_features: True output size where the modes pad it.

    Raises:
        ShapeError: A core has not c + 3 axes, modes or ranks do not chain, or an outer rank is not 1; or a true size
            exceeds the padded one.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out), where in = prod n and out = prod m unless padded.

    **Cost.** Parameters and MACs per vector: sum of r_{t-1} r_t (n_1...n_t)(m_t...m_c); with two cores and square sizes
    2 rank d^1.5.

    **Numerics.** One batched matrix product a core in the dtype of the inputs.

    **References.** "Compute Better Spent" (arXiv 2406.06248), section 4.  The transpose is a block tensor-train with
    the order of the modes reversed; it keeps the cores and sets ``is_transposed``.

    Example:
        >>> import torch
        >>> BTT([torch.ones(1, 4, 4, 2, 3), torch.ones(3, 4, 2, 5, 1)])
        BTT(16x10; modes 4x4 by 2x5, rank 3; 216 params, 1.35 of dense; torch.float32)
    """

    kind = "btt"
    axes = "(r_{t-1}, m_t, ..., m_c, n_1, ..., n_t, r_t)"

    @property
    def cores(self) -> tuple[Array, ...]:
        """The cores as they were given; ``is_transposed`` says whether the matrix is their transpose."""
        return self.textbook


@register
@dataclass(frozen=True)
class BTTStructure(TrainStructure):
    """``btt(rank, num_cores, modes, params, pad)`` as `TrainStructure`, or ``btt(rank, blocks)``.

    Args:
        blocks: With two cores, the number of blocks of both: input modes (blocks, in / blocks), output modes
            (out / blocks, blocks).  Few large blocks are what is fast; root-d blocks are the paper's.  Sizes that it
            does not divide are padded to the next multiple with ``pad=True``.
    """

    name = "btt"
    blocks: int | None = None
    build = staticmethod(BTT.from_factors)

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        super().__post_init__()
        check_count(self, "blocks", self.blocks)
        if self.blocks is not None and (self.num_cores != 2 or self.modes != "balanced"):
            raise StructureError(
                f"btt: blocks={self.blocks} fixes the modes of two cores; "
                f"drop num_cores={self.num_cores} and modes={self.modes!r}"
            )

    def mode_sizes(self, in_features: int, out_features: int) -> tuple[Modes, Modes]:
        """Output and input modes at this size.

        Raises:
            StructureError: ``blocks`` does not divide a size and ``pad`` is False; the message names the nearest sizes
                and blocks.
        """
        if self.blocks is None:
            return super().mode_sizes(in_features, out_features)
        if not self.pad:
            check_blocks(self, self.blocks, in_features, out_features)
        rows, cols = (-(-size // self.blocks) for size in (out_features, in_features))
        return (rows, self.blocks), (self.blocks, cols)
