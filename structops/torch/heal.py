"""A short training after a conversion: the model learns to answer as its dense teacher does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from structops._progress import track
from structops.errors import EntryError, ShapeError, StructureError
from structops.torch.batches import Forward, call, checked, device_of, mask_of, moved, restore
from structops.torch.groups import param_groups

Match = Literal["logits", "values"]


@dataclass(frozen=True)
class Healing:
    """What `heal` gave.

    Attributes:
        losses: The loss of every step, before it.
        distances: The part of it that is the distance to the teacher; empty without a teacher.
    """

    losses: list[float]
    distances: list[float]

    def __repr__(self) -> str:
        """Steps, and the means of the first and the last tenth."""
        tenth = -(-len(self.losses) // 10)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        return f"Healing({len(self.losses)} steps, loss {first:.3g} -> {last:.3g})"


def heal(
    model: nn.Module,
    data: Iterable[Any],
    teacher: nn.Module | None = None,
    *,
    steps: int = 1000,
    lr: float = 1e-3,
    loss: Callable[[Any, Any], Tensor] | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    match: Match = "logits",
    optimizer: torch.optim.Optimizer | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    schedule: Literal["cosine", "linear"] = "cosine",
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Healing:
    r"""Train a model in place for some steps, towards a teacher, a loss, or both.

    A convenience for the time after `structops.torch.structurize`, with one optimiser on one process; any other
    training loop over `structops.torch.param_groups` does as well.

    **Definition.** The loss of a step is \(\alpha\) times the distance to the teacher plus \(1 - \alpha\) times
    ``loss``; without one of the two it is the other.  The distance is \(T^2\,\mathrm{KL}(p_T \| q_T)\) of the softmax
    at temperature T, the mean over all vectors of logits, or the mean squared error of values.

    Args:
        model: Trained in place.  Parameters with ``requires_grad=False`` stay as they are.
        data: Batches as for `structops.torch.calibrate`; gone through again as often as needed.
        teacher: The model before its conversion, for example.
        steps: Batches that are trained on.
        lr: Largest learning rate of a dense layer; that of a factor follows by `structops.torch.param_groups`.
        loss: Of the output and the batch: ``lambda output, batch: cross_entropy(output, batch[1])``, or
            ``lambda output, batch: output.loss`` with transformers.
        alpha: Share of the teacher.
        temperature: T.
        match: ``"logits"``, or ``"values"`` for a regression.  Outputs of transformers are taken by their ``logits`` or
            their ``last_hidden_state``; an ``attention_mask`` leaves out padding.
        optimizer: Instead of AdamW over `param_groups`; with its own learning rates, then ``lr`` and ``weight_decay``
            play no part.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises.
        schedule: How it falls to zero after that.
        clip: Largest norm of the gradient; None for none.
        autocast: Dtype of mixed precision, ``torch.bfloat16``.
        forward: ``forward(model, batch)``, as for `structops.torch.calibrate`.
        seed: Of dropout and of data that draw from torch's global generator, which is put back afterwards.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        The losses.  Both models are in the modes that they had before.

    Raises:
        StructureError: Neither teacher nor loss, no parameter to train, a teacher that shares one, no batches, an
            iterator that ends early, or an argument out of its range.
        ShapeError: Outputs of the two models differ in shape.
        EntryError: A loss is not finite.  The model is as the steps before left it.

    **Cost.** A step is one of an ordinary training, and a forward pass of the teacher.

    **Numerics.** Distances are computed in float32.  Parameters of 16 bits lose small updates: keep them in float32,
    and give ``autocast``.

    **References.** Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531).

    Example:
        >>> from structops.torch import structurize
        >>> teacher = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
        >>> model = structurize(teacher, "low_rank(rank=2)")
        >>> done = heal(model, torch.randn(20, 64, 16).unbind(), teacher, steps=100, lr=1e-2, seed=0)
        >>> len(done.losses), done.losses[-1] < done.losses[0]
        (100, True)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check(trained, teacher, loss, steps, alpha, temperature, match, warmup, schedule, autocast)
    if optimizer is None:
        optimizer = torch.optim.AdamW(param_groups(model, lr=lr, weight_decay=weight_decay))
    rises = max(1, round(warmup * steps))
    fall = {"cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t), "linear": lambda t: 1 - t}[schedule]
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: (k + 1) / rises if k < rises else fall((k - rises) / max(1, steps - rises))
    )
    run, place = forward or call, device_of(model)
    kind = "cpu" if place is None else place.type
    done = Healing([], [])
    with ExitStack() as stack:
        stack.callback(restore, [(module, module.training) for module in model.modules()])
        if seed is not None:
            stack.enter_context(torch.random.fork_rng([place] if kind == "cuda" else []))
            torch.manual_seed(seed)
        model.train()
        if teacher is not None:
            stack.callback(restore, [(module, module.training) for module in teacher.modules()])
            teacher.eval()
        for batch in track(_again(checked(data), steps), "healing", steps, progress):
            batch = moved(batch, place)
            with torch.autocast(kind, autocast, enabled=autocast is not None):
                output = run(model, batch)
                parts = [] if loss is None else [loss(output, batch)]
                if teacher is not None:
                    with torch.no_grad():
                        wanted = run(teacher, batch)
                    parts.append(_distance(output, wanted, mask_of(batch), match, temperature))
            total = parts[0] if len(parts) == 1 else (1 - alpha) * parts[0] + alpha * parts[1]
            done.losses.append(float(total.detach()))
            if teacher is not None:
                done.distances.append(float(parts[-1].detach()))
            if not math.isfinite(done.losses[-1]):
                raise EntryError(
                    f"heal: the loss of step {len(done.losses)} is {done.losses[-1]}; try a smaller lr (it is {lr:g}), "
                    f"a longer warmup, clip=1.0, float32 parameters, and data without values that are not finite"
                )
            optimizer.zero_grad()
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            rates.step()
        optimizer.zero_grad()
    return done


