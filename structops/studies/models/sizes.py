"""What all models have in common: a list of linear layers, from which everything is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from structops.errors import StructureError
from structops.studies.models.layers import Cost, cost, family

if TYPE_CHECKING:
    import torch
    from torch import nn

# Which parts of a model a choice of layers covers (arXiv 2406.06248).
WHERE: dict[str, frozenset[str]] = {
    "all": frozenset({"input", "attention", "ffn", "head"}),
    "all_but_head": frozenset({"input", "attention", "ffn"}),
    "hidden": frozenset({"attention", "ffn"}),
    "attention": frozenset({"attention"}),
    "ffn": frozenset({"ffn"}),
}
NORM_MACS = 5  # per element, by the convention of fvcore, which the figures of the paper follow


@dataclass(frozen=True)
class LayerSize:
    """A linear layer of a model.

    Attributes:
        name: Its name in the module.
        structure: Its structure as text.
        in_features: Size of its input.
        out_features: Size of its output.
        uses: Vectors per example that go through it, such as tokens.
        zero_init: Whether it starts at zero, as the ends of residual branches and the head do.
        bias: Whether it has a bias.
        weight_norm: As that of `structops.torch.StructuredLinear`.
        new_input: Whether its input is kept for it alone; false where a layer before it keeps the same numbers.
    """

    name: str
    structure: str
    in_features: int
    out_features: int
    uses: int = 1
    zero_init: bool = False
    bias: bool = False
    weight_norm: bool | Literal["cap"] = False
    new_input: bool = True

    @property
    def cost(self) -> Cost:
        """Parameters, MACs and stored numbers per vector, without the bias."""
        return cost(self.structure, self.in_features, self.out_features)

    @property
    def all_params(self) -> int:
        """Parameters with the bias, and the gains of weight normalisation."""
        gains = self.cost.factors if self.weight_norm is True else 0
        return self.cost.num_params + gains + (self.out_features if self.bias else 0)


@dataclass(frozen=True)
class Model:
    """Base class of models: sizes and structures, from which counts and the torch module follow.

    A subclass gives ``layers``, ``norms``, ``other_params``, ``other_activations`` and ``_module``.

    Attributes:
        structure: Of the layers that ``where`` chooses, as text; all others are dense.
        width: Of the residual stream.
        depth: Number of blocks.
        where: ``"all"``, ``"all_but_head"``, ``"hidden"`` (neither the input layer nor the head), ``"attention"`` or
            ``"ffn"``.  Low rank leaves the input layer dense in any case: it would discard most of
            the input (arXiv 2406.06248).
        expansion: Width inside a feed-forward network, relative to ``width``.
        bias: Whether linear layers have biases.
        norm_bias: Whether norms have biases.
        weight_norm: Whether factors of structured layers have their root mean square capped (arXiv 2406.06248), with
            gains but for queries and keys, whose norms undo them.

    Raises:
        StructureError: A size is no positive number, or ``where`` is unknown; in counts and ``build``, a structure is
            unknown or cannot have a size.
    """

    structure: str
    width: int
    depth: int = 3
    _: KW_ONLY
    where: str = "all_but_head"
    expansion: int = 4
    bias: bool = True
    norm_bias: bool = True
    weight_norm: bool = False

    def __post_init__(self) -> None:
        """Check what no structure is needed for."""
        if self.where not in WHERE:
            raise StructureError(f"unknown where={self.where!r}; known: {', '.join(WHERE)}")
        for name, size in asdict(self).items():
            if isinstance(size, int) and size < (0 if name == "depth" or isinstance(size, bool) else 1):
                raise StructureError(f"{name} must be a positive whole number, got {size!r}")

    # ------------------------------------------------------------------------------------------ given by a subclass

    def layers(self) -> Iterator[LayerSize]:
        """All linear layers in order of application, each with its structure."""
        raise NotImplementedError

    def norms(self) -> Iterator[tuple[int, int]]:
        """(features, vectors per example) of every layer norm."""
        raise NotImplementedError

    @property
    def attention_macs(self) -> int:
        """MACs of queries times keys and of weights times values, per example; the mask saves none."""
        return 0

    @property
    def other_params(self) -> int:
        """Parameters that belong to no linear layer and no norm, such as embeddings."""
        return 0

    @property
    def other_activations(self) -> int:
        """Numbers per example that activations and attention keep beside the inputs of linear layers and norms."""
        raise NotImplementedError

    @property
    def input_layers(self) -> tuple[str, ...]:
        """Names of the layers whose learning rate the paper multiplies by a tenth: the input layer of MLPs."""
        return ()

    @property
    def width_unit(self) -> int:
        """The number that divides every width that the model can have."""
        return 1

    def _module(self, generator: torch.Generator | None) -> nn.Module:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- counts

    @property
    def linear_macs(self) -> int:
        """MACs per example of all linear layers."""
        return sum(layer.uses * layer.cost.macs for layer in self.layers())

    @property
    def head_macs(self) -> int:
        """MACs per example of the layer that makes the outputs."""
        return sum(layer.uses * layer.cost.macs for layer in self.layers() if layer.name == "head")

    @property
    def macs(self) -> int:
        """MACs per example: all linear layers, and the products of attention."""
        return self.linear_macs + self.attention_macs

    @property
    def macs_with_norms(self) -> int:
        """MACs as the figures of the paper count them: `macs`, and five per element of every layer norm (fvcore)."""
        return self.macs + NORM_MACS * sum(features * uses for features, uses in self.norms())

    @property
    def num_params(self) -> int:
        """Parameters of the weights of all linear layers: without biases, gains, norms and embeddings."""
        return sum(layer.cost.num_params for layer in self.layers())

    @property
    def all_params(self) -> int:
        """All parameters of the module."""
        norms = sum(features for features, _ in self.norms()) * (2 if self.norm_bias else 1)
        return sum(layer.all_params for layer in self.layers()) + norms + self.other_params

    @property
    def activations(self) -> int:
        """Numbers per example that a backward pass keeps, in training without recomputation.

        Counted are the inputs of every factor of every linear layer (the input of the layer, with its padding, and the
        intermediates between factors), of every norm and of every GELU; and queries, keys and values as attention takes
        them (its output is the input of the layer after it).  Numbers that two of them share are counted once.  Not
        counted: token ids, means and deviations of norms, sums of attention weights, logits.
        """
        kept = sum(layer.uses * (sum(layer.cost.widths[not layer.new_input :])) for layer in self.layers())
        return kept + sum(features * uses for features, uses in self.norms()) + self.other_activations

    # -------------------------------------------------------------------------------------------------------- models

    def base(self, width: int = 64) -> Self:
        """The dense model of a base width, relative to which muP scales learning rates."""
        return replace(self, structure="dense", width=width, weight_norm=False)

    def build(self, generator: torch.Generator | None = None) -> nn.Module:
        """The torch module, initialised by muP.

        Within ``torch.device("meta")`` nothing is allocated, which is enough for the base of `param_groups`.

        Args:
            generator: Source of the random numbers; torch's global one by default.

        Raises:
            StructureError: A structure is unknown or cannot have a size.
        """
        return self._module(generator)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; ``type(model)(**data)`` is the model again."""
        return asdict(self)

    # --------------------------------------------------------------------------------------------------- for subclasses

    def _layer(
        self,
        part: str,
        name: str,
        in_features: int,
        out_features: int,
        *,
        uses: int = 1,
        zero_init: bool = False,
        bias: bool | None = None,
        gain: bool = True,
        new_input: bool = True,
    ) -> LayerSize:
        """A layer of one part of the model, with the structure that this part has."""
        spec = family(self.structure)
        structured = part in WHERE[self.where] and not (part == "input" and spec.name == "low_rank")
        norm: bool | Literal["cap"] = False
        if self.weight_norm and structured and spec.name != "dense":
            norm = True if gain else "cap"
        text = self.structure if structured else "dense"
        has_bias = self.bias if bias is None else bias
        return LayerSize(name, text, in_features, out_features, uses, zero_init, has_bias, norm, new_input)

    def _ffn(self, prefix: str, uses: int = 1) -> Iterator[LayerSize]:
        """The two layers of a feed-forward network."""
        wide = self.expansion * self.width
        yield self._layer("ffn", f"{prefix}.up", self.width, wide, uses=uses)
        yield self._layer("ffn", f"{prefix}.down", wide, self.width, uses=uses, zero_init=True)
