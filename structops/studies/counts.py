"""Counts of models beside those that the figures of the paper show.

The published numbers are read off the figures, so that they have a few digits only.  They count as fvcore does: matrix
products of linear layers and of attention (the whole square, also under a causal mask), and five per element of layer
norms.  Ours are within 0.15 % of all; those of GPT-2 are lower by about 2e7 at every width, for a reason unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from structops.studies.lab.tables import Table
from structops.studies.models import GPT, Model, ResidualMLP, ViT


@dataclass(frozen=True)
class PaperRow:
    """A model of arXiv 2406.06248, and the MACs that a figure shows.

    Attributes:
        source: The figure, and what it is about.
        model: The model; the factors of sizes are those of the authors' code (``modes='greedy'``).
        published: The number as text, with as many digits as the figure allows; empty for a model without one.
        headless: Whether it leaves out the head.
    """

    source: str
    model: Model
    published: str = ""
    headless: bool = False

    @property
    def macs(self) -> int:
        """Ours, by the convention of the figure."""
        return self.model.macs_with_norms - (self.model.head_macs if self.headless else 0)

    @property
    def deviation(self) -> float | None:
        """Of the published number, relative to ours."""
        return float(self.published) / self.macs - 1 if self.published else None


def _rows(source: str, kind: type[Model], spec: str, published: dict[int, str], **sizes: Any) -> list[PaperRow]:
    return [PaperRow(source, kind(spec, width, **sizes), text) for width, text in published.items()]


def _gpt(spec: str, width: int, heads: int, whole: str, body: str) -> list[PaperRow]:
    model = GPT(spec, width, heads=heads)
    return [PaperRow(_GPT2, model, whole), PaperRow(_GPT2, model, body, headless=True)]


BTT, BTT2, BTT4 = "btt(modes='greedy')", "btt(rank=2, modes='greedy')", "btt(rank=4, modes='greedy')"
_MLP10, _VIT100, _IMAGENET, _GPT2 = "MLP, CIFAR-10", "ViT, CIFAR-100", "ViT/32, ImageNet", "GPT-2, 512 tokens"
_LARGE: dict[str, Any] = {"depth": 12, "heads": 4, "image_size": 224, "patch_size": 32, "classes": 1000}

PAPER_ROWS: tuple[PaperRow, ...] = (
    *_rows(_MLP10, ResidualMLP, "dense", {32: "1.237e5", 64: "2.966e5", 2048: "1.070e8"}),
    *_rows(_MLP10, ResidualMLP, BTT, {128: "9.54e4", 1024: "1.402e6", 16384: "7.788e7"}),
    *_rows(_MLP10, ResidualMLP, "low_rank", {32: "1.049e5", 16384: "1.137e8"}),
    *_rows(_VIT100, ViT, "dense", {32: "8.37e5", 1024: "6.48e8"}, classes=100),
    *_rows(_IMAGENET, ViT, "dense", {80: "6.47e7", 192: "3.09e8", 384: "1.148e9"}, **_LARGE),
    *_rows(_IMAGENET, ViT, BTT, {256: "7.23e7", 784: "3.30e8", 1936: "1.181e9"}, **_LARGE),
    *_rows(_IMAGENET, ViT, BTT2, {144: "5.78e7", 484: "3.03e8", 1296: "1.239e9"}, **_LARGE),
    *_rows(_IMAGENET, ViT, "monarch(blocks=4)", {140: "6.95e7", 316: "3.07e8", 632: "1.154e9"}, **_LARGE),
    *_rows(_IMAGENET, ViT, "monarch(blocks=16)", {632: "3.29e8", 1264: "1.189e9"}, **_LARGE),
    *_gpt("dense", 384, 6, "2.324e10", "1.335e10"),
    *_gpt("dense", 512, 12, "4.067e10", "2.748e10"),
    *_gpt("dense", 768, 12, "6.821e10", "4.843e10"),
    *_gpt(BTT4, 1024, 6, "1.855e10", "1.520e10"),
    *_gpt(BTT4, 1536, 6, "3.008e10", "2.505e10"),
    *_gpt(BTT4, 2048, 6, "4.401e10", "3.732e10"),
    *_gpt(BTT4, 2560, 12, "6.688e10", "5.851e10"),
)


def counts_table(rows: Iterable[PaperRow] = PAPER_ROWS) -> Table:
    """The published MACs of models beside ours, by the same convention; GPT-2 also without its head.

    Args:
        rows: Models, with or without a published number.
    """
    cells = tuple(
        (
            row.source + (", no head" if row.headless else ""),
            *(row.model.structure, row.model.width, row.published or None, row.macs),
            None if row.deviation is None else f"{row.deviation:+.2%}",
        )
        for row in rows
    )
    return Table("MACs of an example", ("model", "structure", "width", "paper", "ours", "off"), cells)


def layer_table(model: Model) -> Table:
    """A row a linear layer, and the whole model; MACs and stored numbers are per example."""
    cells: list[tuple[Any, ...]] = [
        (
            *(layer.name, layer.structure, layer.in_features, layer.out_features, layer.uses),
            *(layer.cost.num_params, layer.uses * layer.cost.macs),
        )
        for layer in model.layers()
    ]
    cells.append(("attention", "", None, None, None, None, model.attention_macs))
    cells.append(("all", "", None, None, None, model.num_params, model.macs))
    title = f"{model.macs_with_norms:,} MACs with 5 per element of norms; {model.activations:,} stored numbers"
    columns = ("layer", "structure", "in", "out", "uses", "params", "MACs")
    return Table(title, columns, tuple(cells))


def count(model: Model) -> dict[str, Any]:
    """All counts of a model, and of each of its linear layers.

    Returns:
        ``model`` (its fields), ``macs``, ``macs_with_norms``, ``linear_macs``, ``attention_macs``, ``head_macs``,
        ``num_params`` of linear layers, ``all_params``, ``activations``, and ``layers``: name, structure, sizes, uses,
        parameters and MACs of all uses.

    Raises:
        StructureError: A structure is unknown or cannot have a size.

    Example:
        >>> count(ResidualMLP("dense", 32))["macs_with_norms"]
        123680
    """
    macs = ("macs", "macs_with_norms", "linear_macs", "attention_macs", "head_macs")
    numbers = (*macs, "num_params", "all_params", "activations")
    layers = [
        {
            "name": layer.name,
            "structure": layer.structure,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "uses": layer.uses,
            "num_params": layer.cost.num_params,
            "macs": layer.uses * layer.cost.macs,
        }
        for layer in model.layers()
    ]
    return {"model": model.to_dict(), **{name: getattr(model, name) for name in numbers}, "layers": layers}
