"""A short training after a conversion: the model learns to answer as its dense teacher does; twin of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from structops._progress import track
from structops.conversion import healing
from structops.conversion.healing import (
    Match,
    Schedule,
    check_loss,
    check_options,
    check_outputs,
    check_teacher,
    compared,
)
from structops.errors import StructureError
from structops.jax.batches import Forward, again, call, checked, functional, mask_of
from structops.jax.optimizer import partition
from structops.jax.weights import plan


@dataclass(frozen=True, repr=False)
class Healing(healing.Healing):
    """What `heal` gave.

    Attributes:
        losses: The loss of every step, before it.
        distances: The part of it that is the distance to the teacher; empty without a teacher.
        model: The trained model: of Flax NNX the one that was given, of Equinox a new one.
    """

    model: Any


def heal(
    model: Any,
    data: Iterable[Any],
    teacher: Any = None,
    *,
    steps: int = 1000,
    lr: float = 1e-3,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    match: Match = "logits",
    optimizer: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    schedule: Schedule = "cosine",
    clip: float | None = 1.0,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Healing:
    r"""Train a model for some steps, towards a teacher, a loss, or both.

    A convenience for the time after `structops.jax.structurize`, with one optimiser; any other training loop with
    `structops.jax.partition` or `structops.jax.scale_by_mup` does as well.

    **Definition.** The loss of a step is \(\alpha\) times the distance to the teacher plus \(1 - \alpha\) times
    ``loss``; without one of the two it is the other.  The distance is \(T^2\,\mathrm{KL}(p_T \| q_T)\) of the softmax
    at temperature T, the mean over all vectors of logits, or the mean squared error of values.

    Args:
        model: A module of Flax NNX, which is changed in place, or of Equinox.  ``nnx.Param`` and arrays of
            floating-point numbers are trained.
        data: Batches as for `structops.jax.calibrate`; gone through again as often as needed.
        teacher: The model before its conversion, for example.
        steps: Batches that are trained on.
        lr: Largest learning rate of a dense layer; that of a factor follows by `structops.jax.plan`.
        loss: Of the output and the batch, in JAX: ``lambda output, batch: ((output - batch[1]) ** 2).mean()``.
        alpha: Share of the teacher.
        temperature: T.
        match: ``"logits"``, or ``"values"`` for a regression; an ``attention_mask`` leaves out padding.
        optimizer: Instead of AdamW by the plan; with its own learning rates, then ``lr``, ``weight_decay``, ``warmup``
            and ``schedule`` play no part.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises.
        schedule: How it falls to zero after that.
        clip: Largest norm of the gradient; None for none.
        forward: ``forward(model, batch)``, as for `structops.jax.calibrate`.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        The losses, and the model.  The modes of both models are as they were; the one that is trained ran in training
        mode, with the random streams that it has.

    Raises:
        StructureError: Neither teacher nor loss, no parameter to train, a teacher that shares variables, no batches, an
            iterator that ends early, no module, or an argument out of its range.
        ShapeError: Outputs of the two models differ in shape.
        EntryError: A loss is not finite.  The model is as it was.

    **Cost.** A step is one of an ordinary training, and a forward pass of the teacher.  It is compiled once for every
    shape of a batch.

    **Numerics.** Distances are computed in float32 at least.  Parameters of 16 bits lose small updates: keep them in
    float32, and let the layers compute in 16 bits (``dtype=`` in NNX).

    **References.** Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531).

    Example:
        >>> from structops.jax import structurize
        >>> rngs = nnx.Rngs(0)
        >>> teacher = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.gelu, nnx.Linear(32, 4, rngs=rngs))
        >>> model = structurize(teacher, "low_rank(rank=2)")
        >>> data = jax.random.normal(jax.random.key(0), (20, 64, 16))
        >>> done = heal(model, list(data), teacher, steps=100, lr=1e-2)
        >>> len(done.losses), done.losses[-1] < done.losses[0]
        (100, True)
    """
    check_options(teacher, loss, steps, alpha, temperature, match, warmup, schedule)
    check_teacher(_parameters(model), _parameters(teacher))
    student = functional(model, True)
    if not jax.tree.leaves(student.trained):
        raise StructureError("heal: the model has no parameter to train")
    master = None if teacher is None else functional(teacher, False)
    transform = optimizer or _adamw(student.trained, model, lr, weight_decay, warmup, schedule, steps)
    if clip is not None:
        transform = optax.chain(optax.clip_by_global_norm(clip), transform)
    run = forward or call

    def objective(trained: Any, rest: Any, taught: Any, batch: Any) -> Any:
        module = student.build(trained, rest)
        output = run(module, batch)
        parts = [] if loss is None else [loss(output, batch)]
        if master is not None:
            wanted = run(master.build(*taught), batch)
            parts.append(_distance(output, wanted, mask_of(batch), match, temperature))
        total = parts[0] if len(parts) == 1 else (1 - alpha) * parts[0] + alpha * parts[1]
        return total, (parts[-1], student.rest_of(module))

    @jax.jit
    def step(trained: Any, rest: Any, state: Any, taught: Any, batch: Any) -> Any:
        (total, (distance, rest)), gradient = jax.value_and_grad(objective, has_aux=True)(trained, rest, taught, batch)
        updates, state = transform.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), rest, state, total, distance

    trained, rest, state = student.trained, student.rest, transform.init(student.trained)
    taught = None if master is None else (master.trained, master.rest)
    losses: list[float] = []
    distances: list[float] = []
    for batch in track(again(checked(data), steps), "healing", steps, progress):
        trained, rest, state, total, distance = step(trained, rest, state, taught, batch)
        losses.append(float(total))
        if taught is not None:
            distances.append(float(distance))
        check_loss(losses, lr)
    if isinstance(model, nnx.Module):
        nnx.update(model, trained, rest)
        return Healing(losses, distances, model)
    fixed = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    return Healing(losses, distances, eqx.combine(trained, fixed))


def _adamw(
    params: Any, model: Any, lr: float, weight_decay: float, warmup: float, schedule: str, steps: int
) -> optax.GradientTransformation:
    """AdamW with the learning rates of the plan, which rise and fall."""
    rises = max(1, round(warmup * steps))

    def rate(count: Any) -> Any:
        t = (count - rises) / max(1, steps - rises)
        fall = 0.5 + 0.5 * jnp.cos(jnp.pi * t) if schedule == "cosine" else 1 - t
        return lr * jnp.where(count < rises, (count + 1) / rises, fall)

    rows = plan(model if isinstance(model, nnx.Module) else params)
    return partition(optax.adamw, rows, lr=rate, weight_decay=weight_decay)


def _distance(output: Any, wanted: Any, mask: Any, match: Match, temperature: float) -> jax.Array:
    """How far the output is from that of the teacher.

    Raises:
        ShapeError: They have different shapes, or logits of one class.
    """
    ours, theirs = (_array(value) for value in (output, wanted))
    check_outputs(ours.shape, theirs.shape, match)
    if match == "values":
        each = ((ours - theirs) ** 2).mean(-1)
    else:
        logs, wants = (jax.nn.log_softmax(value / temperature, -1) for value in (ours, theirs))
        each = temperature**2 * (jnp.exp(wants) * (wants - logs)).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    return jnp.where(mask != 0, each, 0).sum() / (mask != 0).sum()


def _array(output: Any) -> jax.Array:
    """The output that is compared, in float32 at least."""
    value = compared(output, jax.Array, "an array")
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _parameters(model: Any) -> set[int]:
    """The identities of the parameters of a module of Flax NNX; nothing is trained in place in other models."""
    if not isinstance(model, nnx.Module):
        return set()
    values = (value for _, module in nnx.iter_modules(model) for value in vars(module).values())
    return {id(value) for value in values if isinstance(value, nnx.Param)}
