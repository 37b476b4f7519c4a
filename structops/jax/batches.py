"""How a batch of any kind is given to a model, and models as functions; the twin of `structops.torch.batches`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from flax import nnx

from structops.conversion.batches import Batches
from structops.errors import StructureError

Forward = Callable[[Any, Any], Any]
BATCHES = Batches((jax.Array, np.ndarray), "an array", "a list")
call, mask_of, checked, again = BATCHES.call, BATCHES.mask_of, BATCHES.checked, BATCHES.again


@dataclass(frozen=True)
class Functional:
    """A model as a function of what is trained and of the rest, so that it goes through ``jax.jit``.

    Attributes:
        trained: Parameters.
        rest: Statistics, random states: what a call may change.
        build: The module of both.
        rest_of: The rest of a module after a call.
    """

    trained: Any
    rest: Any
    build: Callable[[Any, Any], Any]
    rest_of: Callable[[Any], Any]


def functional(model: Any, training: bool) -> Functional:
    """A module as a function, in training or evaluation mode; the module itself stays as it is.

    Raises:
        StructureError: It is no module of Flax NNX or Equinox.
    """
    if isinstance(model, nnx.Module):
        parts: Any = nnx.split(model, nnx.Param, ...)
        graph, trained, rest = parts

        def build(trained: Any, rest: Any) -> Any:
            module = nnx.merge(graph, trained, rest, copy=True)  # variables of this trace
            module.train() if training else module.eval()
            return module

        return Functional(trained, rest, build, lambda module: nnx.state(module, nnx.Not(nnx.Param)))
    if isinstance(model, eqx.Module):
        trained, static = eqx.partition(eqx.nn.inference_mode(model, not training), eqx.is_inexact_array)
        return Functional(trained, (), lambda trained, _: eqx.combine(trained, static), lambda _: ())
    raise StructureError(f"expected a module of Flax NNX or Equinox, got {type(model).__name__}")
