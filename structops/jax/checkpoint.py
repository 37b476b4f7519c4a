"""Folders with a structured model: ``model.safetensors`` for the numbers, ``structops.json`` for all else.

The files are those of `structops.torch.checkpoint`, with the names and the shapes that the arrays have in JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import save_file

from structops.conversion import CheckpointConfig, LayerConfig
from structops.conversion.config import CONFIG, DIGEST, WEIGHTS, check_tensors, some
from structops.conversion.folder import Folder, opened, published, read_config
from structops.errors import CheckpointError
from structops.jax.convert import filled, shapes, swapped
from structops.jax.linears import Site, sites
from structops.jax.weights import text_of
from structops.normalise import rms_caps

STORED = nnx.Not(nnx.RngState)  # random streams have keys, which are no arrays of numbers


def save_pretrained(model: Any, folder: Folder) -> None:
    """Write a model with structured layers to a folder, from which `load` makes it again.

    The folder gets ``model.safetensors`` (all variables of a module of NNX but its random streams, all arrays of one of
    Equinox) and ``structops.json`` (structure and options of every structured layer).  Nothing is pickled.  All files
    are written under a temporary name first: a crash leaves the checkpoint that was there before, or a folder that
    `load` refuses.

    Args:
        model: A module of Flax NNX or Equinox.  Sharded arrays are gathered; of several processes see Orbax in the
            documentation.
        folder: Made if need be.

    Raises:
        CheckpointError: It is no such module, an array is abstract or of a dtype that safetensors do not have, or
            ``folder`` is a file.

    Example:
        >>> import tempfile
        >>> from structops.jax import structurize
        >>> dense = lambda: eqx.nn.MLP(16, 4, 32, 1, key=jax.random.key(0))
        >>> model = structurize(dense(), "btt")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     again = load(folder, dense)
        >>> eqx.tree_equal(again, model)
        Array(True, dtype=bool)
    """
    arrays = _arrays(_checked(model))
    for name, array in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct):
            raise CheckpointError(f"{name} is abstract: fill the model first")
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"{name} is a key of random numbers; safetensors hold numbers only")
    layers = {site.layer.name: _described(site) for site in sites(model) if site.plan is not None}
    kind = type(model)
    config = CheckpointConfig("jax", layers, {"class": f"{kind.__module__}.{kind.__qualname__}"})
    whole = {name: jnp.asarray(jax.device_get(array)) for name, array in arrays.items()}
    with published(folder) as new:
        save_file(whole, new / WEIGHTS, metadata={"format": "flax", DIGEST: config.digest()})
        (new / CONFIG).write_text(config.to_json(), encoding="utf-8")


def load(folder: Folder, model: Any, *, dtype: Any = None) -> Any:
    """The model that `save_pretrained` wrote.

    Args:
        folder: The folder.
        model: The module, dense or structured, which stays as it is; or a function that makes it, of which only the
            shapes are computed, if it has no random streams.
        dtype: Cast floating-point arrays to this; by default they keep the dtype that they were saved in.

    Returns:
        The module with the structured layers and the numbers of the checkpoint, on the default device.  Random streams
        are those of ``model``.

    Raises:
        CheckpointError: The folder holds no such checkpoint, a broken or half-written one, or a newer format; weights
            and ``structops.json`` do not belong together; or layers or arrays are missing in the model or the
            checkpoint, or differ in size.
        StructureError: A structure is unknown to this version of structops.

    Numerics:
        Exact: the loaded model computes what the saved one did.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.framework != "jax":
        raise CheckpointError(f"{folder} was written by structops.{config.framework}; load it there")
    is_made = not isinstance(model, nnx.Module | eqx.Module)
    shell = _abstract(model, is_made)
    found = {site.layer.name: site for site in sites(shell)}
    nodes = {name: _shell(name, layer, found) for name, layer in config.layers.items()}
    shell = swapped(shell, {name: node for name, node in nodes.items() if node is not None})
    with opened(folder / WEIGHTS, "flax") as file:
        config.check_weights(file.metadata(), str(folder / WEIGHTS))
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        check_tensors({name: tuple(array.shape) for name, array in _arrays(shell).items()}, stored)
        arrays = {key: _cast(jnp.asarray(file.get_tensor(key)), dtype) for key in stored}
    if isinstance(shell, nnx.Module):
        state = nnx.state(shell, STORED)
        nnx.update(shell, jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path, arrays)], state))
        streams = nnx.state(shell, nnx.RngState)
        if jax.tree.leaves(streams):
            nnx.update(shell, nnx.state(model() if is_made else model, nnx.RngState))
        return shell
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: arrays[_name(path, arrays)] if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shell
    )


