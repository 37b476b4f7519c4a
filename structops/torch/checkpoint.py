"""Folders with a structured model: ``model.safetensors`` for the numbers, ``structops.json`` for all else."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from structops.conversion import CheckpointConfig, Choice, Layer, LayerConfig
from structops.conversion.config import CONFIG, DIGEST, WEIGHTS, check_tensors, some
from structops.conversion.folder import Folder, opened, published, read_config
from structops.errors import CheckpointError
from structops.torch.convert import densify, shell, swapped
from structops.torch.layer import StructuredLinear
from structops.torch.linears import CONV1D
from structops.torch.stored import (
    buffers_of,
    clean_name,
    described,
    dtype_name,
    layers_of,
    modules_of,
    state_of,
    tensors_of,
    unwrapped,
    volatile,
)

_ELSEWHERE = "transformers_weights"  # where the config of a model of transformers names its file of weights


def save_pretrained(model: nn.Module, folder: Folder) -> None:
    """Write a model with structured layers to a folder, from which `load` makes it again.

    The folder gets ``model.safetensors`` (parameters and persistent buffers; what is tied is stored once) and
    ``structops.json`` (structure and options of every `StructuredLinear`, also of those that were built by hand); for a
    model of transformers ``config.json`` too, and ``generation_config.json`` if it generates.  Other files in the
    folder stay.  Nothing is pickled.  ``from_pretrained`` of transformers refuses the folder, where it would draw the
    missing dense weights at random; `export_dense` writes what it reads.

    All files are written under a temporary name first.  A crash leaves the checkpoint that was there before, or a
    folder that `load` refuses: never a mixture.

    Args:
        model: Any module, also a compiled one.  Of a distributed run, one process calls this with the whole model; for
            sharded parameters see `structops.torch.distributed.save`.
        folder: Made if need be.

    Raises:
        CheckpointError: Parameters are sharded or on the meta device, a layer keeps extra state that is no tensor, or
            ``folder`` is a file.

    Cost:
        The file, and no copy in memory but of tensors that are not contiguous or share memory.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(StructuredLinear(16, 64, "btt(rank=2)"), nn.GELU(), nn.Linear(64, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     again = load(folder, lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)))
        >>> x = torch.randn(3, 16)
        >>> bool((again(x) == model(x)).all())
        True
    """
    model = unwrapped(model)
    tensors, tied = tensors_of(model)
    config = CheckpointConfig("torch", layers_of(model), _about(model), tied, buffers_of(model))
    with published(folder) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt", DIGEST: config.digest()})
        (new / CONFIG).write_text(config.to_json(), encoding="utf-8")
        if _is_transformers(model):
            _save_configs(model, new, config)


def load(
    folder: Folder,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that `save_pretrained` wrote.

    Args:
        folder: The folder.
        model: None for a model of transformers, which is built from ``config.json``.  Otherwise a function that makes
            the model, dense or structured, such as its class; its parameters take no memory and are not drawn.  Or the
            model itself, which is changed in place: linear layers that are structured in the checkpoint are replaced,
            and parameters become new ones, so load before you make an optimiser or wrap the model.
        device: Where the model goes; by default that of the ``model`` given, else the CPU.
        dtype: Cast floating-point parameters and stored buffers to this while loading; by default they keep the dtype
            that they were saved in.

    Returns:
        The model: in evaluation mode if it was built from ``config.json``, like what ``from_pretrained`` returns;
        otherwise in the mode that it was in.  Tied parameters are tied.  ``requires_grad`` is as in ``model``.

    Raises:
        CheckpointError: The folder holds no such checkpoint, a broken or half-written one, or a newer format; weights
            and ``structops.json`` do not belong together; or layers or tensors are missing in the model or the
            checkpoint, or differ in size.  A model that was given is then as it was.
        StructureError: A structure is unknown to this version of structops.

    Cost:
        Memory of the parameters once; dense weights of layers that become structured are never allocated, unless a
        model that was given has them.

    Numerics:
        Exact: the loaded model computes what the saved one did.  Buffers that are not stored (rotary frequencies,
        position ids) are made anew by the model, and cast to the dtype they had.
    """
    folder = Path(folder)
    config = read_config(folder)
    with opened(folder / WEIGHTS, "pt") as file:
        config.check_weights(file.metadata(), str(folder / WEIGHTS))
        if config.framework != "torch":
            raise CheckpointError(f"{folder} was written by structops.{config.framework}; load it there")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        built = model is None
        if isinstance(model, nn.Module):
            whole = model
        else:
            whole = _without_memory(model) if model is not None else _from_config(folder, config)
        inner = unwrapped(whole)
        if device is None:
            device = next((p.device for p in inner.parameters() if not p.is_meta), torch.device("cpu"))
        if dtype is not None:
            config = config.cast(dtype_name(dtype))
        dtypes = {name: _dtype(name, text) for name, text in config.buffers.items()}
        found = modules_of(inner)
        _check_layers(config, found)
        _check_tensors(config, inner, found, shapes)
        whole = _with_shells(whole, config, found)
        loaded: Any = unwrapped(whole)
        _fill(loaded, config, lambda key: _read(file, key, device, dtype))
    for name, buffer in volatile(loaded):
        owner, _, key = name.rpartition(".")
        wanted = dtypes.get(clean_name(loaded, name), buffer.dtype)
        loaded.get_submodule(owner)._buffers[key] = buffer.to(device, wanted)
    if not built:
        return whole
    if loaded.can_generate() and (folder / "generation_config.json").exists():
        loaded.generation_config = type(loaded.generation_config).from_pretrained(folder)
    return loaded.eval()