def _distance(output: Any, wanted: Any, mask: Tensor | None, match: Match, temperature: float) -> Tensor:
    """How far the output is from that of the teacher.

    Raises:
        ShapeError: They have different shapes, or logits of one class.
    """
    ours, theirs = (_tensor(value).float() for value in (output, wanted))
    if ours.shape != theirs.shape:
        raise ShapeError(f"heal: the model gives {tuple(ours.shape)}, the teacher {tuple(theirs.shape)}")
    if match == "logits" and ours.shape[-1] == 1:
        raise ShapeError("heal: the softmax of a single output is always 1; give match='values' for a regression")
    if match == "values":
        each = (ours - theirs).square().mean(-1)
    else:
        logs, wants = (functional.log_softmax(value / temperature, -1) for value in (ours, theirs))
        each = temperature**2 * functional.kl_div(logs, wants, reduction="none", log_target=True).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    return each[mask.to(each.device) != 0].mean()


def _tensor(output: Any) -> Tensor:
    """The output that is compared.

    Raises:
        StructureError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise StructureError(
        f"heal: expected a tensor or an output with logits or last_hidden_state, got {type(output).__name__}; "
        f"give forward=lambda model, batch: ... that returns the tensor to compare"
    )


def _again(data: Iterable[Any], steps: int) -> Iterator[Any]:
    """As many batches as there are steps.

    Raises:
        StructureError: There is none, or an iterator ends early.
    """
    given = 0
    while given < steps:
        before = given
        for batch in data:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise StructureError(
                f"heal: there is no batch after {given} of {steps} steps; give data that can be gone through again, "
                f"such as a list or a DataLoader"
            )


def _check(
    trained: list[nn.Parameter],
    teacher: nn.Module | None,
    loss: Any,
    steps: int,
    alpha: float,
    temperature: float,
    match: str,
    warmup: float,
    schedule: str,
    autocast: torch.dtype | None,
) -> None:
    """Arguments that make sense.

    Raises:
        StructureError: They do not.
    """
    if teacher is None and loss is None:
        raise StructureError("heal: give a teacher, such as the model before structurize, or a loss, or both")
    if not trained:
        raise StructureError("heal: no parameter of the model has requires_grad=True")
    theirs = set() if teacher is None else {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in theirs for parameter in trained):
        raise StructureError(
            "heal: model and teacher share parameters that would be trained; structurize(model, ...) without "
            "inplace=True leaves the dense model as the teacher"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise StructureError(f"heal: steps must be a whole number of at least 1, got {steps!r}")
    if not 0 <= alpha <= 1 or not 0 <= warmup <= 1:
        raise StructureError(f"heal: alpha and warmup are shares from 0 to 1, got {alpha!r} and {warmup!r}")
    if not temperature > 0:
        raise StructureError(f"heal: temperature must be positive, got {temperature!r}")
    if match not in ("logits", "values"):
        raise StructureError(f"heal: match is 'logits' or 'values', got {match!r}")
    if schedule not in ("cosine", "linear"):
        raise StructureError(f"heal: schedule is 'cosine' or 'linear', got {schedule!r}")
    if autocast is torch.float16:
        raise StructureError("heal: float16 would need its loss scaled; give autocast=torch.bfloat16")
