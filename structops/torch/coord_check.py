"""How far every layer moves its features within a few steps, and how that changes with width.

A parametrisation transfers if a layer's change follows no power of width.  The check trains small models of growing
width, measures changes on a batch that stays the same, fits the power, and says which layer is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structops.errors import StructureError
from structops.mup import Rule, Weight, init_std
from structops.mup.rules import as_rule
from structops.torch.coord_report import TOLERANCE, CoordReport, Forecast, Record
from structops.torch.weights import described, layers

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


# ------------------------------------------------------------------------------------------------------------ measuring


def coord_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    make_optimizer: Callable[[nn.Module], Optimizers],
    steps: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rule: str | Rule = "adam",
    probe: Any = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], Any] | None = None,
) -> CoordReport:
    """Train models of growing width for a few steps and fit how the changes of their layers grow with it.

    Per layer and factor: the output at the start, the change of the features on a batch that stays the same, the change
    that the own weight makes of the same input, and spectral norms.  For each, the power of width with a 95 % band.

    Args:
        build: The model of a width; its random numbers are torch's global ones.
        widths: At least two, ascending.
        batches: Pairs of inputs and targets, used in turn.
        loss: Loss of outputs and targets.
        make_optimizer: The optimiser of a model, or several; their learning rates give the predicted powers.
        steps: Optimiser steps before the measurement.
        seeds: Seeds of the initial values.
        rule: The rule that a correct learning rate follows; predictions compare the rates in use with it.  SGD is
            compared with the rule that counts blocks.
        probe: The inputs on which changes are measured; those of the first batch if not given.
        tolerance: The power of width from which a layer drifts.
        progress: Called after each model with its width and seed.

    Raises:
        StructureError: There are fewer than two widths, no batch, no seed, no step, or no rule for the optimiser.

    References:
        The feature-learning check of arXiv 2406.06248, section 3.3.

    Example:
        >>> from structops.torch import StructuredLinear, param_groups
        >>> batch = torch.randn(8, 4), torch.randn(8, 2)
        >>> def build(width):
        ...     hidden = StructuredLinear(width, width, "btt")
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(width, 2))
        >>> def adam(model):
        ...     return torch.optim.Adam(param_groups(model))
        >>> report = coord_check(build, (16, 64), [batch], nn.functional.mse_loss, adam, seeds=(0,))
        >>> [row.layer for row in report if not row.factor]
        ['0', '2', '4']
    """
    pairs = list(batches)
    if len(set(widths)) < 2 or not pairs or not seeds or steps < 1:
        raise StructureError("coord_check needs two widths, a batch, a seed and a step")
    records: list[Record] = []
    forecasts: list[Forecast] = []
    for width in sorted(set(widths)):
        for seed in seeds:
            measured, said = measure(build, width, seed, pairs, loss, make_optimizer, steps, rule, probe)
            records += measured
            forecasts += said if seed == seeds[0] else []
            if progress:
                progress(width, seed)
    return CoordReport(tuple(records), tuple(forecasts), steps, tolerance)


def measure(
    build: Callable[[int], nn.Module],
    width: int,
    seed: int,
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    make_optimizer: Callable[[nn.Module], Optimizers],
    steps: int,
    rule: str | Rule = "adam",
    probe: Any = None,
) -> tuple[list[Record], list[Forecast]]:
    """Train one model and measure its layers; see `coord_check`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(width)
        made = make_optimizer(model)
        optimizers = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        rates = {
            id(p): float(g["lr"]) for o in optimizers for g in o.param_groups for p in g["params"] if p.requires_grad
        }
        probe = batches[0][0] if probe is None else probe
        layers = _layers(model)
        old = {id(p): p.detach().clone() for layer in layers for _, p in layer.weights}
        before = _calls(model, layers, probe)
        for step in range(steps):
            x, y = batches[step % len(batches)]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
        after = _calls(model, layers, probe)
        records = [
            record
            for layer in layers
            if layer.name in after and layer.name in before
            for record in _records(layer, before[layer.name], after[layer.name], old, width, seed)
        ]
        return records, list(_forecasts(layers, width, rates, rule))


@dataclass(frozen=True)
class _Layer:
    """A module that owns weights, and these."""

    name: str
    module: nn.Module
    weights: list[tuple[Weight, nn.Parameter]]