def export_dense(model: nn.Module, folder: Folder) -> None:
    """Write the densified model to a folder that loads without structops.

    A model of transformers is written by its own ``save_pretrained``, and ``from_pretrained`` reads it; of any other
    module the folder gets ``model.safetensors``, which ``safetensors.torch.load_model`` loads into the dense module.
    An older checkpoint in the folder is replaced, as in `save_pretrained`.

    Args:
        model: Any module.
        folder: Made if need be.

    Raises:
        CheckpointError: As for `save_pretrained`.

    Cost:
        A dense copy of the model in memory, and the file.
    """
    dense: Any = densify(unwrapped(model))
    tensors, tied = tensors_of(dense)
    with published(folder) as new:
        if _is_transformers(dense):
            dense.save_pretrained(new)
        else:
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt", **tied})


# ---------------------------------------------------------------------------------------------- models of transformers


def _about(model: nn.Module) -> dict[str, str]:
    """What the model is, for building it again and for messages."""
    kind = type(model)
    if _is_transformers(model) and getattr(sys.modules["transformers"], kind.__name__, None) is kind:
        return {"library": "transformers", "class": kind.__name__}
    return {"class": f"{kind.__module__}.{kind.__qualname__}"}


def _is_transformers(model: nn.Module) -> bool:
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def _save_configs(model: Any, folder: Path, config: CheckpointConfig) -> None:
    """``config.json`` and ``generation_config.json``."""
    settings = copy.deepcopy(model.config)
    settings.architectures = [type(model).__name__]
    settings.dtype = model.dtype
    settings.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if config.layers:  # from_pretrained would draw dense layers at random; it refuses weights of this name
        path = folder / "config.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        data[_ELSEWHERE] = f"load this folder by structops.torch.load, which reads its {CONFIG}"
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- building and filling


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that a function makes, with its parameters on the meta device as soon as they are registered.

    Buffers are made as ever: those that no checkpoint stores have to hold their numbers.

    Raises:
        CheckpointError: ``make`` cannot be called, or makes no module.
    """
    if not callable(make):
        raise CheckpointError(f"model: expected a module or a function that makes one, got {type(make).__name__}")
    here = threading.get_ident()
    made = WeakIdKeyDictionary()  # a parameter that is registered twice stays one

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or nn.parameter.is_lazy(parameter) or parameter.is_meta or threading.get_ident() != here:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return made[parameter]

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        model = make()
    finally:
        hook.remove()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model: expected a function that makes a module, it made a {type(model).__name__}")
    return model


def _from_config(folder: Path, config: CheckpointConfig) -> nn.Module:
    """The model of transformers that ``config.json`` describes, without memory for its parameters.

    Raises:
        CheckpointError: The checkpoint is of another model, or transformers is missing or lacks the class.
    """
    name = config.model.get("class", "a model")
    if config.model.get("library") != "transformers":
        raise CheckpointError(
            f"{folder} is a checkpoint of {name}, which structops cannot build: give load the model, or a function "
            f"that makes it"
        )
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is a checkpoint of {name} of transformers: pip install transformers"
        ) from error
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or kind.config_class is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no model {name}; give load the model")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json, from which {name} would be built")
    settings = kind.config_class.from_pretrained(folder)
    vars(settings).pop(_ELSEWHERE, None)
    return _without_memory(lambda: kind(settings))


def _sizes(module: Any) -> tuple[int, int] | None:
    """Output and input size of a linear layer."""
    if isinstance(module, CONV1D()):
        return module.nf, module.nx
    return (module.out_features, module.in_features) if isinstance(module, (nn.Linear, StructuredLinear)) else None


def _check_layers(config: CheckpointConfig, modules: Mapping[str, nn.Module]) -> None:
    """The model has every layer of the checkpoint, at its size.

    Raises:
        CheckpointError: It does not.
    """
    for name, layer in config.layers.items():
        module: Any = modules.get(name)
        if module is None:
            linear = [key for key, value in modules.items() if _sizes(value)]
            raise CheckpointError(
                f"the model has no layer {name!r}, which is {layer.structure} in the checkpoint; its linear layers are "
                f"{some(linear)}"
            )
        sizes = _sizes(module)
        if sizes is None:
            raise CheckpointError(f"{name} is a {type(module).__name__} in the model, and linear in the checkpoint")
        if sizes != (layer.out_features, layer.in_features):
            raise CheckpointError(
                f"{name} is {sizes[0]}x{sizes[1]} in the model and {layer.out_features}x{layer.in_features} in the "
                f"checkpoint"
            )


def _check_tensors(
    config: CheckpointConfig, model: nn.Module, modules: Mapping[str, nn.Module], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Model and checkpoint have the same tensors, at the same sizes.

    Raises:
        CheckpointError: They have not, or a buffer that is not stored has no numbers.
    """
    replaced = {id(modules[name]) for name in config.layers}
    prefixes = tuple(_join(name, "") for name, module in modules.items() if id(module) in replaced)
    expected = {key: tuple(value.shape) for key, value in state_of(model).items() if not key.startswith(prefixes)}
    names = {id(modules[name]): layer for name, layer in config.layers.items()}
    for name, module in modules.items():
        if id(module) in names:
            expected |= {_join(name, key): array.shape for key, array in names[id(module)].stored().items()}
    if dangling := [f"{name} (for {alias})" for alias, name in config.tied.items() if name not in stored]:
        raise CheckpointError(f"the weights lack {some(dangling)}, although {CONFIG} says that they are tied")
    found = {**stored, **{alias: stored[name] for alias, name in config.tied.items()}}
    check_tensors(expected, found)
    if empty := [name for name, buffer in volatile(model) if buffer.is_meta]:
        raise CheckpointError(
            f"{some(empty)} on the meta device, and no checkpoint stores them: give load a function that makes the "
            f"model, whose parameters then take no memory"
        )


