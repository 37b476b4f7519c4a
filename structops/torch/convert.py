"""Give the linear layers of any model a structure, and take it away again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from structops import projection
from structops._progress import track
from structops.conversion import Choice, Projection, choose, row_of
from structops.conversion.options import Covariances, Init, Zero, check_calibration, check_init, chosen_of, zero_layers
from structops.conversion.selection import Names, Select, Spec, named, quiet
from structops.errors import StructureError
from structops.normalise import keeping_gains
from structops.projection.fit import fit_factors
from structops.torch.layer import StructuredLinear
from structops.torch.linears import CONV1D, dense_weight, linear_layers, machine_of, survey
from structops.torch.weights import layers


def structurize(
    model: nn.Module,
    structure: Spec | Mapping[Any, Any] | None,
    select: Select = None,
    inplace: bool = False,
    *,
    init: Init = "project",
    calibration: Covariances | None = None,
    zero: Zero = False,
    weight_norm: bool = False,
    recompute: bool = False,
    refine: int | None = None,
    generator: torch.Generator | None = None,
    dry_run: bool = False,
    tokens: int = 2048,
    progress: bool | None = None,
) -> Any:
    r"""A model whose linear layers have a structure: ``nn.Linear``, and the ``Conv1D`` of transformers.

    By default every linear layer is converted but the output head, routers of experts, layers whose weight is tied to
    another one, and those that cannot be; embeddings, kernels, the fused projections of ``nn.MultiheadAttention`` and
    parameters of experts are no linear layers.  ``print(structurize(..., dry_run=True))`` lists all of them.

    A layer keeps its bias (the same parameter), hooks, dtype, device, training mode, ``requires_grad`` and attributes.
    One that has several places is converted once and has all of them.  If one cannot be converted the model is left as
    it was.

    Args:
        model: Any module, also a single linear layer, and on the meta device.
        structure: A spec or its string form, or rules: ``{"*.mlp.*": "btt(rank=4)", "*.attn.*": "low_rank(rank=8)"}``.
        select: None, a glob, a compiled regular expression, a function or rules; see `structops.conversion.choose`.
        inplace: Whether to change ``model``; otherwise a copy is changed, which never holds the dense weights that are
            replaced.
        init: ``"project"``: the nearest member to the present weight (`structops.projection.fit`); ``"mup"``: drawn
            anew by the paper's rule, bias 0.
        calibration: Moments of the inputs of every layer by name, from `structops.torch.calibrate`, or second moments
            \(E[x x^T]\) as arrays.  The projection is then the nearest in \(E\|(W - A) x\|^2\); with `Moments` and a
            bias in \(E\|(W - A)(x - \mu)\|^2\), and the bias takes \((W - A)\mu\), unless it is tied to another.
        zero: With ``init="mup"``, layers whose last factor starts at zero: globs, or True for the ends of residual
            branches and the readout, found by the names that common code bases give them (``structops.mup.selection``).
        weight_norm: As for `StructuredLinear`; projected factors keep their size by their gains.
        recompute: As for `StructuredLinear`.
        refine: Sweeps of the projection; see `structops.projection.fit`.
        generator: Source of the random numbers of ``init="mup"``.
        dry_run: Whether to return the table of what would be done instead of doing it.
        tokens: Vectors at once for which the table predicts times.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        The model, or with ``dry_run`` a `structops.conversion.Conversion`, which prints as a table.

    Raises:
        StructureError: A structure is unknown or cannot have the sizes of its layer (use ``pad=True`` or other
            blocks), a pattern fits nothing, a selected layer cannot be converted (its weight is tied, parametrised,
            sharded, quantised, or its class is a subclass that may compute something else), ``calibration`` lacks a
            layer, ``zero`` with ``init="project"``, or the model is wrapped in DDP.
        EntryError: A weight that is projected is not finite.

    Warnings:
        `StructureWarning`: What a structure says of its size, once for all layers alike; or no layer was converted.

    Cost:
        With ``init="project"`` that of one projection a layer.  Memory: the new factors, and what one projection takes.

    Numerics:
        Projection of 16-bit weights runs in float32 and is rounded back; see `structops.projection.fit`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        >>> small = structurize(model, "low_rank(rank=4)")
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in small.parameters())
        (2128, 720)
    """
    check_init(init, zero, calibration)
    if inplace and not dry_run and type(model) in (nn.Linear, *CONV1D()):
        raise StructureError("a single layer cannot be replaced in place; take what structurize returns")
    choices = choose(linear_layers(model), structure, select)
    if dry_run:
        rows = [row_of(choice, tokens, machine_of(model)) for choice in choices]
        return survey(model, tokens).with_rows(rows)
    _check_wrappers(model)
    chosen = chosen_of(choices)
    check_calibration(calibration, chosen)
    zeros = zero_layers(chosen, zero)
    if not inplace:
        model, chosen = _copied(model, chosen)
    shared = _tied(model)
    replaced: dict[int, nn.Module] = {}
    biases: list[tuple[Any, Tensor | None]] = []
    for choice in track(chosen, "projecting" if init == "project" else "structuring", shown=progress):
        name, layer = choice.layer.name, choice.layer.module
        new = shell(choice, zero_init=name in zeros, weight_norm=weight_norm, recompute=recompute)
        bias = layer.bias
        if not layer.weight.is_meta:
            new.to_empty(device=layer.weight.device)
            if init == "mup":
                new.reset_parameters(generator)
                biases.append((bias, None))
            else:
                inputs = None if calibration is None else calibration[name]
                shift = _project(new, layer, inputs, refine, may_shift=id(bias) not in shared)
                biases.append((bias, shift))
        for parameter in new.weights():
            parameter.requires_grad_(layer.weight.requires_grad)
        new.bias = bias
        replaced[id(layer)] = new
    with torch.no_grad():  # only now, when nothing can fail any more
        for bias, shift in biases:
            if bias is not None and init == "mup":
                bias.zero_()
            elif shift is not None:
                bias += shift.to(bias.dtype)
    return swapped(model, replaced)


def densify(model: nn.Module, select: Names = None, inplace: bool = False) -> nn.Module:
    """The plain model: every `StructuredLinear` becomes the linear layer that it replaces, with the same function.

    Args:
        model: Any module, also a single layer.
        select: Globs, regular expressions, or a function of name and layer; all structured layers by default.
        inplace: Whether to change ``model`` rather than a copy.

    Returns:
        The model, whose state dict loads without structops.

    Raises:
        StructureError: A pattern fits no structured layer, a single layer is to be replaced in place, or the model is
            wrapped in DDP.

    Cost:
        ``out_features * in_features`` numbers a layer, which is the point.

    Example:
        >>> model = structurize(nn.Sequential(nn.Linear(16, 64), nn.GELU()), "btt")
        >>> densify(model)
        Sequential(
          (0): Linear(in_features=16, out_features=64, bias=True)
          (1): GELU(approximate='none')
        )
    """
    if inplace and isinstance(model, StructuredLinear):
        raise StructureError("a single layer cannot be replaced in place; take what densify returns")
    _check_wrappers(model)
    if not inplace:
        model = copy.deepcopy(model)
    found = {name: layer for name, layer in layers(model) if isinstance(layer, StructuredLinear)}
    replaced: dict[int, nn.Module] = {}
    for name in named("select", select, found):
        layer = found[name]
        dense: Any = layer.merge() if layer.kind == "Linear" else _conv1d(layer)
        carry_over(layer, dense)
        dense.weight.requires_grad_(layer.factors[0].requires_grad)
        dense.bias = layer.bias
        replaced[id(layer)] = dense
    return swapped(model, replaced)


def _conv1d(layer: StructuredLinear) -> nn.Module:
    """The dense layer of transformers that stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    dense = layer.merge()
    conv = Conv1D(layer.out_features, layer.in_features).to(dense.weight.device, dense.weight.dtype)
    conv.weight = nn.Parameter(dense.weight.detach().T.contiguous())
    return conv.train(layer.training)


