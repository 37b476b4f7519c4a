"""The linear layers of a JAX model, why some cannot be converted, and what each becomes.

A model is a module of Flax NNX or Equinox, or a plain tree of parameters whose linear layers are mappings with a
``kernel`` (in, out), as Flax Linen has them.  Axes in front of a kernel's own stack layers, as models that scan over
their layers have them; their factors are stacked alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from structops.conversion import Conversion, Kept, Layer
from structops.conversion.report import kept_dense, planned
from structops.conversion.selection import reserved_for
from structops.errors import StructureError
from structops.jax.equinox import StructuredLinear as EquinoxLinear
from structops.jax.layer import StructuredLinear, StructuredLinearGeneral
from structops.jax.product import XLA_CPU
from structops.jax.weights import Specs, is_structured, leaves, text_of, weights
from structops.merging import GPU, Machine
from structops.spec import Plan

STRUCTURED = "it has a structure already: densify it first"


@dataclass(frozen=True)
class Site:
    """A linear layer in its model.

    Attributes:
        layer: Its name and sizes, and what speaks against converting it.
        node: The layer itself: a module, or a mapping of a plain tree.
        plan: Its structure, if it has one.
    """

    layer: Layer
    node: Any
    plan: Plan | None = None

    @property
    def kernel(self) -> Any:
        """The array of the dense weight, as it is stored."""
        if isinstance(self.node, Mapping):
            return self.node["kernel"]
        return self.node.weight if isinstance(self.node, eqx.nn.Linear) else self.node.kernel.get_value()

    def weight(self) -> jax.Array:
        """The dense weight as (..., out_features, in_features); axes in front stack layers."""
        n, m = self.layer.in_features, self.layer.out_features
        if isinstance(self.node, eqx.Module):
            return self.kernel
        kernel = self.kernel
        return jnp.swapaxes(kernel.reshape((*self.stack, n, m)), -1, -2)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes that stack layers."""
        own = 2
        if isinstance(self.node, nnx.LinearGeneral):
            own = len(_sizes(self.node.in_features)) + len(_sizes(self.node.out_features))
        shape = tuple(self.kernel.shape)
        return shape[: len(shape) - own]

    @property
    def variable(self) -> Any:
        """The variable of the bias in a module of NNX, which layers may share; None elsewhere."""
        return getattr(self.node, "bias", None) if isinstance(self.node, nnx.Module) else None

    @property
    def bias(self) -> Any:
        """The array of the bias, or None."""
        if isinstance(self.node, Mapping):
            return self.node.get("bias")
        bias = self.node.bias
        return bias if bias is None or isinstance(self.node, eqx.Module) else bias.get_value()

    @property
    def is_abstract(self) -> bool:
        """Whether there are shapes only."""
        return isinstance(self.kernel, jax.ShapeDtypeStruct)


def sites(model: Any, specs: Specs | None = None) -> list[Site]:
    """Every linear layer once, structured ones among them.

    Raises:
        StructureError: The model has no parameters, or ``specs`` do not fit.
    """
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    return _of_tree(model, specs or {})


# ------------------------------------------------------------------------------------------------------------------ NNX


def _of_nnx(model: nnx.Module) -> list[Site]:
    owners: dict[int, list[str]] = defaultdict(list)
    modules: list[tuple[str, Any]] = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    for name, module in modules:
        for key, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                owners[id(value)].append(f"{name}.{key}" if name else key)
    found = []
    for name, module in modules:
        if is_structured(module):
            has_bias = getattr(module, "bias", None) is not None
            sizes = (module.plan.in_features, module.plan.out_features, has_bias)
            found.append(Site(Layer(name, _kind(module), *sizes, STRUCTURED, "", module), module, module.plan))
        elif isinstance(module, nnx.Linear | nnx.LinearGeneral):
            obstacle = _nnx_obstacle(module)
            others = [other for other in owners[id(module.kernel)] if other != (f"{name}.kernel" if name else "kernel")]
            if others and not obstacle:
                obstacle = f"its kernel is tied to {others[0]}"
            n, m = (math.prod(_sizes(size)) for size in (module.in_features, module.out_features))
            kind, has_bias = type(module).__name__, module.bias is not None
            found.append(Site(Layer(name, kind, n, m, has_bias, obstacle, reserved_for(name), module), module))
    return found


def _kind(module: Any) -> str:
    return "LinearGeneral" if isinstance(module, StructuredLinearGeneral) else "Linear"


