"""What the two transformers have in common: blocks of attention and feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from structops.errors import StructureError
from structops.studies.models.sizes import LayerSize, Model


@dataclass(frozen=True, kw_only=True)
class Transformer(Model):
    """Blocks ``h + o(attention(q, k, v))`` and ``h + down(gelu(up(norm(h))))``, each with a norm before it.

    Queries and keys are normalised in every head (QK-norm), and their products multiplied by ``8 / head_dim``: the
    scale of muP, which is the usual one for heads of 64 features.

    Attributes:
        heads: Number of heads, or None for ``width / head_dim``.
        head_dim: Features of a head, or None for ``width / heads``.
    """

    heads: int | None = None
    head_dim: int | None = None
    zero_queries: ClassVar[bool]  # whether query projections start at zero
    biased_projections: ClassVar[bool]  # whether query, key and value projections take the bias of others

    def __post_init__(self) -> None:
        """Check that heads fit the width."""
        super().__post_init__()
        if self.heads is None and self.head_dim is None:
            raise StructureError("a transformer needs heads= or head_dim=")
        if self.width % self.width_unit:
            what = f"heads={self.heads}" if self.heads is not None else f"head_dim={self.head_dim}"
            raise StructureError(
                f"width {self.width} is no multiple of {what}; give both heads and head_dim for an attention of "
                f"another width than that of the model"
            )

    @property
    def tokens(self) -> int:
        """Tokens per example."""
        raise NotImplementedError

    @property
    def head_count(self) -> int:
        """Number of heads."""
        return self.heads or self.width // (self.head_dim or 1)

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.width // (self.heads or 1)

    @property
    def attention_width(self) -> int:
        """Features of all heads together."""
        return self.head_count * self.head_size

    @property
    def width_unit(self) -> int:
        """The number of heads or their size, if the other one follows from the width."""
        return 1 if self.heads is not None and self.head_dim is not None else self.heads or self.head_dim or 1

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return 8 / self.head_size

    @property
    def attention_macs(self) -> int:
        """Two products of T x T per head; the mask of a GPT saves none."""
        return self.depth * 2 * self.tokens**2 * self.attention_width

    @property
    def other_activations(self) -> int:
        """In every block: queries, keys and values as attention takes them, and the input of GELU."""
        return self.depth * self.tokens * (3 * self.attention_width + self.expansion * self.width)

    def _block_layers(self) -> Iterator[LayerSize]:
        d, inner, uses = self.width, self.attention_width, self.tokens
        bias = None if self.biased_projections else False
        for block in range(self.depth):
            prefix = f"blocks.{block}"
            for name in ("q", "k", "v"):
                yield self._layer(
                    *("attention", f"{prefix}.attention.{name}", d, inner),
                    uses=uses,
                    zero_init=name == "q" and self.zero_queries,
                    bias=bias,
                    gain=name == "v",
                    new_input=name == "q",
                )
            yield self._layer("attention", f"{prefix}.attention.o", inner, d, uses=uses, zero_init=True)
            yield from self._ffn(prefix, uses)

    def _block_norms(self) -> Iterator[tuple[int, int]]:
        for _ in range(self.depth):
            yield from ((self.width, self.tokens),) * 2
            yield from ((self.head_size, self.tokens * self.head_count),) * 2
        yield self.width, self.tokens
