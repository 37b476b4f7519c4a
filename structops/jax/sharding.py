"""Where the parameters of a model lie on a mesh of devices: sharded data, sharded parameters, cut layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from structops.conversion.selection import Pattern, fits
from structops.errors import StructureError
from structops.jax.optimizer import matrix_axes
from structops.jax.weights import Specs, is_structured, leaves, text_of, weights
from structops.mup import Weight
from structops.shards import Side, shard_chain
from structops.spec import ChainPlan, Plan

M = TypeVar("M")
Patterns = Pattern | Sequence[Pattern]
Axis = str | tuple[str, ...] | None


@dataclass(frozen=True)
class _Parameter:
    """A parameter as sizes, and the plan that it is a factor of."""

    weight: Weight
    shape: tuple[int, ...]
    plan: Plan | None


def shardings(
    model: Any,
    mesh: Mesh,
    *,
    fsdp: str | None = None,
    tensor: str | None = None,
    colwise: Patterns = (),
    rowwise: Patterns = (),
    rules: Mapping[Pattern, PartitionSpec] | None = None,
    specs: Specs | None = None,
) -> Any:
    r"""The ``NamedSharding`` of every parameter of a model.

    - **Sharded parameters** (``fsdp``, the axis of the mesh that the batch is sharded on): a factor ``(blocks, fan_out,
      fan_in)`` on its blocks if the devices divide them, else on fan-out, else on fan-in; a dense matrix or a table on
      its first axis that they divide.  What they divide nowhere, and vectors, are on all devices.
    - **Column-parallel layers** (``tensor``, ``colwise``): cut along the most significant label of the output.  Every
      device has a contiguous share of y, and nothing is communicated.
    - **Row-parallel layers** (``tensor``, ``rowwise``): cut along the most significant label of the input.  Every
      device takes a contiguous share of x, and XLA adds up the shares: one all-reduce.

    Factors without the label are on all devices, or sharded by ``fsdp``.  A label is the name of an axis only where
    it is the most significant one of those that were merged into blocks, fan-out or fan-in: `structops.shards.
    shard_chain` has the rule, and says in each case what does not fit.

    Args:
        model: A module of Flax NNX or Equinox, also an abstract one, or a plain tree of parameters.
        mesh: The devices, with ``axis_types=(AxisType.Auto, ...)``: XLA then finds the layout of everything else.
        fsdp: Axis of the mesh on which parameters are sharded.
        tensor: Axis of the mesh along which layers are cut.
        colwise: Names of column-parallel layers: globs, or compiled regular expressions that are found in a name.
        rowwise: Names of row-parallel layers.
        rules: What parameters get in place of all this, by their name; a later rule wins.
        specs: What the arrays of a plain tree are; see `structops.jax.weights`.

    Returns:
        A tree like the model; for a module of NNX like ``nnx.state(model)``.  What is no parameter is on all devices.

    Raises:
        StructureError: The mesh has no such axis, or one of other type; a pattern fits no layer; a layer is in colwise
            and in rowwise, is no chain, or has a label that the devices do not divide or whose slices are not
            contiguous.

    Cost:
        What XLA sends is tested on eight devices.  A row-parallel low-rank layer adds up its rank numbers instead of y.
        Of row-parallel Kronecker products and tensor-trains XLA gathers x before it adds up: their first product has
        tokens and the label that is cut in one axis.

    Example:
        >>> from jax.sharding import AxisType
        >>> from structops.jax import StructuredLinear
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        >>> model = nnx.Dict(
        ...     up=StructuredLinear(64, 256, "btt", rngs=nnx.Rngs(0)),
        ...     down=StructuredLinear(256, 64, "btt", rngs=nnx.Rngs(0)),
        ... )
        >>> found = shardings(model, mesh, tensor="model", colwise="up", rowwise="down")
        >>> [tuple(found["down"]["factors"][k].get_value().spec) for k in (0, 1)]
        [('model', None, None), (None, None, 'model')]
    """
    _check_mesh(mesh, fsdp, tensor, bool(colwise or rowwise))
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    parameters = _parameters(model, specs)
    sides = _sides(parameters.values(), colwise, rowwise)
    _check_rules(rules or {}, parameters)
    table = {
        name: _spec(parameter, mesh, sides.get(parameter.weight.layer), fsdp, tensor, name, rules or {})
        for name, parameter in parameters.items()
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = ".".join(text_of(key) for key in path)
        parent, _, last = name.rpartition(".")
        unwrapped = parent if last in ("value", "raw_value") and name not in table else name
        return NamedSharding(mesh, table.get(unwrapped, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard(model: M, mesh: Mesh, **how: Any) -> M:
    """Put the parameters of a model where `shardings` says.

    Make the optimiser's state afterwards: its arrays then lie where the parameters do.

    Args:
        model: As in `shardings`; a module of NNX is changed in place.
        mesh: The devices.
        **how: The other arguments of `shardings`.

    Returns:
        The model, or the new one.

    Raises:
        StructureError: As for `shardings`.

    Example:
        >>> from jax.sharding import AxisType
        >>> from structops.jax import StructuredLinear
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        >>> layer = shard(StructuredLinear(64, 64, "btt", rngs=nnx.Rngs(0)), mesh, fsdp="data")
        >>> tuple(layer.factors[0][...].sharding.spec)
        ('data', None, None)
    """
    places = shardings(model, mesh, **how)
    if isinstance(model, nnx.Module):
        nnx.update(model, jax.device_put(nnx.state(model), places))
        return model
    arrays = [leaf if hasattr(leaf, "dtype") else None for leaf in jax.tree.leaves(model)]
    put = [
        leaf if array is None else jax.device_put(array, place)
        for leaf, array, place in zip(jax.tree.leaves(model), arrays, jax.tree.leaves(places), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), put)


# --------------------------------------------------------------------------------------------------------------- rules


def _spec(
    parameter: _Parameter,
    mesh: Mesh,
    side: Side | None,
    fsdp: str | None,
    tensor: str | None,
    name: str,
    rules: Mapping[Pattern, PartitionSpec],
) -> PartitionSpec:
    """Where one parameter lies."""
    given = [spec for pattern, spec in rules.items() if fits(pattern, name)]
    if given:
        return given[-1]
    cut: list[Axis] = [None] * len(parameter.shape)
    if side is not None and tensor is not None:
        axis = _cut_axis(parameter, mesh.shape[tensor], side)
        if axis is not None:
            cut[axis] = tensor
    if fsdp is not None and parameter.weight.role not in ("vector", "scalar"):
        count = mesh.shape[fsdp]
        # An axis that is cut already comes last, and counts with what is left of it.
        for axis in sorted(_own_axes(parameter), key=lambda axis: cut[axis] is not None):
            taken = cut[axis]
            left = parameter.shape[axis] // (1 if taken is None else mesh.shape[taken])
            if left % count == 0:
                cut[axis] = fsdp if taken is None else (str(taken), fsdp)
                break
    return PartitionSpec(*cut) if any(cut) else PartitionSpec()


def _own_axes(parameter: _Parameter) -> range:
    """The axes of one layer; those in front of them stack layers, which a scan slices one by one."""
    rank = len(parameter.shape)
    own = 3 if parameter.plan is not None else len(parameter.weight.factor.shape)
    return range(max(rank - own, 0), rank)


def _cut_axis(parameter: _Parameter, parts: int, side: Side) -> int | None:
    """The axis along which tensor parallelism cuts a parameter."""
    weight, rank = parameter.weight, len(parameter.shape)
    if weight.role in ("vector", "scalar"):
        is_bias = weight.role == "vector" and side == "output"
        return rank - 1 if is_bias and parameter.shape[-1] % parts == 0 else None
    if parameter.plan is not None:
        dim = _dims(parameter, parts, side)[weight.position]
        return None if dim is None else rank - 3 + dim
    # The rows of a table are its inputs, one of which is on at a time.
    inputs, outputs = ((-2,), (-1,)) if weight.role == "embedding" else matrix_axes(weight)
    axis = (outputs if side == "output" else inputs)[0]
    if parameter.shape[axis] % parts:
        raise StructureError(
            f"{weight.name}: {parts} devices do not divide its {side} axis of size {parameter.shape[axis]}"
        )
    return rank + axis


def _dims(parameter: _Parameter, parts: int, side: Side) -> tuple[int | None, ...]:
    plan, layer = parameter.plan, parameter.weight.layer
    if not isinstance(plan, ChainPlan):
        raise StructureError(
            f"{layer}: {parameter.weight.structure} is no chain of factors; only chains can be cut for tensor "
            f"parallelism"
        )
    try:
        return shard_chain(plan.chain, parts, side).dims
    except StructureError as error:
        raise StructureError(f"{layer or 'the model'}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- parameters


def _parameters(model: Any, specs: Specs | None) -> dict[str, _Parameter]:
    """Every parameter by name, with the plan whose factor it is."""
    plans = {leaf.name: getattr(leaf.holders[0], "plan", None) for leaf, _ in leaves(model) if _is_factor(leaf)}
    shapes = {leaf.name: leaf.shape for leaf, _ in leaves(model)}
    found = {}
    for weight in weights(model, specs=specs):
        plan = plans.get(weight.name)
        if plan is None and weight.structure:
            parent = weight.name.rpartition(".")[0]
            plan = next((p for glob, p in (specs or {}).items() if isinstance(p, Plan) and fits(glob, parent)), None)
        found[weight.name] = _Parameter(weight, shapes[weight.name], plan)
    return found


def _is_factor(leaf: Any) -> bool:
    return leaf.parts[-2:-1] == ("factors",) and is_structured(leaf.holders[0])


def _sides(parameters: Any, colwise: Patterns, rowwise: Patterns) -> dict[str, Side]:
    """On which side the layers are cut.

    Raises:
        StructureError: A pattern fits no layer, or a layer is on both sides.
    """
    layers = list(dict.fromkeys(p.weight.layer for p in parameters if p.weight.is_matrix))
    found: dict[str, Side] = {}
    sides: tuple[tuple[str, Side, Patterns], ...] = (("colwise", "output", colwise), ("rowwise", "input", rowwise))
    for what, side, patterns in sides:
        for pattern in _each(patterns):
            fitting = [layer for layer in layers if fits(pattern, layer)]
            if not fitting:
                few = ", ".join(layer or "the model itself" for layer in layers[:8])
                raise StructureError(f"{what}: {pattern!r} fits no layer of the model; it has {few}")
            for layer in fitting:
                if found.setdefault(layer, side) != side:
                    raise StructureError(f"{layer} is in colwise and in rowwise; a layer is one of them")
    return found


def _each(patterns: Patterns) -> Iterator[Pattern]:
    yield from patterns if isinstance(patterns, Sequence) and not isinstance(patterns, str) else [patterns]


def _check_rules(rules: Mapping[Pattern, PartitionSpec], parameters: Mapping[str, _Parameter]) -> None:
    for pattern in rules:
        if not any(fits(pattern, name) for name in parameters):
            few = ", ".join(list(parameters)[:8])
            raise StructureError(f"rules: {pattern!r} fits no parameter of the model; it has {few}")


def _check_mesh(mesh: Mesh, fsdp: str | None, tensor: str | None, is_cut: bool) -> None:
    """The axes exist, and XLA may choose layouts along them.

    Raises:
        StructureError: They do not, or colwise and rowwise have no axis.
    """
    for what, axis in (("fsdp", fsdp), ("tensor", tensor)):
        if axis is not None and axis not in mesh.axis_names:
            raise StructureError(f"{what}: the mesh has the axes {', '.join(mesh.axis_names)}, not {axis!r}")
    if is_cut and tensor is None:
        raise StructureError("colwise and rowwise need tensor=, the axis of the mesh along which layers are cut")
    if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        raise StructureError(
            f"expected a mesh whose layouts XLA chooses; make it with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )
