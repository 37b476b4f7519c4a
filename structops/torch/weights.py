"""The plan of a torch model: its weights as sizes, read off its layers, never off tensors.

Names and sizes come from the modules, so the plan is the same before and after ``torch.compile``, DDP, FSDP2,
``deepcopy``, a build on the meta device and a reload.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup import MupPlan, Rule, Weight, make_plan
from structops.mup.plan import ROLES
from structops.mup.rules import dense_factor
from structops.torch.layer import StructuredLinear

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
READOUTS = ("head", "lm_head", "classifier", "readout", "unembed", "fc_out", "output_layer")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def plan(
    model: nn.Module,
    optimizer: str | Rule = "adam",
    *,
    base: int | str | nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
) -> MupPlan:
    """Init, learning rate, weight decay and eps of every parameter of a model.

    Args:
        model: Any module, also a single layer, compiled, wrapped, sharded, or on the meta device.
        optimizer: A name of `structops.mup.FAMILY`, or a `Rule` with further choices.
        base: None: relative to the dense layers replaced; the fan-in at which the rate was tuned; ``"absolute"``; or
            the base model, which may be on the meta device.
        roles: Roles of parameters or layers by glob, where they do not follow: ``{"*.unembed": "readout"}``.

    Raises:
        StructureError: No rule for the optimiser, the base lacks a layer, a role is unknown, or ``model`` is no module.

    Example:
        >>> layer = StructuredLinear(1024, 1024, "btt")
        >>> plan(layer)["factors.0"].lr_scale
        16.0
    """
    reference: Any = list(weights(base, roles)) if isinstance(base, nn.Module) else base
    if not isinstance(reference, int | str | list | None):
        raise StructureError(f"base is None, a fan-in, 'absolute' or the base model, got {base!r}")
    return make_plan(list(weights(model, roles)), optimizer, reference)


def weights(model: nn.Module, roles: Mapping[str, str] | None = None) -> Iterator[Weight]:
    """Every parameter of a model as sizes, once, in the order of its layers.

    Raises:
        StructureError: ``model`` is no module, or a role is unknown.
    """
    for weight, _ in described(model, roles):
        yield weight


def described(model: nn.Module, roles: Mapping[str, str] | None = None) -> Iterator[tuple[Weight, nn.Parameter]]:
    """Every parameter as sizes, and the parameter; one that several layers share comes once, as tied.

    Raises:
        StructureError: ``model`` is no module, or a role is unknown.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"expected the module, whose layers say what each parameter is; got {type(model).__name__}"
        )
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    seen: set[int] = set()
    layers = [(clean(name), layer) for name, layer in model.named_modules()]
    # Structured layers first, so that those win where a parameter is shared; then the order of the model.
    found = []
    for name, layer in sorted(layers, key=lambda pair: not isinstance(pair[1], StructuredLinear)):
        for weight, parameter in _of_layer(name, layer):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((_with_role(weight, roles or {}, uses[id(parameter)] > 1), parameter))
    order = {id(parameter): k for k, parameter in enumerate(model.parameters())}
    yield from sorted(found, key=lambda pair: order[id(pair[1])])


def clean(name: str) -> str:
    """A name without the prefixes of ``torch.compile``, DDP, FSDP and activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _of_layer(name: str, layer: nn.Module) -> Iterator[tuple[Weight, nn.Parameter]]:
    """The parameters that a layer owns itself."""
    prefix = f"{name}." if name else ""
    last = name.rpartition(".")[2]
    matrix = "readout" if last in READOUTS else "hidden"
    if isinstance(layer, StructuredLinear):
        factors = layer.plan.factors
        for k, (factor, parameter) in enumerate(zip(factors, layer.factors, strict=True)):
            zero = layer.zero_init and k == len(factors) - 1
            sizes = (layer.in_features, layer.out_features, k, len(factors), str(layer.structure), zero)
            yield Weight(f"{prefix}factors.{k}", name, matrix, factor, *sizes), parameter
        if layer.bias is not None:
            yield _vector(prefix + "bias", name, layer.out_features), layer.bias
        return
    if isinstance(layer, nn.ParameterList):
        return  # of a structured layer, or of the layer that holds it
    for key, parameter in layer.named_parameters(recurse=False):
        full = prefix + key
        if isinstance(layer, nn.Linear) and key == "weight":
            n, m = layer.in_features, layer.out_features
            yield Weight(full, name, matrix, dense_factor(n, m), n, m), parameter
        elif type(layer).__name__ == "Conv1D" and key == "weight":  # of transformers: stored (in, out)
            n, m = parameter.shape
            yield Weight(full, name, matrix, dense_factor(n, m), n, m), parameter
        elif isinstance(layer, nn.modules.conv._ConvNd) and key == "weight":
            m, c = layer.out_channels, layer.in_channels // layer.groups
            n = c * int(parameter[0, 0].numel())
            yield Weight(full, name, matrix, Factor("kernel", (m, n), fan_in=n, fan_out=m), n, m), parameter
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and key == "weight":
            m = layer.embedding_dim
            yield Weight(full, name, "embedding", Factor("table", tuple(parameter.shape), 1, m), 1, m), parameter
        elif parameter.numel() == 1:
            yield Weight(full, name, "scalar", Factor(key, (1,), 1, 1), 1, 1), parameter
        elif parameter.ndim == 1 or isinstance(layer, NORMS):
            yield _vector(full, name, int(parameter.shape[-1])), parameter
        else:
            m, n = int(parameter.shape[-2]), int(parameter.shape[-1])
            blocks = int(parameter.numel()) // (m * n)
            factor = Factor(key, tuple(parameter.shape), fan_in=n, fan_out=m, blocks=blocks)
            yield Weight(full, name, "hidden", factor, n, m, known=False), parameter


def _vector(name: str, layer: str, size: int) -> Weight:
    return Weight(name, layer, "vector", Factor("vector", (size,), fan_in=1, fan_out=size), 1, size)


def _with_role(weight: Weight, roles: Mapping[str, str], tied: bool) -> Weight:
    """The weight with a role that was given for its name or its layer, and whether it is tied."""
    for pattern, role in roles.items():
        if role not in ROLES:
            raise StructureError(f"roles: expected one of {', '.join(ROLES)} for {pattern!r}, got {role!r}")
        if fnmatch.fnmatch(weight.name, pattern) or (weight.is_matrix and fnmatch.fnmatch(weight.layer, pattern)):
            weight = replace(weight, role=role, known=True)
    return replace(weight, tied=tied)
