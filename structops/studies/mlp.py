"""The residual MLP of the demonstration as sizes, and the width that meets a budget."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from structops.studies import models
from structops.studies.models import ResidualMLP

PIXELS, CLASSES, EXPANSION = 64, 10, 4


@dataclass(frozen=True)
class MLP(ResidualMLP):
    """`ResidualMLP` for digits, with a norm before the head and no GELU after the input layer.

    All layers but the head have the structure; low rank leaves the input layer dense, too.
    """

    depth: int = 2
    _: KW_ONLY
    in_features: int = PIXELS
    classes: int = CLASSES
    expansion: int = EXPANSION
    input_gelu: bool = False
    final_norm: bool = True


def width_for(spec: str, macs: int, depth: int = 2) -> int:
    """The width whose MACs are nearest to a budget, among those that suit the structure."""
    return models.width_for(MLP(spec, PIXELS, depth), macs)
