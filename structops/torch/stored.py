"""What a checkpoint stores of a model: its tensors and structured layers by names without wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structops.conversion import LayerConfig
from structops.errors import CheckpointError
from structops.torch.layer import StructuredLinear
from structops.torch.weights import held

_UNKNOWN = (torch.complex128, torch.complex32)  # to safetensors


def unwrapped(model: Any) -> Any:
    """The module inside ``torch.compile`` and other wrappers.

    Raises:
        CheckpointError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected a module of PyTorch, got {type(model).__name__}")
    while name := held(model):
        model = getattr(model, name)
    return model


def clean_name(model: nn.Module, key: str) -> str:
    """The name of a tensor or module without the parts that wrappers inside of the model add."""
    parts: list[str] = []
    module: nn.Module | None = model
    for part in key.split("."):
        if module is None or part != held(module):
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with clean names, of parameters rather than their data.

    Raises:
        CheckpointError: Something in it is no tensor, or has no size yet.
    """
    state = {clean_name(model, key): value for key, value in model.state_dict(keep_vars=True).items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key} is a {type(value).__name__}; safetensors hold tensors only")
        if nn.parameter.is_lazy(value):
            raise CheckpointError(f"{key} has no size before the first forward: call the model once")
    return state


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored, everything once, and which names are another's.

    Raises:
        CheckpointError: A tensor is sharded, quantised in a class of its own, on the meta device, or complex128.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, value in state_of(model).items():
        value = value.detach()
        if value.is_meta or type(value) is not Tensor or value.layout is not torch.strided:
            plain = type(value) is Tensor
            what = "on the meta device" if value.is_meta else f"a {value.layout if plain else type(value).__name__}"
            raise CheckpointError(
                f"{key} is {what}: fill the model first; sharded models are saved by structops.torch.distributed.save"
            )
        if value.dtype in _UNKNOWN:
            raise CheckpointError(f"{key} is {dtype_name(value.dtype)}, which safetensors do not have")
        same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and same in first:
            tied[key] = first[same]
            continue
        first[same] = key
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        tensors[key] = value if whole else value.clone(memory_format=torch.contiguous_format)
    return tensors, tied


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules under all their names."""
    return {clean_name(model, name): module for name, module in model.named_modules(remove_duplicate=False)}


def layers_of(model: nn.Module) -> dict[str, LayerConfig]:
    """The structured layers, each under its first name."""
    names = {id(module): name for name, module in reversed(modules_of(model).items())}
    layers = {names[id(module)]: module for module in model.modules() if isinstance(module, StructuredLinear)}
    return {name: described(layer) for name, layer in layers.items()}


def described(layer: StructuredLinear) -> LayerConfig:
    """A layer without its numbers."""
    return LayerConfig(
        structure=layer.structure,
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias is not None,
        zero_init=layer.zero_init,
        weight_norm=layer.weight_norm,
        recompute=layer.product.recompute,
        kind=layer.kind,
        dtype=dtype_name(layer.factors[0].dtype),
    )


def volatile(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are not stored, by their names in the model."""
    stored = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name not in stored]


def buffers_of(model: nn.Module) -> dict[str, str]:
    """The dtypes of floating-point buffers that are not stored."""
    return {clean_name(model, name): dtype_name(b.dtype) for name, b in volatile(model) if b.is_floating_point()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype that torch, numpy and JAX share."""
    return str(dtype).removeprefix("torch.")
