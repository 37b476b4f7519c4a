"""The plan of a torch model: its weights as sizes, read off its layers.

Names and sizes come from the modules, and tensors carry no marks, so the plan is the same before and after
``torch.compile``, DDP, FSDP2, ``deepcopy``, a build on the meta device and a reload.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup import MupPlan, PlanRow, Rule, Weight, make_plan
from structops.mup.rules import dense_factor
from structops.mup.selection import READOUTS, with_roles, with_zeros
from structops.torch.layer import StructuredLinear

# Modules that hold another one, and the name under which they hold it.  Found by name: importing FSDP is slow.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Weights of attention and of recurrent layers, each stored (out, in) like that of a linear layer.  Projections that are
# fused into one array, such as those of query, key and value, count as one weight, as they would in an ``nn.Linear``.
LINEAR_LIKE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
KERNEL, TRANSPOSED = "kernel", "transposed"  # factors that are not stored as (blocks, out, in)


def plan(
    model: nn.Module,
    optimizer: str | Rule = "adam",
    *,
    base: int | str | nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
    zero: str | Sequence[str] = (),
) -> MupPlan:
    """Init, learning rate, weight decay and eps of every parameter of a model.

    Args:
        model: Any module, also a single layer, compiled, wrapped, sharded, or on the meta device.
        optimizer: A name of `structops.mup.FAMILY`, or a `Rule` with further choices.
        base: None: relative to the dense layers replaced; the fan-in at which the rate was tuned; ``"absolute"``; or
            the base model, which may be on the meta device.
        roles: Roles of parameters or layers by glob, where they do not follow: ``{"*.unembed": "readout"}``.
        zero: Globs of the weights or layers that start at zero, such as ``("*.down", "head")``; of a structured layer
            it is the last factor.  A `StructuredLinear` with ``zero_init=True`` needs no glob.

    Raises:
        StructureError: No rule for the optimiser, the base lacks a layer, a role is unknown, a glob fits nothing, or
            ``model`` is no module.

    Example:
        >>> layer = StructuredLinear(1024, 1024, "btt")
        >>> plan(layer)["factors.0"].lr_scale
        16.0
    """
    if not isinstance(base, int | str | nn.Module | None):
        raise StructureError(f"base is None, a fan-in, 'absolute' or the base model, got {base!r}")
    reference: Any = list(weights(base, roles)) if isinstance(base, nn.Module) else base
    return make_plan(list(weights(model, roles, zero)), optimizer, reference)


def weights(
    model: nn.Module, roles: Mapping[str, str] | None = None, zero: str | Sequence[str] = ()
) -> Iterator[Weight]:
    """Every parameter of a model as sizes, once, in the order of ``model.parameters()``; arguments as in `plan`.

    Raises:
        StructureError: ``model`` is no module, a role is unknown, or a glob fits nothing.
    """
    for weight, _ in described(model, roles, zero):
        yield weight


def described(
    model: nn.Module, roles: Mapping[str, str] | None = None, zero: str | Sequence[str] = ()
) -> Iterator[tuple[Weight, nn.Parameter]]:
    """Every parameter as sizes, and the parameter; one that several layers share comes once, as tied.

    Raises:
        StructureError: ``model`` is no module, has parameters without a size yet, a role is unknown, or a glob fits
            nothing.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"expected the module, whose layers say what each parameter is; got {type(model).__name__}"
        )
    order = {id(parameter): k for k, parameter in enumerate(model.parameters())}
    # A parameter is tied if several layers own it; one layer that is registered under two names does not tie it.
    owners = Counter(id(p) for layer in model.modules() for p in layer._parameters.values())
    found: dict[int, tuple[Weight, nn.Parameter]] = {}
    # Structured layers first, so that those win where a parameter is shared; then the order of the model.
    for name, layer in sorted(layers(model), key=lambda pair: not isinstance(pair[1], StructuredLinear)):
        for weight, parameter in _of_layer(name, layer):
            weight = replace(weight, tied=owners[id(parameter)] > 1)
            found.setdefault(id(parameter), (weight, parameter))  # the list that holds the factors comes later
    pairs = sorted(found.values(), key=lambda pair: order[id(pair[1])])
    chosen = with_zeros(with_roles([weight for weight, _ in pairs], roles or {}), zero)
    yield from zip(chosen, (parameter for _, parameter in pairs), strict=True)


