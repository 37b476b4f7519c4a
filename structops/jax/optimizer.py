"""The learning rate, weight decay and kind of update of every factor, for optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from structops.errors import StructureError
from structops.jax.weights import INPUTS_FIRST, text_of
from structops.jax.weights import plan as plan_of
from structops.mup import MupPlan, PlanRow, Rule, Weight

Path = tuple[str, ...]
Axes = tuple[int, ...]
Make = Callable[..., optax.GradientTransformation]


def lr_scales(
    model: Any,
    *,
    optimizer: str | Rule = "adam",
    base: Any = None,
    structure_aware: bool = True,
    plan: MupPlan | None = None,
) -> dict[Path, float]:
    """Learning-rate scale of every parameter of a model, by its path.

    Args:
        model: Any module of Flax NNX or Equinox, also a single layer, or a plain tree.
        optimizer: Name of the optimiser's family or a `Rule`; see `structops.mup.FAMILY`.  Not with a plan.
        base: As in `structops.jax.plan`.  Not with a plan.
        structure_aware: If false, factors get the learning rate of the dense layer: the naive baseline of the paper.
        plan: The plan of the model; made here if not given.

    Raises:
        StructureError: No rule for the optimiser, or the base model lacks a layer.

    Example:
        >>> from flax import nnx
        >>> from structops.jax import StructuredLinear
        >>> lr_scales(StructuredLinear(64, 64, "btt", bias=False, rngs=nnx.Rngs(0)))
        {('factors', '0'): 4.0, ('factors', '1'): 4.0}
    """
    whole = _plan(model, plan, optimizer, base, structure_aware)
    return {tuple(row.name.split(".")) if row.name else (): row.lr_scale for row in whole}


def scale_by_mup(
    model: Any,
    plan: MupPlan | None = None,
    *,
    optimizer: str | Rule = "adam",
    base: Any = None,
    structure_aware: bool = True,
) -> optax.GradientTransformation:
    """Multiply the update of every parameter by its learning-rate scale; stateless, to be chained last.

    ``optax.chain(optax.adam(lr), scale_by_mup(model))`` gives each factor ``lr`` times the multiplier of
    `structops.mup.scales` and everything else ``lr``.  Decoupled weight decay inside the chain is scaled alike, which
    is the policy ``"coupled"``; `partition` follows the others.

    Args:
        model: The model whose parameters are trained, or its plan.
        plan: The plan of the model; made here if not given.
        optimizer: As in `lr_scales`.
        base: As in `lr_scales`.
        structure_aware: As in `lr_scales`.

    Raises:
        StructureError: No rule for the optimiser, or the base model lacks a layer.  In an update: the plan has no
            parameter of its path, so it is that of another model.

    Example:
        >>> import jax.numpy as jnp
        >>> from structops import structure
        >>> from structops.jax import plan
        >>> spec = structure("btt").plan(64, 64)
        >>> params = {"up": [jnp.ones(shape) for shape in spec.stored_shapes]}
        >>> transform = optax.chain(optax.sgd(1.0), scale_by_mup(plan(params, specs={"up": spec})))
        >>> updates, _ = transform.update(params, transform.init(params))
        >>> float(updates["up"][0][0, 0, 0])
        -4.0
    """
    find = row_finder(_plan(model, plan, optimizer, base, structure_aware))

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        return update * find(path).lr_scale

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def partition(
    make_optimizer: Make,
    plan: Any,
    *,
    lr: float | optax.Schedule,
    weight_decay: float = 0.0,
    eps: float | None = None,
    make_adam: Make | None = None,
    adam_lr: float | optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for every distinct learning rate and weight decay of a plan.

    So weight decay, which an optimiser multiplies by its own learning rate, follows the policy of the plan.

    Args:
        make_optimizer: Called as ``make_optimizer(lr, weight_decay=...)``; ``optax.adamw`` will do.  One that knows
            no weight decay is wrapped: ``lambda lr, weight_decay: optax.sgd(lr)``.
        plan: The plan of the model, or the model.
        lr: Learning rate of the plan's reference, or its schedule.
        weight_decay: Decay of a dense weight; biases, gains and scalars do not decay.
        eps: Adam's eps, scaled by the plan and passed on as ``eps=``; left to the optimiser if not given.
        make_adam: For plans of an optimiser of matrices: what takes the rest, called alike.  ``make_optimizer``, if
            not given.
        adam_lr: Learning rate of the rest; ``lr`` if not given.

    Raises:
        StructureError: As for `scale_by_mup`.

    Example:
        >>> import equinox as eqx
        >>> model = eqx.filter(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)), eqx.is_array)
        >>> transform = partition(optax.adamw, model, lr=1e-3, weight_decay=0.1)
        >>> sorted(transform.init(model).inner_states)
        ['adam, lr x 1.0, wd 0.0', 'adam, lr x 1.0, wd 0.1']
    """
    whole = _plan(plan)
    find, has_rest = row_finder(whole), whole.rule.family.matrices_only

    def label(row: PlanRow) -> str:
        text = f"{row.optimizer}, lr x {row.lr_scale}, wd {row.wd_scale * weight_decay}"
        return text if eps is None else f"{text}, eps x {row.eps_scale}"

    def make(row: PlanRow) -> optax.GradientTransformation:
        rest = has_rest and row.optimizer == "adam"
        rate = adam_lr if rest and adam_lr is not None else lr
        more = {} if eps is None else {"eps": eps * row.eps_scale}
        build = make_adam if rest and make_adam is not None else make_optimizer
        return build(_times(rate, row.lr_scale), weight_decay=row.wd_scale * weight_decay, **more)

    return optax.partition(
        {text: make(row) for text, row in {label(row): row for row in whole}.items()},
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: label(find(path)), params),
    )


def muon_dims(plan: Any) -> Callable[[Any], Any]:
    """What ``optax.contrib.muon`` takes as ``muon_weight_dimension_numbers``, so that it sees the blocks.

    Of a stored factor (blocks, fan_out, fan_in) it orthogonalises every block by itself.  What it should not take,
    such as embeddings, the readout and vectors, is None, which gives it to Adam.  The kernel of a grouped convolution,
    whose groups are no axis, is taken whole.

    Args:
        plan: A plan for an optimiser of matrices, such as ``plan(model, "muon")``; or the model, for ``"muon"``.

    Returns:
        A function from parameters to a tree of ``MuonDimensionNumbers`` and None.

    Raises:
        StructureError: The plan is for an optimiser that takes all parameters.

    Example:
        >>> from flax import nnx
        >>> from structops.jax import StructuredLinear, plan
        >>> layer = StructuredLinear(64, 64, "btt", bias=False, rngs=nnx.Rngs(0))
        >>> rows = plan(layer, "muon")
        >>> transform = optax.chain(
        ...     optax.contrib.muon(2e-2, muon_weight_dimension_numbers=muon_dims(rows)), scale_by_mup(rows)
        ... )
    """
    whole = _plan(plan, optimizer="muon")
    if not whole.rule.family.matrices_only:
        raise StructureError(
            f"muon_dims takes a plan for an optimiser of matrices such as plan(model, 'muon'), got one for "
            f"{whole.rule.optimizer!r}"
        )
    find = row_finder(whole)

    def numbers(path: Any, _: Any) -> MuonDimensionNumbers | None:
        row = find(path)
        return None if row.optimizer == "adam" else MuonDimensionNumbers(*matrix_axes(row.weight))

    return lambda params: jax.tree_util.tree_map_with_path(numbers, params)


def matrix_axes(weight: Weight) -> tuple[Axes, Axes]:
    """Axes of inputs and of outputs of a stored matrix, counted from the last; those in front are blocks.

    Example:
        >>> from structops.chain import Factor
        >>> kernel = Factor("kernel", (3, 3, 8, 16), fan_in=72, fan_out=16)
        >>> matrix_axes(Weight("conv.kernel", "conv", "hidden", kernel, 72, 16))
        ((-4, -3, -2), (-1,))
    """
    if weight.structure:
        return (-1,), (-2,)
    factor, rank = weight.factor, len(weight.factor.shape)
    inputs_first = factor.name == INPUTS_FIRST
    first = factor.fan_in if inputs_first else factor.fan_out
    split = next((k for k in range(1, rank) if math.prod(factor.shape[:k]) == first), 1)
    front, back = tuple(range(-rank, split - rank)), tuple(range(split - rank, 0))
    return (front, back) if inputs_first else (back, front)


# ---------------------------------------------------------------------------------------------------------------- plans


def _plan(
    model: Any,
    plan: MupPlan | None = None,
    optimizer: str | Rule = "adam",
    base: Any = None,
    structure_aware: bool = True,
) -> MupPlan:
    """The plan that is given, or that of the model."""
    if plan is not None or isinstance(model, MupPlan):
        return model if plan is None else plan
    rule = optimizer if isinstance(optimizer, Rule) else Rule(optimizer)
    return plan_of(model, rule if structure_aware else replace(rule, structure_aware=False), base=base)


def row_finder(plan: MupPlan) -> Callable[[Any], PlanRow]:
    """A function from the path of a parameter in a tree of any kind to its row.

    It raises a StructureError where the plan has no such parameter.
    """
    rows = {row.name: row for row in plan}

    def find(path: Any) -> PlanRow:
        name = ".".join(text_of(key) for key in path)
        # The last key may only unwrap a variable of NNX.
        parent, _, last = name.rpartition(".")
        for found in (name, parent if last in ("value", "raw_value") else name):
            if found in rows:
                return rows[found]
        raise StructureError(f"the plan has no parameter {name!r}; it is that of another model")

    return find


def _times(rate: float | optax.Schedule, scale: float) -> Any:
    """A learning rate or its schedule, scaled."""
    return (lambda count: rate(count) * scale) if callable(rate) else rate * scale