# ------------------------------------------------------------------------------------------------------ one layer


def shell(choice: Choice, **options: Any) -> StructuredLinear:
    """The structured layer for a dense one, on the meta device and without its bias, with all else that it has."""
    layer = choice.layer
    sizes = (layer.in_features, layer.out_features)
    with quiet():
        new = StructuredLinear(*sizes, choice.structure, False, "meta", layer.module.weight.dtype, **options)  # type: ignore
    carry_over(layer.module, new)
    new.kind = layer.kind
    return new


def _project(
    new: StructuredLinear, layer: nn.Module, inputs: Any, refine: int | None, may_shift: bool = True
) -> Tensor | None:
    """Fill the factors with the projection of the weight of a dense layer; what the bias is to be shifted by."""
    W = dense_weight(layer).detach()
    centred = not isinstance(inputs, Tensor | None) and layer.bias is not None and may_shift
    covariance = inputs.centred if centred else inputs
    with quiet():
        plan, found, error = fit_factors(W, new.structure, covariance=covariance, refine=refine)
    with torch.no_grad():
        for parameter, factor in zip(new.factors, found.factors, strict=True):
            parameter.copy_(factor)
        if new.gains is not None:
            new.gains.copy_(keeping_gains(found.factors, new.caps))
    new.projection = Projection(float(error), found.optimality)
    return projection.bias_shift(W, plan.operator(found.factors), inputs.mean) if centred else None


_PLAIN = {*vars(nn.Module()), "in_features", "out_features", "nx", "nf", *vars(StructuredLinear(1, 1, "dense"))}
_PLAIN |= {"_compiled_call_impl"}  # what Module.compile made computes the layer that is replaced; copies drop it too
_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks (with their handles), training mode and attributes that others set."""
    for name in _HOOKS:
        if name in vars(old):
            object.__setattr__(new, name, vars(old)[name])
    new.train(old.training)
    for name, value in vars(old).items():
        if name not in _PLAIN:
            setattr(new, name, value)


# ------------------------------------------------------------------------------------------------------ the model


def _tied(model: nn.Module) -> set[int]:
    """The parameters that several modules have, or one under several names."""
    held = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {key for key, count in Counter(held).items() if count > 1}


def _check_wrappers(model: nn.Module) -> None:
    """Nothing holds on to parameters that are replaced.

    Raises:
        StructureError: DDP does, and would not sum the gradients of others.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise StructureError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, which would not see new parameters: "
                f"convert its .module, then wrap that again"
            )


def _copied(model: nn.Module, chosen: Sequence[Choice]) -> tuple[nn.Module, list[Choice]]:
    """A copy that shares the weights that will be replaced, and the choices for its layers."""
    memo: dict[int, Any] = {id(choice.layer.module.weight): choice.layer.module.weight for choice in chosen}
    made = copy.deepcopy(model, memo)
    return made, [replace(c, layer=replace(c.layer, module=memo[id(c.layer.module)])) for c in chosen]


def swapped(model: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """The model with layers replaced wherever they are held."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in replaced:
                parent._modules[key] = replaced[id(child)]
                if type(parent).__name__ == "OptimizedModule":  # its forward is bound to the module it was made of
                    parent._initialize()  # type: ignore[operator]
    return replaced.get(id(model), model)