def _checked(model: Any) -> Any:
    """The model.

    Raises:
        CheckpointError: It is no module.
    """
    if not isinstance(model, nnx.Module | eqx.Module):
        raise CheckpointError(
            f"expected a module of Flax NNX or Equinox, got {type(model).__name__}; Orbax and safetensors.flax save "
            f"plain trees"
        )
    return model


def _abstract(model: Any, is_made: bool) -> Any:
    """The model with shapes in place of arrays.

    Raises:
        CheckpointError: There is no model.
    """
    if is_made:
        if not callable(model):
            raise CheckpointError(f"model: expected a module or a function that makes one, got {type(model).__name__}")
        made = nnx.eval_shape(model) if _makes_nnx(model) else eqx.filter_eval_shape(model)
        _checked(made)
    else:
        made = model
    if isinstance(made, nnx.Module):
        graph, state = nnx.split(made)
        return nnx.merge(graph, jax.tree.map(_shape, state), copy=True)
    return jax.tree.map(lambda leaf: _shape(leaf) if eqx.is_array(leaf) else leaf, made)


def _makes_nnx(make: Callable[[], Any]) -> bool:
    """Whether a function makes a module of NNX; nothing is computed."""
    found = []
    jax.eval_shape(lambda: found.append(isinstance(make(), nnx.Module)))
    return found[0]


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _arrays(model: Any) -> dict[str, Any]:
    """What is stored, by name."""
    if isinstance(model, nnx.Module):
        return {_join(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, STORED))}
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {".".join(map(text_of, path)): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def _join(path: Any) -> str:
    return ".".join(map(str, path))


def _name(path: Any, arrays: Mapping[str, Any]) -> str:
    """The name of an array in a tree, whose last key may only unwrap a variable of NNX."""
    name = ".".join(map(text_of, path))
    return name if name in arrays else name.rpartition(".")[0]


def _described(site: Site) -> LayerConfig:
    """A layer without its numbers."""
    node, layer = site.node, site.layer
    options = {name: getattr(node, name) for name in ("zero_init", "weight_norm", "recompute")}
    dtype = str(jnp.dtype(node.factors[0].dtype))
    return LayerConfig(
        node.structure, layer.in_features, layer.out_features, layer.bias, kind=layer.kind, dtype=dtype, **options
    )


def _shell(name: str, layer: LayerConfig, found: Mapping[str, Site]) -> Any:
    """The abstract layer of the checkpoint; None if the model has it.

    Raises:
        CheckpointError: The model has no such layer, or at another size.
    """
    site = found.get(name)
    if site is None:
        raise CheckpointError(
            f"the model has no layer {name!r}, which is {layer.structure} in the checkpoint; its linear layers are "
            f"{some(list(found))}"
        )
    ours, theirs = (site.layer.out_features, site.layer.in_features), (layer.out_features, layer.in_features)
    if ours != theirs:
        raise CheckpointError(
            f"{name} is {ours[0]}x{ours[1]} in the model and {theirs[0]}x{theirs[1]} in the checkpoint"
        )
    if site.plan is not None:
        if str(site.node.structure) != str(layer.structure):
            raise CheckpointError(
                f"{name} is {site.node.structure} in the model and {layer.structure} in the checkpoint; give load the "
                f"dense model, or one that was converted in the same way"
            )
        return None
    if site.layer.bias != layer.bias:
        raise CheckpointError(f"{name} has {'a' if site.layer.bias else 'no'} bias in the model, unlike the checkpoint")
    plan = layer.structure.plan(layer.in_features, layer.out_features)
    caps = rms_caps(plan, layer.zero_init) if layer.weight_norm is True else None
    options = {"zero_init": layer.zero_init, "weight_norm": layer.weight_norm, "recompute": layer.recompute}
    return filled(site, layer.structure, shapes(site, plan, caps), False, options)


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array if dtype is None or not jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(dtype)
