"""The plan of a JAX model: its weights as sizes, read off the layers of Flax NNX and Equinox, or given for plain trees.

Names are dotted paths, such as ``layers.0.factors.1``, that updates of the same model have too.  Only sizes are read,
so an abstract model (``nnx.eval_shape``, ``eqx.filter_eval_shape``) has the same plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup import MupPlan, Rule, Weight, make_plan
from structops.mup.selection import READOUTS, check_glob, with_roles, with_zeros
from structops.spec import Plan

# Of a dense weight: inputs and outputs of a block, the axes of one layer, the name for their order, and the blocks.
Dense = tuple[int, int, tuple[int, ...], str, int]
Specs = Mapping[str, Plan | tuple[int, int]]

KEYS = ("kernel", "weight", "w", "factors")  # names of arrays, after which no layer is called
INPUTS_FIRST = "kernel"  # name of a dense factor stored as (inputs, outputs); any other has its outputs first
# Layers whose other parameters are vectors, also where several layers were stacked.
WITH_VECTORS = (
    *(nnx.Linear, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.BatchNorm),
    *(eqx.nn.Linear, eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm),
)


def plan(
    model: Any,
    optimizer: str | Rule = "adam",
    *,
    base: Any = None,
    roles: Mapping[str, str] | None = None,
    specs: Specs | None = None,
    zero: str | Sequence[str] = (),
) -> MupPlan:
    """Init, learning rate, weight decay and eps of every parameter of a model.

    Args:
        model: A module of Flax NNX or Equinox, also a single layer or an abstract one, or a plain tree of parameters.
        optimizer: A name of `structops.mup.FAMILY`, or a `Rule` with further choices.
        base: None: relative to the dense layers replaced; the fan-in at which the rate was tuned; ``"absolute"``; or
            the base model: a module, a tree that needs no specs or the same, or its `weights`.
        roles: Roles of parameters or layers by glob, where they do not follow: ``{"*.unembed": "readout"}``.
        specs: What the arrays of a plain tree are; see `weights`.
        zero: Globs of the weights or layers that start at zero, such as ``("*.down", "head")``; of a structured layer
            it is the last factor.  A `StructuredLinear` with ``zero_init=True`` needs no glob.

    Raises:
        StructureError: No rule for the optimiser, the base lacks a layer, a role, a spec or a glob is wrong, or
            ``model`` has no parameters.

    Example:
        >>> from structops.jax import StructuredLinear
        >>> layer = StructuredLinear(1024, 1024, "btt", rngs=nnx.Rngs(0))
        >>> plan(layer)["factors.0"].lr_scale
        16.0
    """
    return make_plan(weights(model, roles, specs, zero), optimizer, _base(base, roles, specs))


def _base(base: Any, roles: Mapping[str, str] | None, specs: Specs | None) -> Any:
    """What `make_plan` takes as a base."""
    if base is None or isinstance(base, int) or base == "absolute":
        return base
    if isinstance(base, str | float):
        raise StructureError(f"base is None, a fan-in, 'absolute' or the base model, got {base!r}")
    if isinstance(base, MupPlan):
        return [row.weight for row in base]
    if isinstance(base, Sequence) and base and all(isinstance(weight, Weight) for weight in base):
        return base
    return weights(base, roles, specs)


def weights(
    model: Any,
    roles: Mapping[str, str] | None = None,
    specs: Specs | None = None,
    zero: str | Sequence[str] = (),
) -> list[Weight]:
    """Every parameter of a model as sizes, once, in the order of its tree.

    Known are the layers of Flax NNX and Equinox, `StructuredLinear`, and any module with a ``plan``
    (`structops.spec.Plan`) and a list ``factors``.  The rest is guessed from its shape and marked as such.

    Args:
        model: As in `plan`.
        roles: As in `plan`.
        specs: What arrays are, by a glob of their path, for what no layer tells: the `Plan` of a list of stored
            factors, ``{"up": structure("btt").plan(64, 256)}``, or the pair (in_features, out_features) of a dense
            weight in either order of axes, ``{"*.kernel": (64, 10)}``.
        zero: As in `plan`.

    Raises:
        StructureError: A role is unknown, a spec or a glob does not fit, or there are no parameters.

    Example:
        >>> from structops import structure
        >>> spec = structure("btt").plan(64, 64)
        >>> params = {"up": [jnp.zeros(shape) for shape in spec.stored_shapes], "head": jnp.zeros((64, 10))}
        >>> for weight in weights(params, specs={"up": spec, "head": (64, 10)}):
        ...     print(weight.name, weight.role, weight.factor.fan_in, weight.factor.fan_out)
        head readout 64 10
        up.0 hidden 8 8
        up.1 hidden 8 8
    """
    found = []
    unused = dict.fromkeys(specs or ())
    for leaf, tied in leaves(model):
        pattern, weight = _of_spec(leaf, specs or {})
        unused.pop(pattern, None)
        found.append(replace(_of_layer(leaf) if weight is None else weight, tied=tied))
    if not found:
        raise StructureError(
            f"expected a module of Flax NNX or Equinox, or a tree of parameters; {type(model).__name__} has none"
        )
    for pattern in unused:
        check_glob("specs", pattern, False, found)
    return with_zeros(with_roles(found, roles or {}), zero)


# --------------------------------------------------------------------------------------------------------------- leaves


@dataclass(frozen=True)
class Leaf:
    """A parameter in its model.

    Attributes:
        parts: Its path.
        nodes: What holds it, from the model down; None where a node cannot be reached by its key.
        shape: Its shape.
    """

    parts: tuple[str, ...]
    nodes: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The dotted path."""
        return ".".join(self.parts)

    @property
    def holders(self) -> tuple[Any, Any]:
        """What holds that which holds it, and the latter; None where there is none."""
        return (None, None, *self.nodes)[-2:]

    @property
    def parent(self) -> str:
        """The dotted path of what holds it."""
        return ".".join(self.parts[:-1])


