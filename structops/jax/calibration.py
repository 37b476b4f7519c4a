"""Moments of the inputs of the linear layers of a JAX model: what a weighted projection needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.experimental import io_callback

from structops._progress import track
from structops.conversion import choose
from structops.conversion.calibration import Calibration, finished
from structops.conversion.selection import Select
from structops.errors import StructureError
from structops.jax.batches import Forward, call, checked, mask_of
from structops.jax.convert import swapped
from structops.jax.linears import Site, sites
from structops.jax.weights import Specs
from structops.projection import Moments

Weights = Callable[[str, jax.Array, Any], Any]


def calibrate(
    model: Any,
    batches: Iterable[Any],
    select: Select = None,
    *,
    max_batches: int | None = None,
    weights: Weights | None = None,
    forward: Forward | None = None,
    specs: Specs | None = None,
    progress: bool | None = None,
) -> Calibration:
    r"""Moments of the inputs of linear layers over data, for ``structurize(model, ..., calibration=...)``.

    The model runs in evaluation mode, on a copy whose selected layers note their inputs, also inside of ``jax.jit``,
    ``vmap`` and ``scan``.

    Args:
        model: A module of Flax NNX or Equinox; or the parameters of a model of Flax Linen, with ``forward``.
        batches: Any iterable.  A batch is an array; a tuple or list, of which the first element is the input; a mapping
            of keyword arguments; or ``(args, kwargs)``.
        select: The layers, as for `structops.jax.structurize`, of which rules may be taken as they are.  By default
            those that it converts by default, but stacks of layers.
        max_batches: Where to stop.
        weights: How much every vector counts, a function of the layer's name, its input and the batch, of shape
            ``input.shape[:-1]``; None for all alike.  By default a batch's two-dimensional ``attention_mask`` leaves
            out padding, for inputs whose axes before the last are those of the mask.
        forward: ``forward(model, batch)`` runs the model on what is not a batch of these kinds, or differently:
            ``lambda model, batch: jax.vmap(model)(batch)`` for most models of Equinox.
        specs: Of a plain tree; see `structops.jax.structurize`.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        A `Calibration`: a mapping from names to `structops.projection.Moments`, with ``save`` and ``load``.  Layers
        that get the same input have moments of their own all the same: under ``jit`` nothing tells that they do.

    Raises:
        StructureError: No layer is selected, a selected one is a stack of layers, there is no batch, a batch is of
            another kind, no vector came to any layer, or as in `structops.conversion.choose`.
        EntryError: Inputs of a layer are not finite.

    **Warnings.** `StructureWarning` names layers that no vector reached; they are left out, and `structurize` refuses
    them.

    **Cost.** The forward passes, and ``inputs^2`` MACs and numbers of memory a vector and a layer.  The inputs of all
    selected layers for one batch are held at once.

    **Numerics.** Sums in float32 also for inputs of 16 bits; see `structops.projection.Moments`.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs))
        >>> found = calibrate(model, [jax.random.normal(jax.random.key(1), (32, 8))])
        >>> {name: moments.features for name, moments in found.items()}
        {'layers.0': 8, 'layers.2': 16}
        >>> from structops.jax import structurize
        >>> small = structurize(model, "low_rank(rank=2)", calibration=found)
    """
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
    found = {site.layer.name: site for site in sites(model, specs)}
    layers = [replace(site.layer, obstacle=site.layer.obstacle or _is_stack(site)) for site in found.values()]
    names = [choice.layer.name for choice in choose(layers, "dense", select) if choice.structure is not None]
    if not names:
        raise StructureError("calibrate: no layer is selected; structurize(..., dry_run=True) lists them and says why")
    notes: dict[str, list[Any]] = {name: [] for name in names}
    moments: dict[str, Moments] = {}
    context: Any = nullcontext()
    if isinstance(model, nnx.Module | eqx.Module):
        model = swapped(model, {name: _recorder(found[name], notes[name]) for name in names})
        model = eqx.nn.inference_mode(model) if isinstance(model, eqx.Module) else model
    elif forward is None:
        raise StructureError(
            "calibrate: parameters do not say how they are used; give forward=lambda params, batch: ..."
        )
    else:
        context = linen.intercept_methods(_linen_recorder(notes))
    run, count = forward or call, 0
    length = len(batches) if isinstance(batches, Sized) else None
    total = max_batches if length is None else min(length, max_batches or length)
    for batch in track(islice(checked(batches), max_batches), "calibrating", total, progress):
        with context:
            jax.block_until_ready(run(model, batch))
        jax.effects_barrier()
        for name, inputs in notes.items():
            for x in map(jnp.asarray, inputs):
                if name not in moments:
                    moments[name] = Moments.zeros(int(x.shape[-1]), like=x)
                moments[name].add(x, _weights_of(weights, name, x, batch))
            inputs.clear()
        count += 1
    return finished(moments, names, count)


def _is_stack(site: Site) -> str:
    return "it is a stack of layers: calibrate them one by one" if site.plan is None and site.stack else ""


def _weights_of(weights: Weights | None, name: str, x: jax.Array, batch: Any) -> Any:
    """How much the vectors of an input count; None for all alike."""
    if weights is not None:
        found = weights(name, x, batch)
        return None if found is None else jnp.asarray(found)
    mask = mask_of(batch)
    return None if mask is None or mask.shape != x.shape[:-1] else jnp.asarray(mask)


# ---------------------------------------------------------------------------------------------------- noting of inputs


def _tap(notes: list[Any]) -> Callable[[jax.Array], jax.Array]:
    """The identity, which notes what it gets; under ``vmap`` the whole batch at once."""

    @jax.custom_batching.custom_vmap
    def traced(x: jax.Array) -> jax.Array:
        # The callback only keeps the array: to compute in it could wait for the computation that called it.
        io_callback(notes.append, None, x)
        return x

    @traced.def_vmap
    def _(axis_size: int, in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        return traced(x), in_batched[0]

    def tap(x: jax.Array) -> jax.Array:
        if isinstance(x, jax.core.Tracer):
            return traced(x)
        notes.append(x)
        return x

    return tap


class _NnxRecorder(nnx.Module):
    """A layer that notes its inputs."""

    def __init__(self, layer: Any, notes: list[Any], features: int) -> None:
        self.layer, self.tap, self.features = layer, _tap(notes), features

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        own = self.layer.in_features
        rank = 1 if isinstance(own, int) else len(own)
        self.tap(x.reshape((*x.shape[: x.ndim - rank], self.features)))
        return self.layer(x, *args, **kwargs)


class _EquinoxRecorder(eqx.Module):
    """A layer that notes its inputs."""

    layer: eqx.nn.Linear
    tap: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.layer(self.tap(x), key=key)


def _recorder(site: Site, notes: list[Any]) -> Any:
    if isinstance(site.node, nnx.Module):
        return _NnxRecorder(site.node, notes, site.layer.in_features)
    return _EquinoxRecorder(site.node, _tap(notes))


def _linen_recorder(notes: dict[str, list[Any]]) -> Callable[..., Any]:
    """What ``flax.linen.intercept_methods`` takes to note the inputs of layers by name."""
    taps = {name: _tap(inputs) for name, inputs in notes.items()}

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        tap = taps.get(".".join(context.module.path))
        if tap is not None and isinstance(context.module, linen.Dense) and context.method_name == "__call__":
            tap(*args, **kwargs)
        return next_fun(*args, **kwargs)

    return intercept
