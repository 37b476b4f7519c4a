"""The residual MLP of the studies as sizes: its layers, its MACs, and the width that meets a budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from structops.errors import StructureError, StructureWarning
from structops.spec import Plan, structure

PIXELS, CLASSES, EXPANSION = 64, 10, 4


@dataclass(frozen=True)
class MLP:
    """``embed``, then ``depth`` blocks ``h + down(gelu(up(norm(h))))``, then ``norm`` and ``head``.

    Attributes:
        structure: Of all layers but the head, which is dense; low rank leaves the input layer dense too, as the paper.
        width: Of the residual stream.
        depth: Number of blocks.
    """

    structure: str
    width: int
    depth: int = 2

    def layers(self) -> Iterator[tuple[str, str, int, int]]:
        """(name, structure, in_features, out_features) of every layer."""
        wide = EXPANSION * self.width
        embed = "dense" if structure(self.structure).name == "low_rank" else self.structure
        yield "embed", embed, PIXELS, self.width
        for block in range(self.depth):
            yield f"blocks.{block}.up", self.structure, self.width, wide
            yield f"blocks.{block}.down", self.structure, wide, self.width
        yield "head", "dense", self.width, CLASSES

    @staticmethod
    def starts_at_zero(name: str) -> bool:
        """Whether a layer ends a residual branch or the network."""
        return name == "head" or name.endswith(".down")

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image of all layers."""
        return sum(plan.macs for plan in self._plans())

    @property
    def num_params(self) -> int:
        """Parameters of all layers, without biases and norms."""
        return sum(plan.num_params for plan in self._plans())

    def _plans(self) -> Iterator[Plan]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StructureWarning)
            for _, spec, n, m in self.layers():
                yield structure(spec).plan(n, m)


def width_for(spec: str, macs: int, depth: int = 2) -> int:
    """The width whose MACs are nearest to a budget, among widths that suit the structure.

    Kronecker products and tensor-trains take square numbers, whose modes are equal; the others multiples of 4.
    """
    square = structure(spec).name in ("kron", "tt", "btt")
    candidates = (n * n for n in range(2, 200)) if square else range(8, 40_000, 4)
    best, gap = 0, float("inf")
    for width in candidates:
        try:
            miss = abs(MLP(spec, width, depth).macs - macs)
        except StructureError:
            continue
        if miss > gap:
            break
        best, gap = width, miss
    return best
