"""The one place where a layer of a model is counted and built from its structure as text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from structops.errors import StructureWarning
from structops.spec import ChainPlan, structure

if TYPE_CHECKING:
    import torch
    from torch import nn


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


@lru_cache(maxsize=65536)
def cost(spec: str, in_features: int, out_features: int) -> Cost:
    """Parameters, MACs per vector and stored numbers per vector of a layer.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes.
    """
    with quiet():
        plan = structure(spec).plan(in_features, out_features)
    widths: tuple[int, ...] = (in_features,)
    if isinstance(plan, ChainPlan):
        widths = (plan.chain.padded_in, *plan.chain.intermediate_widths)
    return Cost(plan.num_params, plan.macs, widths, len(plan.factors))


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
    from structops.torch import StructuredLinear

    with quiet():
        return StructuredLinear(
            in_features,
            out_features,
            spec,
            bias=bias,
            zero_init=zero_init,
            weight_norm=weight_norm,
            generator=generator,
        )
