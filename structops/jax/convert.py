"""Give the linear layers of any JAX model a structure, and take it away again; twin of `structops.torch.convert`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from structops._progress import track
from structops.conversion import Projection, choose, row_of
from structops.conversion.options import Covariances, Init, Zero, check_calibration, check_init, chosen_of, zero_layers
from structops.conversion.selection import Names, Select, Spec, named, quiet
from structops.errors import StructureError
from structops.jax.equinox import StructuredLinear as EquinoxLinear
from structops.jax.equinox import dense_linear
from structops.jax.init import digits
from structops.jax.linear import draw, unit_gains
from structops.jax.linears import Site, equinox_shell, is_site, machine_of, shell, sites, survey
from structops.jax.weights import Specs, text_of
from structops.normalise import keeping_gains, rms_caps
from structops.projection import Moments, bias_shift
from structops.projection.fit import fit_factors
from structops.spec import Plan, Structure

IN_PLACE = "inplace: only modules of Flax NNX that hold layers change in place; take what is returned"


class Structured(NamedTuple):
    """What `structurize` makes of a plain tree.

    Attributes:
        params: The tree, with lists ``factors`` in place of kernels.
        specs: The plan of every such list by its dotted name: what `plan`, `weights`, `shardings`, `densify`,
            `survey` and `linen_interceptor` take as ``specs``.
    """

    params: Any
    specs: dict[str, Plan | tuple[int, int]]


class _New(NamedTuple):
    """The numbers of a structured layer, and what is added to its bias; arrays or shapes."""

    factors: list[Any]
    gains: Any
    shift: Any
    projection: Projection | None = None


def structurize(
    model: Any,
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
    key: jax.Array | None = None,
    specs: Specs | None = None,
    dry_run: bool = False,
    report: bool = False,
    tokens: int = 2048,
    progress: bool | None = None,
) -> Any:
    r"""A model whose linear layers have a structure.

    | model | linear layers | become |
    |---|---|---|
    | Flax NNX | ``nnx.Linear``, ``nnx.LinearGeneral`` of last axes (as in attention) | `StructuredLinear` |
    | Equinox | ``eqx.nn.Linear`` (as in ``eqx.nn.MLP`` and attention) | `StructuredLinear` of Equinox |
    | a plain tree | mappings with a ``kernel`` (in, out), as of Flax Linen | mappings with a list ``factors`` |

    By default every linear layer is converted but the output head, routers of experts, layers whose weight is tied to
    another one, and those that cannot be.  ``print(structurize(..., dry_run=True))`` lists all of them, and the
    matrices beside them.

    A layer keeps its bias and dtypes, in NNX also the type of its variables.  One that has several places in a module
    of NNX is converted once and has all of them.  Layers stacked along axes in front, as ``vmap`` over keys makes them
    for models that scan over layers, are projected one by one and their factors stacked.

    Args:
        model: A module of Flax NNX or Equinox, also a single linear layer or an abstract one, or a plain tree.
        structure: A spec or its string form, or rules: ``{"*.mlp.*": "btt(rank=4)", "*.attn.*": "low_rank(rank=8)"}``.
        select: None, a glob, a compiled regular expression, a function or rules; see `structops.conversion.choose`.
        inplace: Whether to change ``model``, which only modules of NNX can be.
        init: ``"project"``: the nearest member to the present weight (`structops.projection.fit`); ``"mup"``: drawn
            anew by the paper's rule, bias 0.
        calibration: Moments of the inputs of every layer by name, from `structops.jax.calibrate`, or second moments
            \(E[x x^T]\) as arrays.  The projection is then the nearest in \(E\|(W - A) x\|^2\); with `Moments` and a
            bias in \(E\|(W - A)(x - \mu)\|^2\), and the bias takes \((W - A)\mu\), unless it is tied to another.
        zero: With ``init="mup"``, layers whose last factor starts at zero: globs, or True for the ends of residual
            branches and the readout, found by the names that common code bases give them (``structops.mup.selection``).
        weight_norm: As for `StructuredLinear`; projected factors keep their size by their gains.
        recompute: As for `StructuredLinear`.
        refine: Sweeps of the projection; see `structops.projection.fit`.
        key: Source of the random numbers of ``init="mup"``.
        specs: Of a plain tree: ``{"layers.up.kernel": (in_features, out_features)}`` for kernels of more than two axes
            that are stacked layers; also what an earlier call returned.
        dry_run: Whether to return the table of what would be done instead of doing it.
        report: Whether to return the table of what was done, too, with the errors of projection.
        tokens: Vectors at once for which the table predicts times.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        The model; of a plain tree a `Structured`; with ``dry_run`` a `structops.conversion.Conversion`; with ``report``
        the pair of both.

    Raises:
        StructureError: A structure is unknown or cannot have the sizes of its layer, a pattern fits nothing, a selected
            layer cannot be converted, ``calibration`` lacks a layer, ``zero`` with ``init="project"``, no ``key`` with
            ``init="mup"``, or an argument that this kind of model cannot have.
        EntryError: A weight that is projected is not finite.

    Warnings:
        `StructureWarning`: What a structure says of its size, once for all layers alike; or no layer was converted.

    Cost:
        With ``init="project"`` that of one projection a layer.  JAX compiles its parts once for every shape.

    Numerics:
        Projection of 16-bit weights runs in float32 and is rounded back; see `structops.projection.fit`.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.gelu, nnx.Linear(64, 16, rngs=rngs))
        >>> small = structurize(model, "low_rank(rank=4)")
        >>> [sum(array.size for array in jax.tree.leaves(nnx.state(m))) for m in (model, small)]
        [2128, 720]
    """
    is_nnx = isinstance(model, nnx.Module)
    check_init(init, zero, calibration)
    if init == "mup" and key is None and not dry_run:
        raise StructureError("key: weights are drawn anew; give key=jax.random.key(0) or the like")
    if inplace and (not is_nnx or isinstance(model, nnx.Linear | nnx.LinearGeneral)):
        raise StructureError(IN_PLACE)
    if is_nnx and not inplace and not dry_run:
        model = nnx.clone(model)
    found = sites(model, specs)
    choices = choose([site.layer for site in found], structure, select)
    if dry_run:
        rows = [row_of(choice, tokens, machine_of()) for choice in choices]
        return survey(model, tokens, specs=specs).with_rows(rows)
    chosen_of(choices)
    chosen = [(c, c.structure, site) for c, site in zip(choices, found, strict=True) if c.structure is not None]
    check_calibration(calibration, [choice for choice, _, _ in chosen])
    zeros = zero_layers([choice for choice, _, _ in chosen], zero)
    held = Counter(id(site.variable) for site in found if site.variable is not None)
    tied = {variable for variable, count in held.items() if count > 1}
    nodes, plans, projections = {}, {}, {}
    with quiet():
        for choice, spec, site in track(chosen, "projecting" if init == "project" else "structuring", shown=progress):
            name = choice.layer.name
            plan = spec.plan(choice.layer.in_features, choice.layer.out_features)
            if isinstance(site.node, Mapping) and (weight_norm or recompute):
                raise StructureError("weight_norm and recompute are choices of layers; a plain tree has none")
            caps = rms_caps(plan, name in zeros) if weight_norm else None
            if site.is_abstract:
                new = shapes(site, plan, caps)
            elif init == "mup":
                assert key is not None  # checked above
                new = _drawn(site, plan, caps, jax.random.fold_in(key, digits(name)), name in zeros)
            else:
                inputs = None if calibration is None else calibration[name]
                new = _projected(site, spec, inputs, refine, caps, id(site.variable) not in tied)
            options = {"zero_init": name in zeros, "weight_norm": weight_norm, "recompute": recompute}
            nodes[name] = filled(site, spec, new, init == "mup", options)
            plans[f"{name}.factors" if name else "factors"] = plan
            projections[name] = new.projection
    changed = swapped(model, nodes)
    if not (is_nnx or isinstance(model, eqx.Module)):
        gone = {f"{name}.kernel" if name else "kernel" for name in nodes}
        specs = {**{name: spec for name, spec in (specs or {}).items() if name not in gone}, **plans}
        changed = Structured(changed, specs)
    if not report:
        return changed
    table = survey(changed.params, tokens, specs=specs) if isinstance(changed, Structured) else survey(changed, tokens)
    return changed, table.with_projections(projections)


def densify(model: Any, select: Names = None, inplace: bool = False, *, specs: Specs | None = None) -> Any:
    """The plain model: every structured layer becomes the linear layer that it replaces, with the same function.

    Args:
        model: As for `structurize`.
        select: Globs, regular expressions, or a function of name and layer; all structured layers by default.
        inplace: Whether to change ``model``, which only modules of NNX can be.
        specs: Of a plain tree: what `structurize` returned.

    Returns:
        The model or the tree.

    Raises:
        StructureError: A pattern fits no structured layer, or the model cannot be changed in place.

    Cost:
        ``out_features * in_features`` numbers a layer, which is the point.

    Example:
        >>> model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
        >>> densify(structurize(model, "btt")).layers[0].weight.shape
        (8, 4)
    """
    is_nnx = isinstance(model, nnx.Module)
    if inplace and (not is_nnx or hasattr(model, "merge")):
        raise StructureError(IN_PLACE)
    if is_nnx and not inplace:
        model = nnx.clone(model)
    found = {site.layer.name: site for site in sites(model, specs) if site.plan is not None}
    names = named("select", select, {name: site.node for name, site in found.items()})
    return swapped(model, {name: _dense(found[name]) for name in names})


# -------------------------------------------------------------------------------------------------------------- numbers


def shapes(site: Site, plan: Plan, caps: Any) -> _New:
    """The shapes of the factors, and of the gains where there are caps."""
    dtype = site.kernel.dtype
    factors = [jax.ShapeDtypeStruct((*site.stack, *shape), dtype) for shape in plan.stored_shapes]
    gains = jax.eval_shape(lambda: jnp.ones((*site.stack, len(factors)), unit_gains(plan, dtype).dtype))
    return _New(factors, gains if caps else None, None)


def _drawn(site: Site, plan: Plan, caps: Any, key: jax.Array, zero_init: bool) -> _New:
    dtype, count = site.kernel.dtype, math.prod(site.stack)
    keys = jax.random.split(key, (count, len(plan.stored_shapes)))
    layers = [draw(plan, list(one), dtype, zero_init) for one in keys]
    gains = jnp.ones((*site.stack, len(plan.stored_shapes)), unit_gains(plan, dtype).dtype) if caps else None
    return _New(_stacked(layers, site.stack), gains, None)


def _projected(site: Site, spec: Structure, inputs: Any, refine: int | None, caps: Any, may_shift: bool = True) -> _New:
    """The projection of every layer of a stack, their factors stacked."""
    W, stack = site.weight(), site.stack
    if stack and inputs is not None:
        raise StructureError(f"calibration: {site.layer.name} is a stack of layers; calibrate them one by one")
    centred = isinstance(inputs, Moments) and site.bias is not None and may_shift
    covariance = inputs.centred if centred else inputs
    layers, shift, largest = [], None, 0.0
    for one in W.reshape((-1, *W.shape[-2:])):
        plan, found, error = fit_factors(one, spec, covariance=covariance, refine=refine)
        layers.append(list(found.factors))
        largest = max(largest, float(error))
        if centred:
            shift = bias_shift(one, plan.operator(layers[-1]), inputs.mean)
    factors = _stacked(layers, stack)
    projection = Projection(largest, found.optimality)
    gains = None if caps is None else keeping_gains(factors, caps).astype(unit_gains(plan, W.dtype).dtype)
    return _New(factors, gains, shift, projection)


def _stacked(layers: Sequence[Sequence[jax.Array]], stack: tuple[int, ...]) -> list[jax.Array]:
    """Factors of the layers of a stack, with the axes of the stack in front."""
    return [jnp.stack(factors).reshape((*stack, *factors[0].shape)) for factors in zip(*layers, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- nodes


def filled(site: Site, spec: Any, new: _New, fresh_bias: bool, options: Mapping[str, Any]) -> Any:
    """The structured layer in place of a dense one."""
    bias = site.bias
    if bias is not None and not site.is_abstract:
        bias = jnp.zeros_like(bias) if fresh_bias else bias
        bias = bias if new.shift is None else bias + new.shift.astype(bias.dtype).reshape(bias.shape)
    node = site.node
    if isinstance(node, Mapping):
        rest = {key: value for key, value in node.items() if key not in ("kernel", "bias")}
        return _mapping(node, {**rest, "factors": list(new.factors), **({} if bias is None else {"bias": bias})})
    if isinstance(node, eqx.Module):
        return eqx.tree_at(
            lambda layer: (layer.factors, layer.gains, layer.bias),
            equinox_shell(site, spec, **options),
            (tuple(new.factors), new.gains, bias),
            is_leaf=lambda leaf: leaf is None,
        )
    layer, kind = shell(site, spec, **options), type(node.kernel)
    layer.factors = nnx.List([kind(factor) for factor in new.factors])
    if new.gains is not None:
        layer.gains = kind(new.gains)
    if bias is not None:
        node.bias.set_value(bias)
        layer.bias = node.bias
    return layer


def _dense(site: Site) -> Any:
    """The dense layer of a structured one."""
    node, plan = site.node, site.plan
    assert plan is not None  # densify leaves out all others
    if isinstance(node, Mapping):
        kernel = jnp.swapaxes(_matrices(plan, node["factors"]), -1, -2)
        return _mapping(node, {**{key: value for key, value in node.items() if key != "factors"}, "kernel": kernel})
    stack = tuple(node.factors[0].shape[:-3])
    if isinstance(node, eqx.Module):
        effective: Any = EquinoxLinear.effective_factors
        for _ in stack:
            effective = jax.vmap(effective)
        return dense_linear(_matrices(plan, effective(node)), node.bias)  # type: ignore[attr-defined]
    if stack:
        raise StructureError(f"{site.layer.name} is a stack of layers of Flax NNX; merge them one by one with nnx.vmap")
    dense, kind = node.merge(), type(node.factors[0])
    dense.kernel = kind(dense.kernel[...])
    if node.bias is not None:
        dense.bias = node.bias
    return dense


def _mapping(like: Any, items: Mapping[str, Any]) -> Any:
    """A mapping of the same class, such as the ``FrozenDict`` of Flax."""
    return type(like)(items)


def _matrices(plan: Plan, factors: Sequence[jax.Array]) -> jax.Array:
    """The dense matrices of stored factors, with the axes that stack layers in front."""
    build = lambda factors: plan.operator(factors).to_dense()  # noqa: E731
    for _ in factors[0].shape[:-3]:
        build = jax.vmap(build)
    return build(list(factors))


def swapped(model: Any, nodes: Mapping[str, Any]) -> Any:
    """The model with layers replaced wherever they are held."""
    if "" in nodes:
        return nodes[""]
    if not isinstance(model, nnx.Module):
        return jax.tree_util.tree_map_with_path(
            lambda path, node: nodes.get(".".join(text_of(key) for key in path), node),
            model,
            is_leaf=partial(is_site, {}),
        )
    replaced = {id(module): nodes[name] for path, module in nnx.iter_modules(model) if (name := _name(path)) in nodes}
    for _, module in list(nnx.iter_modules(model)):
        for key, value in list(vars(module).items()):
            if key.startswith("_pytree__"):
                continue
            if id(value) in replaced:
                # Items of a list of NNX are attributes that are named by numbers.
                vars(module)[key] = replaced[id(value)]
            elif isinstance(value, tuple | list | dict):
                swap = lambda node: replaced.get(id(node), node)  # noqa: E731
                vars(module)[key] = jax.tree.map(swap, value, is_leaf=lambda node: isinstance(node, nnx.Module))
    return model


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
