"""Structure one layer after another, each made to answer as the dense one did before the layers in front changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structops._progress import track
from structops.conversion import choose
from structops.conversion.selection import Select, Spec
from structops.errors import StructureError
from structops.projection import Moments
from structops.spec import Structure
from structops.torch.batches import (
    Forward,
    call,
    checked,
    device_of,
    given,
    hooked,
    mask_of,
    moved,
    running,
    token_weights,
)
from structops.torch.calibration import calibrate
from structops.torch.convert import structurize
from structops.torch.linears import dense_weight, linear_layers


def compress(
    model: nn.Module,
    structure: Spec | Mapping[Any, Any] | None,
    batches: Iterable[Any],
    select: Select = None,
    *,
    damping: float = 1e-2,
    max_batches: int | None = None,
    forward: Forward | None = None,
    refine: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    r"""`calibrate` and `structurize` one layer after another, so that each makes up for what those before it lost.

    **Definition.** With x the input of a layer in the dense model and \(x'\) the one that it gets from the structured
    layers before it, A is the member nearest in \(E\|W x - A x'\|^2 + \lambda \|W - A\|_F^2\): least squares give the
    best weight of any kind, and the projection the member next to it.  Means are left to the bias, where there is one.
    Layers that share an input are done together.

    Args:
        model: Any module.
        structure: As for `structops.torch.structurize`.
        batches: As for `calibrate`; they are kept in memory, since they are gone through once for every layer.
        select: As for `structurize`.
        damping: \(\lambda\) in units of the mean variance of an input: it decides where the data say nothing.
        max_batches: How many to take.
        forward: As for `calibrate`.
        refine: Sweeps of the projection; see `structops.projection.fit`.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        A structured copy.  The errors that `survey` shows are those of the projection alone.

    Raises:
        StructureError: As for `calibrate` and `structurize`; a layer gets other vectors in the structured model, as
            experts may that a router chooses; or ``damping`` is negative.

    **Warnings.** As for `calibrate`; layers that no vector reached stay dense.

    **Cost.** Two forward passes over the data for every different input, and a second copy of the model.  Moments take
    ``4 inputs^2`` numbers, for one layer at a time.

    **Numerics.** Moments in float32, least squares in float64.

    **References.** Li et al., "GPTAQ" (arXiv 2504.02692), calibrate against the dense outputs for quantisation.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> small = compress(model, "low_rank(rank=2)", [torch.randn(64, 8)])
        >>> [type(layer).__name__ for layer in small]
        ['StructuredLinear', 'GELU', 'StructuredLinear']
    """
    if not damping >= 0:
        raise StructureError(f"compress: damping must be at least 0, got {damping!r}")
    specs = {c.layer.name: c.structure for c in choose(linear_layers(model), structure, select) if c.structure}
    data = list(islice(checked(batches), max_batches))
    groups = calibrate(model, data, lambda name, layer: name in specs, forward=forward, progress=False).groups()
    made, dense = copy.deepcopy(model), _modules(model)
    for group in track(groups, "compressing", shown=progress):
        modules = _modules(made)
        both = _both((model, dense[group[0]]), (made, modules[group[0]]), data, forward or call, group[0])
        own, floor = _damped(both, damping)
        for name in group:
            _aim(modules[name], both, own, floor)
        chosen = {name: specs[name] for name in group}
        options: dict[str, Any] = {"calibration": dict.fromkeys(group, own), "refine": refine, "progress": False}
        made = structurize(made, None, partial(_chosen, chosen), "" not in specs, **options)
    return made


def _chosen(specs: Mapping[str, Structure], name: str, layer: nn.Module) -> Structure | None:
    return specs.get(name)


def _modules(model: nn.Module) -> dict[str, Any]:
    return {layer.name: layer.module for layer in linear_layers(model)}


def _both(one: tuple[Any, Any], other: tuple[Any, Any], data: list[Any], run: Forward, name: str) -> Moments:
    """Moments of the inputs of a layer in two models, one behind the other.

    Raises:
        StructureError: The layers get different numbers of vectors.
    """
    both = None
    for batch in data:
        batch = moved(batch, device_of(one[0]))
        pairs = [_inputs(model, layer, batch, run) for model, layer in (one, other)]
        if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
            raise StructureError(
                f"compress: {name or 'the model'} gets other vectors after the layers before it were structured, as "
                f"experts do that a router chooses; use structurize(..., calibration=calibrate(...)) for such layers"
            )
        for x, new in zip(*pairs, strict=True):
            if both is None:
                both = Moments.zeros(2 * int(x.shape[-1]), like=x)
            both.add(torch.cat([x, new], -1), token_weights(mask_of(batch), x))
    assert both is not None  # the layer was reached before
    return both


def _inputs(model: nn.Module, layer: nn.Module, batch: Any, run: Forward) -> list[Tensor]:
    """What a layer of a model is given in a batch; copies, which later changes in place do not touch."""
    found: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(given(args, kwargs).clone())

    with running(model), hooked(layer, hook):
        run(model, batch)
    return found


def _damped(both: Moments, damping: float) -> tuple[Moments, Tensor]:
    """The moments of the second inputs with a floor under their variances, and the floor."""
    n, count = both.features // 2, both.count
    arrays = {key: array[..., n:].clone() for key, array in both.arrays().items() if key != "count"}
    spread = arrays["spread"][n:]
    floor = damping * spread.diagonal().real.mean()
    spread.diagonal().add_(floor)
    return Moments(count, arrays["mean"], spread), floor / count.to(floor.dtype)


@torch.no_grad()
def _aim(layer: Any, both: Moments, new: Moments, floor: Tensor) -> None:
    """Let a dense layer answer to the second inputs as it did to the first, as far as it can."""
    n, W = both.features // 2, dense_weight(layer)
    wide = torch.promote_types(both.mean.dtype, torch.float64)
    old, target = (both.covariance, new.covariance) if layer.bias is None else (both.centred, new.centred)
    mean, weight = both.mean.to(wide), W.to(wide)
    aimed = torch.linalg.solve(target.to(wide), weight @ old[:n, n:].to(wide) + floor * weight, left=False)
    if layer.bias is not None:
        layer.bias += (weight @ mean[:n] - aimed @ mean[n:]).to(layer.bias.dtype)
    W.copy_(aimed)
