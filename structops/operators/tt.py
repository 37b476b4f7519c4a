"""Tensor-train: a chain of small cores that every block shares."""

from __future__ import annotations

from dataclasses import dataclass

from structops._array import Array
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

    Raises:
        ShapeError: A core has not four axes, the ranks do not chain, or an outer rank is not 1.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (prod n,) or (prod n, k); ``X @ A``: (..., prod m).

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


@register
@dataclass(frozen=True)
class TTStructure(TrainStructure):
    """``tt(rank, num_cores, modes)``; see `TrainStructure`."""

    name = "tt"
    build = staticmethod(TT.from_factors)
