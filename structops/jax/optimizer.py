"""The learning rate of every factor as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from structops.errors import StructureError
from structops.jax.layer import StructuredLinear
from structops.mup import scales, width_ratio

Path = tuple[str, ...]


def lr_scales(
    model: nnx.Module,
    *,
    optimizer: str = "adam",
    base: int | nnx.Module | None = None,
    structure_aware: bool = True,
) -> dict[Path, float]:
    """Learning-rate scale of every weight of a model, by its path; a parameter that is not listed has scale 1.

    Args:
        model: Any NNX module, also a single layer.
        optimizer: Name of the optimiser's family; see `structops.mup.FAMILY`.
        base: None: relative to the dense layers replaced; the fan-in at which the rate was tuned; or the base model,
            whose layers of the same path give the base fan-in of each.
        structure_aware: If false, factors get the learning rate of the dense layer: the naive baseline of the paper.

    Raises:
        StructureError: No rule for the optimiser, or the base model lacks a layer.
    """
    bases: dict[Path, Any] = (
        {_path(path): layer for path, layer in nnx.iter_modules(base)} if isinstance(base, nnx.Module) else {}
    )

    def ratio(path: Path, layer: Any) -> float:
        if base is None:
            return 1.0
        if isinstance(base, int):
            return width_ratio(base, layer, optimizer)
        if not isinstance(base, nnx.Module):
            raise StructureError(f"base is None, a fan-in or the base model, got {base!r}")
        if path not in bases:
            name = ".".join(path)
            raise StructureError(f"the base model has no layer {name!r}; it needs the same layers at another width")
        return width_ratio(bases[path].in_features, layer, optimizer, bases[path].out_features)

    table: dict[Path, float] = {}
    for raw, layer in nnx.iter_modules(model):
        path = _path(raw)
        if isinstance(layer, StructuredLinear):
            for index, row in enumerate(scales(layer.plan, optimizer)):
                table[*path, "factors", str(index)] = ratio(path, layer) * (row.lr_scale if structure_aware else 1.0)
        elif isinstance(layer, nnx.Linear):
            table[*path, "kernel"] = ratio(path, layer)
    return table


def scale_by_mup(
    model: nnx.Module,
    *,
    optimizer: str = "adam",
    base: int | nnx.Module | None = None,
    structure_aware: bool = True,
) -> optax.GradientTransformation:
    """Multiply the update of every factor by its learning-rate scale; stateless, to be chained last.

    ``optax.chain(optax.adam(lr), scale_by_mup(model))`` gives each factor ``lr`` times the multiplier of
    `structops.mup.scales` and everything else ``lr``.  Decoupled weight decay inside the chain is scaled alike.

    Args:
        model: The module whose parameters are trained.
        optimizer: Name of the optimiser's family; see `structops.mup.FAMILY`.
        base: As in `lr_scales`.
        structure_aware: As in `lr_scales`.

    Raises:
        StructureError: No rule for the optimiser, or the base model lacks a layer.
    """
    table = lr_scales(model, optimizer=optimizer, base=base, structure_aware=structure_aware)

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * table.get(_path(path), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _path(path: Any) -> Path:
    """Keys of any kind as strings, without those that only unwrap a variable."""
    parts = (_key(key) for key in path)
    return tuple(part for part in parts if part not in ("value", "raw_value"))


def _key(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
