"""A short training after a conversion: the model learns to answer as its dense teacher does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from structops._progress import track
from structops.conversion.healing import (
    Healing,
    Match,
    Schedule,
    check_loss,
    check_options,
    check_outputs,
    check_teacher,
    compared,
)
from structops.errors import StructureError
from structops.torch.batches import Forward, again, call, checked, device_of, mask_of, moved, restore
from structops.torch.groups import param_groups


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
    schedule: Schedule = "cosine",
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
    check_options(teacher, loss, steps, alpha, temperature, match, warmup, schedule)
    if not trained:
        raise StructureError("heal: no parameter of the model has requires_grad=True")
    check_teacher(set(map(id, trained)), set() if teacher is None else set(map(id, teacher.parameters())))
    if autocast is torch.float16:
        raise StructureError("heal: float16 would need its loss scaled; give autocast=torch.bfloat16")
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
        for batch in track(again(checked(data), steps), "healing", steps, progress):
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
            check_loss(done.losses, lr)
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
    ours, theirs = (compared(value, Tensor, "a tensor").float() for value in (output, wanted))
    check_outputs(ours.shape, theirs.shape, match)
    if match == "values":
        each = (ours - theirs).square().mean(-1)
    else:
        logs, wants = (functional.log_softmax(value / temperature, -1) for value in (ours, theirs))
        each = temperature**2 * functional.kl_div(logs, wants, reduction="none", log_target=True).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    return each[mask.to(each.device) != 0].mean()