def _with_shells(model: nn.Module, config: CheckpointConfig, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model with the structured layers of the checkpoint, on the meta device where they are new."""
    replaced: dict[int, nn.Module] = {}
    for name, layer in config.layers.items():
        module: Any = modules[name]
        if isinstance(module, StructuredLinear) and _same(module, layer):
            module.projection = None
            continue
        choice = Choice(Layer(name, layer.kind, layer.in_features, layer.out_features, module=module), layer.structure)
        new = shell(choice, zero_init=layer.zero_init, weight_norm=layer.weight_norm, recompute=layer.recompute)
        new.kind, new.projection = layer.kind, None
        for parameter in new.weights():
            parameter.requires_grad_(module.weight.requires_grad)
        if layer.bias:
            learns = module.bias is None or module.bias.requires_grad
            new.bias = nn.Parameter(torch.empty(layer.out_features, device="meta"), learns)
        replaced[id(module)] = new
    return swapped(model, replaced)


def _same(module: StructuredLinear, layer: LayerConfig) -> bool:
    here = described(module)
    return here == replace(layer, dtype=here.dtype)


def _dtype(name: str, text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{CONFIG}: the buffer {name} has the unknown dtype {text!r}")
    return dtype


def _read(file: Any, key: str, device: Any, dtype: torch.dtype | None) -> Tensor:
    """A tensor of an open file, in memory of its own: the file may be replaced, and its tensors are not aligned."""
    value = file.get_tensor(key)
    return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype, copy=True)


def _fill(model: nn.Module, config: CheckpointConfig, read: Callable[[str], Tensor]) -> None:
    """Give the model its tensors, as parameters that tied layers share."""
    targets = model.state_dict(keep_vars=True)
    made: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for raw, target in targets.items():
        key = clean_name(model, raw)
        source = config.tied.get(key, key)
        if source not in made:
            value = read(source)
            made[source] = nn.Parameter(value, target.requires_grad) if isinstance(target, nn.Parameter) else value
        state[raw] = made[source]
    model.load_state_dict(state, assign=True)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