def _nnx_obstacle(module: Any) -> str:
    """Why a linear layer of NNX cannot be converted, by itself; empty if it can."""
    if type(module) not in (nnx.Linear, nnx.LinearGeneral):
        return f"its class {type(module).__name__} is a subclass, which may compute something else"
    if module.dot_general not in (lax.dot_general, None) or getattr(module, "dot_general_cls", None) is not None:
        return "its dot_general was replaced, for example by quantisation"
    for setting in ("precision", "preferred_element_type"):
        if getattr(module, setting) is not None:
            return f"it sets {setting}, which structured layers do not have"
    if isinstance(module, nnx.LinearGeneral):
        inputs = _sizes(module.in_features)
        if module.batch_axis or tuple(sorted(_sizes(module.axis))) != tuple(range(-len(inputs), 0)):
            return "its inputs are not the last axes of x"
        if tuple(_sizes(module.axis)) != tuple(range(-len(inputs), 0)):
            return "its inputs are in another order than the last axes of x"
    return _array_obstacle(module.kernel.get_value())


def _array_obstacle(kernel: Any) -> str:
    is_float = hasattr(kernel, "dtype") and jnp.issubdtype(kernel.dtype, jnp.inexact)
    return "" if is_float else f"its weight is no array of floating-point numbers ({getattr(kernel, 'dtype', kernel)})"


def _sizes(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


# --------------------------------------------------------------------------------------------------- Equinox and trees


def is_site(specs: Specs, node: Any) -> bool:
    """Whether a node of a tree is a linear layer, or holds one that has a structure."""
    if isinstance(node, eqx.nn.Linear) or is_structured(node):
        return True
    return isinstance(node, Mapping) and ("kernel" in node or "factors" in node)


def _of_tree(model: Any, specs: Specs) -> list[Site]:
    found, shared = [], _shared(model)
    for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=partial(is_site, specs)):
        name = ".".join(text_of(key) for key in path)
        if is_structured(node):
            sizes = (node.plan.in_features, node.plan.out_features, getattr(node, "bias", None) is not None)
            found.append(Site(Layer(name, "Linear", *sizes, STRUCTURED, "", node), node, node.plan))
        elif isinstance(node, eqx.nn.Linear):
            found.append(_equinox_site(name, node, shared))
        elif isinstance(node, Mapping):
            found += _mapping_sites(name, node, specs)
    return found


def _shared(model: Any) -> set[int]:
    """The arrays that several places of a tree hold, and the placeholders of ``eqx.nn.Shared``."""
    counts: dict[int, int] = defaultdict(int)
    for leaf in jax.tree.leaves(model):
        counts[id(leaf)] += 1
    return {key for key, count in counts.items() if count > 1}


def _equinox_site(name: str, node: Any, shared: set[int]) -> Site:
    obstacle = _array_obstacle(node.weight)
    if type(node) is not eqx.nn.Linear:
        obstacle = f"its class {type(node).__name__} is a subclass, which may compute something else"
    elif not hasattr(node.weight, "shape"):
        obstacle = "its weight is tied to another one by eqx.nn.Shared"
    elif "scalar" in (node.in_features, node.out_features):
        obstacle = "it takes or gives a scalar"
    elif not obstacle and id(node.weight) in shared:
        obstacle = "its weight is the same array as another one of the model"
    n, m = (1 if size == "scalar" else size for size in (node.in_features, node.out_features))
    return Site(Layer(name, "Linear", n, m, node.bias is not None, obstacle, reserved_for(name), node), node)


def _mapping_sites(name: str, node: Mapping[str, Any], specs: Specs) -> list[Site]:
    """The layer that a mapping of a plain tree is, if it is one."""
    has_bias = node.get("bias") is not None
    if "factors" in node:
        key = f"{name}.factors" if name else "factors"
        plan = next((plan for glob, plan in specs.items() if isinstance(plan, Plan) and glob == key), None)
        if plan is None:
            raise StructureError(f"{name}: specs has no plan for {key!r}; give the specs that structurize returned")
        return [Site(Layer(name, "kernel", plan.in_features, plan.out_features, has_bias, STRUCTURED), node, plan)]
    kernel = node["kernel"]
    if not hasattr(kernel, "shape"):
        return []
    shape, obstacle = tuple(kernel.shape), _array_obstacle(kernel)
    pair = specs.get(f"{name}.kernel" if name else "kernel")
    if isinstance(pair, tuple) and shape[-2:] == pair:
        pass
    elif len(shape) != 2:
        return []
    n, m = shape[-2:]
    return [Site(Layer(name, "kernel", n, m, has_bias, obstacle, reserved_for(name), node), node)]


