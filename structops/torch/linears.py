"""The linear layers of a torch model, why some cannot be converted, and the matrices beside them."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from structops.conversion import Conversion, Kept, Layer, Row
from structops.conversion.report import kept_dense, planned
from structops.conversion.selection import reserved_for
from structops.errors import StructureError
from structops.merging import CPU, GPU, Machine
from structops.torch.layer import StructuredLinear
from structops.torch.weights import described, layers


def CONV1D() -> tuple[Any, ...]:
    """The linear layer of transformers that stores its weight as (in, out), if transformers is in use."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module else ()


def dense_weight(layer: Any) -> Tensor:
    """The weight of a dense layer as (out_features, in_features)."""
    return layer.weight.T if isinstance(layer, CONV1D()) else layer.weight


def linear_layers(model: nn.Module) -> list[Layer]:
    """Every linear layer once, structured ones among them, with what speaks against converting it.

    Raises:
        StructureError: ``model`` is no module, or a layer has no size yet.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(f"expected a module of PyTorch, got {type(model).__name__}")
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in layers(model):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{name}.{key}" if name else key
            if nn.parameter.is_lazy(parameter):
                raise StructureError(f"{full} has no size before the first forward; run one batch, then convert")
            owners[id(parameter)].append(full)
    head = _head(model)
    found = []
    for name, module in layers(model):
        if isinstance(module, StructuredLinear):
            sizes = (module.in_features, module.out_features, module.bias is not None)
            found.append(Layer(name, module.kind, *sizes, "it has a structure already: densify it first", "", module))
        elif isinstance(module, (nn.Linear, *CONV1D())):
            found.append(_dense_layer(name, module, owners, module is head))
    return found


def _head(model: Any) -> nn.Module | None:
    """The output head, where a model of transformers names it."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _dense_layer(name: str, module: Any, owners: dict[int, list[str]], is_head: bool) -> Layer:
    obstacle, weight = _obstacle(module), getattr(module, "weight", None)
    if not obstacle:
        others = [other for other in owners[id(weight)] if other != (f"{name}.weight" if name else "weight")]
        if others:
            obstacle = f"its weight is tied to {others[0]}"
    if isinstance(module, CONV1D()):
        n, m = module.nx, module.nf
    else:
        n, m = module.in_features, module.out_features
    reserved = "output head" if is_head else reserved_for(name)
    has_bias = getattr(module, "bias", None) is not None
    return Layer(name, type(module).__name__, n, m, has_bias, obstacle, reserved, module)


def _obstacle(module: Any) -> str:
    """Why a linear layer cannot be converted, by itself; empty if it can."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised: torch.nn.utils.parametrize.remove_parametrizations first"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "its weight is read by nn.MultiheadAttention itself"
    if kind not in (nn.Linear, *CONV1D()):
        return f"its class {kind.__name__} is a subclass of Linear, which may compute something else"
    further = [key for key in (*module._parameters, *module._buffers) if key not in ("weight", "bias")]
    if further or "weight" not in module._parameters:
        return f"it has {', '.join(further) or 'no parameter weight'}: undo pruning or weight normalisation first"
    if "forward" in vars(module):
        return "its forward was replaced: remove hooks of accelerate or wrappers first"
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}: convert before sharding or quantising"
    if not weight.dtype.is_floating_point and not weight.dtype.is_complex:
        return f"its weight is quantised ({weight.dtype})"
    return ""


def machine_of(model: nn.Module) -> Machine:
    """What times are predicted for: a GPU if the model is on one."""
    return GPU if any(parameter.is_cuda for parameter in model.parameters()) else CPU


def survey(model: nn.Module, tokens: int = 2048) -> Conversion:
    """The linear layers of a model with their structures, counts, predicted times and errors of projection.

    Args:
        model: Any module, structured or not.
        tokens: Vectors at once for which times are predicted.

    Raises:
        StructureError: ``model`` is no module.

    Example:
        >>> print(survey(nn.Sequential(StructuredLinear(64, 64, "btt"), nn.Linear(64, 8))).rows[0].params)
        1024
    """
    rows: list[Row] = []
    found = linear_layers(model)
    machine = machine_of(model)
    for layer in found:
        module = layer.module
        if isinstance(module, StructuredLinear):
            fit = {} if module.projection is None else module.projection._asdict()
            rows.append(planned(layer, str(module.structure), module.plan, tokens, machine, **fit))
        else:
            rows.append(kept_dense(layer, layer.obstacle or layer.reserved or "not structured"))
    numbers = sum(parameter.numel() for parameter in model.parameters()) + sum(row.dense - row.params for row in rows)
    return Conversion(tuple(rows), _kept(model), numbers, tokens, "gpu" if machine is GPU else "cpu")


def _kept(model: nn.Module) -> tuple[Kept, ...]:
    """Matrices of parameters that belong to no linear layer."""
    modules = dict(layers(model))
    found = []
    for weight, parameter in described(model):
        module = modules[weight.layer]
        if parameter.ndim < 2 or isinstance(module, (StructuredLinear, nn.Linear, *CONV1D())) or not weight.is_matrix:
            continue
        if weight.role == "embedding":
            reason = "table of an embedding"
        elif isinstance(module, nn.MultiheadAttention):
            reason = "fused projections, read by nn.MultiheadAttention itself"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            reason = "weight of a recurrent layer, read by the layer itself"
        elif isinstance(module, nn.modules.conv._ConvNd):
            reason = "kernel of a convolution"
        else:
            is_expert = "expert" in f"{weight.name} {type(module).__name__}".lower()
            reason = f"{'experts in one array, ' if is_expert else ''}read by {type(module).__name__} itself"
        found.append(Kept(weight.name, tuple(parameter.shape), reason))
    return tuple(found)
