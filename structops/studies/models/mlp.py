"""The residual MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from structops.errors import StructureError
from structops.studies.models.sizes import LayerSize, Model

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT_RATE = 0.1  # learning rate of the input layer relative to its rule (arXiv 2406.06248), so that others show


@dataclass(frozen=True, kw_only=True)
class ResidualMLP(Model):
    """``embed``, GELU, then ``depth`` blocks ``h + down(gelu(up(norm(h))))``, then ``head`` (arXiv 2406.06248).

    The paper permutes pixels once and for all, so that no structure profits from the picture; that is left to the
    data.

    Attributes:
        in_features: Numbers per example; examples of more axes are flattened.
        classes: Number of outputs.
        input_gelu: Whether GELU follows the input layer.
        final_norm: Whether a norm comes before the head.

    Example:
        >>> ResidualMLP("btt(modes='greedy')", 1024).macs_with_norms
        1401856
    """

    in_features: int = 3072
    classes: int = 10
    input_gelu: bool = True
    final_norm: bool = False

    def __post_init__(self) -> None:
        """Check that there is something to structure."""
        super().__post_init__()
        if self.where == "attention":
            raise StructureError("an MLP has no attention; where is one of all, all_but_head, hidden and ffn")

    def layers(self) -> Iterator[LayerSize]:
        """``embed``, ``blocks.0.up``, ``blocks.0.down``, ..., ``head``."""
        yield self._layer("input", "embed", self.in_features, self.width)
        for block in range(self.depth):
            yield from self._ffn(f"blocks.{block}")
        yield self._layer("head", "head", self.width, self.classes, zero_init=True)

    def norms(self) -> Iterator[tuple[int, int]]:
        """One a block, and one before the head."""
        for _ in range(self.depth + self.final_norm):
            yield self.width, 1

    @property
    def other_activations(self) -> int:
        """Inputs of GELU."""
        return self.depth * self.expansion * self.width + (self.width if self.input_gelu else 0)

    @property
    def input_layers(self) -> tuple[str, ...]:
        """The input layer."""
        return ("embed",)

    def _module(self, generator: torch.Generator | None) -> nn.Module:
        from structops.studies.models.modules import ResidualMLPModule

        return ResidualMLPModule(self, generator)