def rows_of(model: nn.Module, plan: MupPlan) -> list[tuple[PlanRow, nn.Parameter]]:
    """The rows of a plan with the parameters of the model, in the order of the model.

    Raises:
        StructureError: The plan is that of another model.
    """
    rows = {row.name: row for row in plan}
    pairs = []
    for weight, parameter in described(model):
        row = rows.pop(weight.name, None)
        if row is None:
            raise StructureError(f"the plan has no parameter {weight.name!r}; it is that of another model")
        here, there = weight.factor.shape, row.weight.factor.shape
        if here != there:
            raise StructureError(f"{weight.name} is {here} here and {there} in the plan; it is that of another model")
        pairs.append((row, parameter))
    if rows:
        raise StructureError(f"the plan has {', '.join(rows)}, which the model lacks; it is that of another model")
    return pairs


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, with names that leave out ``torch.compile``, DDP, FSDP and activation checkpointing."""
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        parts = name.split(".") if name else []
        parents = (modules[".".join(parts[:k])] for k in range(len(parts)))
        yield ".".join(part for part, parent in zip(parts, parents, strict=True) if part != held(parent)), layer


def as_blocks(value: Tensor, factor: Factor) -> Tensor | None:
    """A view of a stored parameter as (blocks, fan_out, fan_in), or None if it holds no such matrices (Toeplitz)."""
    blocks, fan_out, fan_in = factor.stored_shape
    if value.numel() != blocks * fan_out * fan_in:
        return None
    if factor.name == TRANSPOSED:  # (in, out) or (in, out / blocks, kernel)
        return value.reshape(blocks, value.shape[0] // blocks, fan_out, -1).transpose(1, 2).flatten(2)
    return value.reshape(blocks, fan_out, fan_in)


def from_blocks(blocks: Tensor, shape: Sequence[int], factor: Factor) -> Tensor:
    """The stored parameter of this shape whose `as_blocks` are these."""
    if factor.name == TRANSPOSED:
        rows = shape[0] // factor.blocks
        blocks = blocks.reshape(factor.blocks, factor.fan_out, rows, -1).transpose(1, 2)
    return blocks.reshape(tuple(shape))


def held(layer: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it wraps."""
    names = (WRAPPERS.get(kind.__name__) for kind in type(layer).__mro__)
    return next((name for name in names if name), None)


def _of_layer(name: str, layer: nn.Module) -> Iterator[tuple[Weight, nn.Parameter]]:
    """The parameters that a layer owns itself, or those that it announces.

    A layer whose parameters say too little by their shapes has ``weight_sizes``: of each a `Weight`, by its name in the
    layer.

    Raises:
        StructureError: One has no size yet.
    """
    prefix = f"{name}." if name else ""
    matrix = "readout" if name.rpartition(".")[2] in READOUTS else "hidden"
    if isinstance(layer, StructuredLinear):
        factors = layer.plan.factors
        for k, (factor, parameter) in enumerate(zip(factors, layer.factors, strict=True)):
            zero = layer.zero_init and k == len(factors) - 1
            sizes = (layer.in_features, layer.out_features, k, len(factors), str(layer.structure), zero)
            yield Weight(f"{prefix}factors.{k}", name, matrix, factor, *sizes), parameter
    announced: Mapping[str, Weight] = getattr(layer, "weight_sizes", None) or {}
    for key, weight in announced.items():
        owner, _, last = key.rpartition(".")
        parameter = getattr(layer.get_submodule(owner), last)
        if parameter is not None:
            role = matrix if weight.role == "hidden" else weight.role
            yield replace(weight, name=prefix + key, layer=name, role=role), parameter
    for key, parameter in layer.named_parameters(recurse=False):
        if key in announced:
            continue
        if nn.parameter.is_lazy(parameter):
            raise StructureError(f"{prefix}{key} has no size before the first forward; run one batch, then plan")
        yield _of_parameter(name, key, layer, parameter, matrix), parameter


def _of_parameter(name: str, key: str, layer: nn.Module, parameter: nn.Parameter, matrix: str) -> Weight:
    """One parameter of a layer, by the kind of the layer, or by its shape if that says nothing."""
    full = f"{name}.{key}" if name else key
    shape = tuple(map(int, parameter.shape))
    if key == "weight" and isinstance(layer, nn.Linear):
        return _dense(full, name, matrix, layer.in_features, layer.out_features)
    if key == "weight" and isinstance(layer, nn.modules.conv._ConvNd):
        # Groups are blocks.  A stride would divide the fan-in of a transposed convolution; it is the same at any width.
        blocks, kernel = layer.groups, math.prod(layer.kernel_size)
        n, m = layer.in_channels // blocks * kernel, layer.out_channels // blocks
        kind = TRANSPOSED if layer.transposed else KERNEL
        return Weight(full, name, matrix, Factor(kind, shape, fan_in=n, fan_out=m, blocks=blocks), n, m)
    if key == "weight" and isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        m = layer.embedding_dim
        return Weight(full, name, "embedding", Factor("table", shape, 1, m), 1, m)
    if key == "weight" and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__) and len(shape) == 2:
        n, m = shape  # the linear layer of transformers
        return Weight(full, name, matrix, Factor(TRANSPOSED, shape, fan_in=n, fan_out=m), n, m)
    if isinstance(layer, LINEAR_LIKE) and len(shape) == 2:
        return _dense(full, name, matrix, shape[1], shape[0])
    if math.prod(shape) == 1 or (isinstance(layer, StructuredLinear) and key != "bias"):
        return Weight(full, name, "scalar", Factor(key, shape, 1, 1), 1, 1)
    if len(shape) < 2 or isinstance(layer, NORMS):
        return _vector(full, name, math.prod(shape))
    if isinstance(layer, nn.MultiheadAttention):  # bias_k and bias_v are (1, 1, embed_dim)
        return _vector(full, name, shape[-1])
    m, n = shape[-2:]
    factor = Factor(key, shape, fan_in=n, fan_out=m, blocks=math.prod(shape[:-2]))
    return Weight(full, name, "hidden", factor, n, m, known=False)


def _dense(full: str, name: str, role: str, n: int, m: int) -> Weight:
    return Weight(full, name, role, dense_factor(n, m), n, m)


def _vector(full: str, name: str, size: int) -> Weight:
    return Weight(full, name, "vector", Factor("vector", (size,), fan_in=1, fan_out=size), 1, size)
