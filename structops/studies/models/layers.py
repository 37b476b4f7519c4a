"""The one place where a layer of a model is counted and built from its structure as text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from structops.errors import StructureWarning
from structops.spec import ChainPlan, Structure, structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from structops.routed import Routed


class Cost(NamedTuple):
    """What one linear layer costs, without its bias.

    Attributes:
        num_params: Parameters of all factors.
        macs: Multiply-accumulates per vector.
        widths: Numbers per vector that enter each factor, which the backward pass needs: the input, with its padding,
            and the intermediates between the factors.
        factors: Number of factors, each of which takes a gain under weight normalisation.
    """

    num_params: int
    macs: int
    widths: tuple[int, ...]
    factors: int


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings that a size does not suit a structure: the studies take all sizes on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StructureWarning)
        yield


def routed(spec: str) -> Routed | None:
    """The mixture of a text such as ``routed(structure=btt, experts=8, top_k=2)``; None for a structure."""
    if not spec.startswith("routed"):
        return None
    from structops.routed import Routed  # which imports the rules of muP and, with them, CoLA: seconds

    return Routed.parse(spec)


def family(spec: str) -> Structure:
    """The structure of a layer, or that of the experts of a mixture.

    Raises:
        StructureError: It is unknown.
    """
    mixture = routed(spec)
    return structure(mixture.structure if mixture else spec)


@lru_cache(maxsize=65536)
def cost(spec: str, in_features: int, out_features: int) -> Cost:
    """Parameters, MACs per vector and stored numbers per vector of a layer.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes.
    """
    with quiet():
        if mixture := routed(spec):
            return _mixture_cost(mixture, in_features, out_features)
        plan = structure(spec).plan(in_features, out_features)
    widths: tuple[int, ...] = (in_features,)
    if isinstance(plan, ChainPlan):
        widths = (plan.chain.padded_in, *plan.chain.intermediate_widths)
    return Cost(plan.num_params, plan.macs, widths, len(plan.factors))


def _mixture_cost(spec: Routed, in_features: int, out_features: int) -> Cost:
    """Of k experts and the gate; each expert that was chosen keeps its own numbers, and the gate its weights."""
    member = spec.member(in_features, out_features)
    inner = spec.top_k * sum((member.padded_in, *member.intermediate_widths)) + spec.experts
    counts = spec.num_params(in_features, out_features), spec.macs(in_features, out_features)
    return Cost(*counts, (in_features, inner), len(member.factors))


def linear(
    spec: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    zero_init: bool = False,
    weight_norm: bool | Literal["cap"] = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The torch layer, initialised by the rule of muP; arguments as those of `structops.torch.StructuredLinear`.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes.
    """
    from structops.torch import RoutedLinear, StructuredLinear

    how: dict[str, Any] = {
        "bias": bias,
        "zero_init": zero_init,
        "weight_norm": weight_norm,
        "generator": generator,
    }
    with quiet():
        if mixture := routed(spec):
            kind = (mixture.structure, mixture.experts, mixture.top_k)
            return RoutedLinear(in_features, out_features, *kind, **how)
        return StructuredLinear(in_features, out_features, spec, **how)
