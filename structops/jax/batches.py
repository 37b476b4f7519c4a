"""How a batch of any kind is given to a model, and models as functions; the twin of `structops.torch.batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from flax import nnx

from structops.errors import StructureError

Forward = Callable[[Any, Any], Any]
ARRAYS = (jax.Array, np.ndarray)


def call(model: Any, batch: Any) -> Any:
    """The output of a model for a batch.

    A mapping is given as keyword arguments, a pair of a tuple and a mapping as ``model(*args, **kwargs)``; of any other
    tuple or list the first element is the input and the others are labels; an array is the input.

    Raises:
        StructureError: The batch is of another kind.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if _is_call(batch):
        return model(*batch[0], **batch[1])
    if isinstance(batch, tuple | list) and batch:
        return call(model, batch[0])
    if isinstance(batch, ARRAYS):
        return model(batch)
    raise StructureError(
        f"a batch is an array, a tuple (x, labels), a mapping of keyword arguments, or (args, kwargs), got "
        f"{type(batch).__name__}; give forward=lambda model, batch: ... for anything else"
    )


def _is_call(batch: Any) -> bool:
    """Whether a batch is a pair (args, kwargs)."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return is_pair and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping)


def mask_of(batch: Any) -> Any:
    """The ``attention_mask`` of a batch of tokens, shape (sequences, length), if it has one."""
    if _is_call(batch):
        batch = batch[1]
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, ARRAYS) and mask.ndim == 2 else None


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """What was given as the batches, if it is several.

    Raises:
        StructureError: It is one batch, or nothing that can be gone through.
    """
    if isinstance(batches, (*ARRAYS, Mapping, str)) or not isinstance(batches, Iterable):
        raise StructureError(
            f"expected an iterable of batches, such as a list, got a {type(batches).__name__}; give [batch] for a "
            f"single one"
        )
    return batches


def again(data: Iterable[Any], steps: int) -> Iterator[Any]:
    """As many batches as there are steps; data are gone through as often as needed.

    Raises:
        StructureError: There is none, or an iterator ends early.
    """
    given = 0
    while given < steps:
        before = given
        for batch in data:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise StructureError(
                f"heal: there is no batch after {given} of {steps} steps; give data that can be gone through again, "
                f"such as a list"
            )


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
