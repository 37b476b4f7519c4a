"""The vision transformer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from structops.errors import StructureError
from structops.studies.models.sizes import LayerSize
from structops.studies.models.transformer import Transformer

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ViT(Transformer):
    """Square patches with a norm before and after the input layer, a class token, learned positions, a final norm.

    The head reads the class token.  Query, key and value projections have no biases; queries start at zero, which muP
    recommends.

    Attributes:
        heads: Number of heads.
        image_size: Height and width of images (channels, height, width).
        patch_size: Height and width of a patch.
        channels: Of images.
        classes: Number of outputs.

    Example:
        >>> ViT("dense", 32, classes=100).macs_with_norms  # on CIFAR-100
        836960
    """

    heads: int | None = 8
    image_size: int = 32
    patch_size: int = 8
    channels: int = 3
    classes: int = 10
    zero_queries: ClassVar[bool] = True
    biased_projections: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check that patches fit the image."""
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise StructureError(f"patches of {self.patch_size} do not tile an image of {self.image_size}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_features(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch_size**2

    @property
    def tokens(self) -> int:
        """The patches and the class token."""
        return self.patches + 1

    def layers(self) -> Iterator[LayerSize]:
        """``embed``; of every block ``attention.q``, ``.k``, ``.v``, ``.o``, ``up``, ``down``; ``head``."""
        yield self._layer("input", "embed", self.patch_features, self.width, uses=self.patches)
        yield from self._block_layers()
        yield self._layer("head", "head", self.width, self.classes, zero_init=True)

    def norms(self) -> Iterator[tuple[int, int]]:
        """Of patches before and after the input layer, of blocks, queries and keys, and the final one of all tokens."""
        yield self.patch_features, self.patches
        yield self.width, self.patches
        yield from self._block_norms()

    @property
    def other_params(self) -> int:
        """Positions and the class token."""
        return (self.tokens + 1) * self.width

    def _module(self, generator: torch.Generator | None) -> nn.Module:
        from structops.studies.models.modules import ViTModule

        return ViTModule(self, generator)