@dataclass(frozen=True)
class _Call:
    """A call of a module: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _layers(model: nn.Module) -> list[_Layer]:
    """The modules that own matrices, in the order of the model."""
    modules = dict(layers(model))
    owned: dict[str, list[tuple[Weight, nn.Parameter]]] = {}
    for weight, parameter in described(model):
        if weight.is_matrix and weight.layer in modules:
            owned.setdefault(weight.layer, []).append((weight, parameter))
    if not owned:
        raise StructureError("coord_check found no layer with a weight matrix in the model")
    return [_Layer(name, modules[name], found) for name, found in owned.items()]


@torch.no_grad()
def _calls(model: nn.Module, layers: Sequence[_Layer], probe: Any) -> dict[str, list[_Call]]:
    """What goes in and out of every layer for the fixed batch, without dropout; a layer may be called several times."""
    calls: dict[str, list[_Call]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                calls.setdefault(name, []).append(_Call(args, kwargs, output.detach().clone()))

        return hook

    training = model.training
    handles = [layer.module.register_forward_hook(watch(layer.name), with_kwargs=True) for layer in layers]
    try:
        model.eval()
        model(probe)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def _records(
    layer: _Layer, before: list[_Call], after: list[_Call], old: dict[int, Tensor], width: int, seed: int
) -> Iterator[Record]:
    start, output = _rms([call.output for call in before]), _rms([call.output for call in after])
    moved = _rms([b.output - a.output for a, b in zip(before, after, strict=True)])
    own = _own(layer, layer.weights, after, old)
    yield Record(width, seed, layer.name, "", start, output, moved, own)
    for weight, parameter in layer.weights:
        alone = own if len(layer.weights) == 1 else _own(layer, [(weight, parameter)], after, old)
        now, change = _norms(weight, parameter, parameter - old[id(parameter)])
        yield Record(width, seed, layer.name, weight.name, start, output, moved, alone, now, change)


def _own(
    layer: _Layer, weights: Sequence[tuple[Weight, nn.Parameter]], calls: list[_Call], old: dict[int, Tensor]
) -> float:
    """Change of the output, for the same input, that is due to the given weights."""
    names = {id(parameter): name for name, parameter in layer.module.named_parameters()}
    swapped = {names[id(parameter)]: old[id(parameter)] for _, parameter in weights}
    return _rms(
        [call.output - torch.func.functional_call(layer.module, swapped, call.args, call.kwargs) for call in calls]
    )


def _rms(values: Sequence[Tensor]) -> float:
    """Root mean square over all entries of some tensors, computed in double precision."""
    total = sum(float(value.double().square().sum()) for value in values)
    return math.sqrt(total / max(1, sum(value.numel() for value in values)))


def _norms(weight: Weight, *tensors: Tensor) -> Iterator[float]:
    """Spectral norms of blocks relative to sqrt(fan-out / fan-in), averaged over blocks."""
    factor = weight.factor
    target = math.sqrt(factor.fan_out / factor.fan_in)
    for tensor in tensors:
        yield float(spectral_norms(tensor.detach().reshape(-1, *tensor.shape[-2:])).mean()) / target


def spectral_norms(blocks: Tensor, iterations: int = 30) -> Tensor:
    """Largest singular value of every matrix of a stack, by power iteration from a fixed start.

    Args:
        blocks: Shape (blocks, rows, columns).
        iterations: Steps; the result is never too large, and within about a percent for random matrices.

    Returns:
        Shape (blocks,); 0 for a matrix of zeros.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(blocks.shape[0], blocks.shape[2], 1, generator=generator).to(blocks)
    # Entries of at most one: squares of tiny changes do not vanish, and those of diverged ones do not overflow.
    largest = blocks.abs().amax(dim=(1, 2)).clamp_min(torch.finfo(blocks.dtype).tiny)
    blocks = blocks / largest[:, None, None]
    sigma = torch.zeros_like(largest)
    for _ in range(iterations):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
        u = blocks @ v
        sigma = u.norm(dim=(1, 2))
        v = blocks.mT @ u
    return sigma * largest


def _forecasts(layers: Sequence[_Layer], width: int, rates: dict[int, float], rule: str | Rule) -> Iterator[Forecast]:
    """The size of changes from the learning rates in use, relative to what the rule asks for."""
    given = as_rule(rule)
    for layer in layers:
        total, start = 0.0, 1.0
        rows = []
        for weight, parameter in layer.weights:
            beside = given.family.matrices_only and weight.role != "hidden"
            # The true dependence on blocks counts, whichever rule was used.
            true = Rule("adam" if beside else given.optimizer, block_count=True, share_exponent=given.share_exponent)
            own = rates.get(id(parameter), 0.0) / float(true.scale(weight.factor))
            std = 0.0 if weight.zero else init_std(weight.factor)
            gain = std * math.sqrt(weight.factor.fan_in)
            # While its last factor is near zero, the others change nothing.
            total = own if weight.zero else total + own
            start *= gain
            rows.append(Forecast(width, layer.name, weight.name, weight.role, weight.structure or "plain", gain, own))
        yield Forecast(width, layer.name, "", rows[0].role, rows[0].structure, start, total)
        yield from rows