def leaves(model: Any) -> list[tuple[Leaf, bool]]:
    """Every parameter of a model, and whether several layers own it."""
    if isinstance(model, nnx.Module):
        return list(_of_module(model))
    found = []
    for path, array in jax.tree_util.tree_leaves_with_path(model):
        parts, nodes = _descend(model, path)
        # Statistics and caches are not trained.  Equal arrays of a tree are, one by one.
        trained = isinstance(nodes[-1], nnx.Param) or not isinstance(nodes[-1], nnx.Variable)
        if trained and hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.inexact):
            found.append((Leaf(parts, nodes[:-1], tuple(array.shape)), False))
    return found


def _of_module(model: nnx.Module) -> Iterator[tuple[Leaf, bool]]:
    """The parameters of a module of NNX, each once and at the path that its state has."""
    # A layer that has two places counts once: it does not tie its parameters.
    owned = Counter(
        id(value)
        for _, layer in nnx.iter_modules(model)
        for value in vars(layer).values()
        if isinstance(value, nnx.Param)
    )
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts, nodes = _descend(model, path)
        if hasattr(variable, "dtype") and jnp.issubdtype(variable.dtype, jnp.inexact):
            yield Leaf(parts, nodes[:-1], tuple(variable.shape)), owned[id(variable)] > 1


