"""The language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from structops.studies.models.sizes import LayerSize
from structops.studies.models.transformer import Transformer

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class GPT(Transformer):
    """GPT-2 with QK-norm, separate query, key and value projections, learned positions, no biases, an untied head.

    An example is a sequence of ``context`` tokens; all counts are of a whole one.  The paper structures all linear
    layers, the head among them, and takes few heads of 64 features, so that attention stays small beside a wide
    stream.  Queries do not start at zero, as in the paper's code.

    Attributes:
        depth: Number of blocks.
        head_dim: Features of a head.
        vocab: Number of tokens that there are.
        context: Tokens of a sequence, at most.

    Example:
        >>> GPT("dense", 768, heads=12).macs  # the 12-layer GPT-2, of 512 tokens
        68098719744
    """

    depth: int = 12
    _: KW_ONLY
    where: str = "all"
    bias: bool = False
    norm_bias: bool = False
    head_dim: int | None = 64
    vocab: int = 50304
    context: int = 512
    zero_queries: ClassVar[bool] = False
    biased_projections: ClassVar[bool] = True

    @property
    def tokens(self) -> int:
        """Those of a sequence."""
        return self.context

    def layers(self) -> Iterator[LayerSize]:
        """Of every block ``attention.q``, ``.k``, ``.v``, ``.o``, ``up``, ``down``; ``head``."""
        yield from self._block_layers()
        yield self._layer("head", "head", self.width, self.vocab, uses=self.context, zero_init=True)

    def norms(self) -> Iterator[tuple[int, int]]:
        """Of blocks, queries and keys, and the final one."""
        yield from self._block_norms()

    @property
    def other_params(self) -> int:
        """Tables of tokens and positions."""
        return (self.vocab + self.context) * self.width

    def _module(self, generator: torch.Generator | None) -> nn.Module:
        from structops.studies.models.modules import GPTModule

        return GPTModule(self, generator)