# ----------------------------------------------------------------------------------------------------- what they become


def machine_of() -> Machine:
    """What times are predicted for: the default device of JAX."""
    return XLA_CPU if jax.default_backend() == "cpu" else GPU


def survey(model: Any, tokens: int = 2048, *, specs: Specs | None = None) -> Conversion:
    """The linear layers of a model with their structures, counts and predicted times.

    Args:
        model: A module of Flax NNX or Equinox, or a plain tree, structured or not.
        tokens: Vectors at once for which times are predicted.
        specs: Of a plain tree: what `structops.jax.structurize` returned, or pairs (in_features, out_features) of
            kernels that are stacked.

    Raises:
        StructureError: The model has no parameters, or ``specs`` do not fit.

    Example:
        >>> survey(StructuredLinear(64, 64, "btt", rngs=nnx.Rngs(0)))[0].params
        1024
    """
    machine, rows = machine_of(), []
    found = sites(model, specs)
    for site in found:
        layer = site.layer
        if site.plan is not None:
            text = str(getattr(site.node, "structure", "") or _pattern(site.plan))
            rows.append(planned(layer, text, site.plan, tokens, machine))
        else:
            rows.append(kept_dense(layer, layer.obstacle or layer.reserved or "not structured"))
    numbers = sum(math.prod(leaf.shape) for leaf, _ in leaves(model))
    numbers += sum(row.dense - row.params for row in rows)
    return Conversion(tuple(rows), _kept(model, found, specs), numbers, tokens, "gpu" if machine is GPU else "cpu")


def _pattern(plan: Plan) -> str:
    return str(plan.chain.pattern) if hasattr(plan, "chain") else type(plan).__name__


def _kept(model: Any, found: list[Site], specs: Specs | None) -> tuple[Kept, ...]:
    """Matrices of parameters that belong to no linear layer."""
    linear = {site.layer.name for site in found}
    nodes = {leaf.name: leaf.holders[1] for leaf, _ in leaves(model)}
    shapes = {leaf.name: leaf.shape for leaf, _ in leaves(model)}
    kept = []
    for weight in weights(model, specs=specs):
        owner, shape = nodes[weight.name], shapes[weight.name]
        parent = weight.name.rpartition(".")[0]
        if len(shape) < 2 or not weight.is_matrix or {weight.layer, parent, parent.removesuffix(".factors")} & linear:
            continue
        if weight.role == "embedding":
            reason = "table of an embedding"
        elif isinstance(owner, nnx.Einsum):
            reason = f"nnx.Einsum {owner.einsum_str!r}: write it with a StructuredLinear and reshapes"
        elif isinstance(owner, nnx.Conv | nnx.ConvTranspose | eqx.nn.Conv | eqx.nn.ConvTranspose):
            reason = "kernel of a convolution"
        elif isinstance(model, nnx.Module) or isinstance(owner, eqx.Module):
            reason = f"read by {type(owner).__name__} itself"
        elif len(shape) > 2:
            reason = "more than two axes: say by specs={...: (in_features, out_features)} if they are stacked layers"
        else:
            reason = "not called kernel"
        kept.append(Kept(weight.name, shape, reason))
    return tuple(kept)


def shell(site: Site, structure: Any, **options: Any) -> Any:
    """The structured layer for a dense one of Flax NNX, abstract and without its bias."""
    node, dtype = site.node, site.kernel.dtype
    options = {**options, "dtype": node.dtype, "param_dtype": dtype}
    if isinstance(node, nnx.LinearGeneral):
        sizes = _sizes(node.in_features), _sizes(node.out_features)
        return nnx.eval_shape(lambda: StructuredLinearGeneral(*sizes, structure, False, rngs=nnx.Rngs(0), **options))
    return nnx.eval_shape(
        lambda: StructuredLinear(node.in_features, node.out_features, structure, False, rngs=nnx.Rngs(0), **options)
    )


def equinox_shell(site: Site, structure: Any, **options: Any) -> EquinoxLinear:
    """The structured layer for a dense one of Equinox, abstract and without its bias."""
    layer, dtype = site.layer, site.kernel.dtype
    return eqx.filter_eval_shape(
        lambda key: EquinoxLinear(
            layer.in_features, layer.out_features, structure, False, dtype=dtype, key=key, **options
        ),
        jax.random.key(0),
    )