def _descend(model: Any, path: Sequence[Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The path of a parameter as strings, and what lies on it from the model down to its array or its variable."""
    parts: list[str] = []
    nodes = [model]
    for key in path:
        if isinstance(nodes[-1], nnx.Variable):
            break  # the rest of the path only unwraps it
        parts.append(text_of(key))
        nodes.append(_child(nodes[-1], key))
    return tuple(parts), tuple(nodes)


def text_of(key: Any) -> str:
    """A key of a path of any kind as a string."""
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _child(node: Any, key: Any) -> Any:
    """What lies under a key of any kind."""
    name = next((getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)), key)
    try:
        if isinstance(name, str) and hasattr(node, name) and not isinstance(node, Mapping):
            return getattr(node, name)
        return node[name]
    except (KeyError, IndexError, TypeError):
        return None  # a node of a kind of its own, which tells nothing about its parameters


# --------------------------------------------------------------------------------------------------------------- layers


def _of_layer(leaf: Leaf) -> Weight:
    """A parameter as sizes, from what holds it; guessed if that tells nothing."""
    key, shape = leaf.parts[-1] if leaf.parts else "", leaf.shape
    holder, owner = leaf.holders
    if announced := _announced(leaf):
        return announced
    if len(leaf.parts) > 1 and leaf.parts[-2] == "factors" and key.isdigit() and is_structured(holder):
        spec = str(getattr(holder, "structure", "")) or _pattern(holder.plan)
        return _factor(leaf, holder.plan, spec, bool(getattr(holder, "zero_init", False)))
    if is_structured(owner) and key == "gains":
        return _scalar(leaf)
    if is_structured(owner) and key == "bias":
        return _vector(leaf, owner.plan.out_features)
    if key in ("kernel", "weight") and (sizes := _dense(owner, shape)):
        return _matrix(leaf, *sizes)
    if isinstance(owner, nnx.Embed | eqx.nn.Embedding):
        return _table(leaf)
    if key == "bias" and isinstance(owner, nnx.LinearGeneral):
        return _vector(leaf, math.prod(_sizes(owner.out_features)))
    if key == "bias" and isinstance(owner, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return _vector(leaf, owner.out_channels)
    if math.prod(shape) == 1:
        return _scalar(leaf)
    if len(shape) == 1 or isinstance(owner, WITH_VECTORS):
        return _vector(leaf, shape[-1])
    m, n = (shape[-2], shape[-1]) if isinstance(owner, eqx.Module) else (shape[-1], shape[-2])
    name = "weight" if isinstance(owner, eqx.Module) else INPUTS_FIRST
    factor = Factor(name, shape[-2:], fan_in=n, fan_out=m, blocks=math.prod(shape[:-2]))
    return Weight(leaf.name, _layer(leaf), _role(leaf), factor, n, m, known=False)


def _announced(leaf: Leaf) -> Weight | None:
    """What the layer says of a parameter: ``weight_sizes``, a `Weight` by its name in the layer."""
    for depth, holder in enumerate(reversed(leaf.holders), start=1):
        known: Any = getattr(holder, "weight_sizes", None)
        weight = known.get(".".join(leaf.parts[-depth:])) if isinstance(known, Mapping) else None
        if weight is not None:
            layer = ".".join(leaf.parts[:-depth])
            readout = weight.role == "hidden" and layer.rpartition(".")[2] in READOUTS
            return replace(weight, name=leaf.name, layer=layer, role="readout" if readout else weight.role)
    return None


def _dense(owner: Any, shape: tuple[int, ...]) -> Dense | None:
    """The sizes of the dense weight of a known layer.

    Layers that were stacked for a scan have further axes in front.  Groups of a convolution are blocks.
    """
    if isinstance(owner, nnx.Linear):
        return owner.in_features, owner.out_features, shape[-2:], INPUTS_FIRST, 1
    if isinstance(owner, nnx.LinearGeneral):
        n, m = _sizes(owner.in_features), _sizes(owner.out_features)
        return math.prod(n), math.prod(m), (*n, *m), INPUTS_FIRST, 1
    if isinstance(owner, nnx.Conv) or (isinstance(owner, nnx.ConvTranspose) and not owner.transpose_kernel):
        own = tuple(owner.kernel_shape)
        groups = getattr(owner, "feature_group_count", 1)
        return math.prod(own[:-1]), own[-1] // groups, own, INPUTS_FIRST, groups
    if isinstance(owner, eqx.nn.Linear):
        return shape[-1], shape[-2], shape[-2:], "weight", 1
    if isinstance(owner, eqx.nn.Conv | eqx.nn.ConvTranspose):
        own = shape[-2 - len(owner.kernel_size) :]
        return math.prod(own[1:]), own[0] // owner.groups, own, "weight", owner.groups
    return None


def is_structured(owner: Any) -> bool:
    """Whether it is a `StructuredLinear` or a module that is built like one."""
    return isinstance(getattr(owner, "plan", None), Plan) and hasattr(owner, "factors")


def _pattern(spec: Plan) -> str:
    return str(spec.chain.pattern) if hasattr(spec, "chain") else type(spec).__name__


def _sizes(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _layer(leaf: Leaf) -> str:
    """The layer of a matrix: what holds it, or in a tree without layers itself."""
    parts = leaf.parts
    if isinstance(leaf.holders[1], nnx.Module | eqx.Module) or (parts and parts[-1] in KEYS):
        parts = parts[:-1]
    return ".".join(parts)


def _role(leaf: Leaf) -> str:
    return "readout" if _layer(leaf).rpartition(".")[2] in READOUTS else "hidden"


def _factor(leaf: Leaf, spec: Plan, structure: str, zero_init: bool = False) -> Weight:
    """A factor of a structure, which lies in a list."""
    k, count = int(leaf.parts[-1]), len(spec.factors)
    layer = leaf.parent.removesuffix("factors").removesuffix(".")
    role = "readout" if layer.rpartition(".")[2] in READOUTS else "hidden"
    sizes = (spec.in_features, spec.out_features, k, count, structure, zero_init and k == count - 1)
    return Weight(leaf.name, layer, role, spec.factors[k], *sizes)


def _matrix(leaf: Leaf, n: int, m: int, own: tuple[int, ...], order: str, blocks: int) -> Weight:
    factor = Factor(order, own, fan_in=n, fan_out=m, blocks=blocks)
    return Weight(leaf.name, _layer(leaf), _role(leaf), factor, n, m)


def _table(leaf: Leaf) -> Weight:
    size = leaf.shape[-1]
    return Weight(leaf.name, leaf.parent, "embedding", Factor("table", leaf.shape, 1, size), 1, size)


def _vector(leaf: Leaf, size: int) -> Weight:
    return Weight(leaf.name, leaf.parent, "vector", Factor("vector", (size,), 1, size), 1, size)


def _scalar(leaf: Leaf) -> Weight:
    return Weight(leaf.name, leaf.parent, "scalar", Factor("scalar", (1,), 1, 1), 1, 1)


# ------------------------------------------------------------------------------------------------------ what users give


def _of_spec(leaf: Leaf, specs: Specs) -> tuple[str, Weight | None]:
    """The spec that a parameter matches, and the parameter as sizes.

    Raises:
        StructureError: It does not have the shape that the spec says.
    """
    for pattern, spec in specs.items():
        if isinstance(spec, Plan):
            if leaf.parts and leaf.parts[-1].isdigit() and fnmatchcase(leaf.parent, pattern):
                k, shapes = int(leaf.parts[-1]), spec.stored_shapes
                if k >= len(shapes) or leaf.shape[-3:] != shapes[k]:
                    raise StructureError(
                        f"specs: {pattern!r} expects stored factors of shapes {shapes}, got {leaf.shape} as {leaf.name}"
                    )
                return pattern, _factor(leaf, spec, _pattern(spec))
        elif fnmatchcase(leaf.name, pattern):
            return pattern, _matrix(leaf, *_pair(leaf, spec))
    return "", None


def _pair(leaf: Leaf, spec: Any) -> Dense:
    """The sizes of a dense weight that were given."""
    if not isinstance(spec, tuple) or len(spec) != 2 or not all(isinstance(size, int) for size in spec):
        raise StructureError(f"specs: expected a Plan or a pair (in_features, out_features), got {spec!r}")
    n, m = spec
    for start in range(len(leaf.shape)):
        own = leaf.shape[start:]
        for (first, last), order in (((n, m), INPUTS_FIRST), ((m, n), "weight")):
            if any(math.prod(own[:k]) == first and math.prod(own[k:]) == last for k in range(1, len(own))):
                return n, m, own, order, 1
    raise StructureError(f"specs: {leaf.name} has shape {leaf.shape}, which is no weight of {n} inputs, {m} outputs")
