"""What healing a model is in every library: its result, and what is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from structops.errors import EntryError, ShapeError, StructureError

Match = Literal["logits", "values"]
Schedule = Literal["cosine", "linear"]
OUTPUTS = ("logits", "last_hidden_state")  # of models of transformers


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


def check_options(
    teacher: Any, loss: Any, steps: int, alpha: float, temperature: float, match: str, warmup: float, schedule: str
) -> None:
    """Arguments that make sense.

    Raises:
        StructureError: They do not.
    """
    if teacher is None and loss is None:
        raise StructureError("heal: give a teacher, such as the model before structurize, or a loss, or both")
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


def check_teacher(trained: set[int], taught: set[int]) -> None:
    """A teacher that stays as it is.

    Args:
        trained: The identities of the parameters that are trained.
        taught: Those of the parameters of the teacher.

    Raises:
        StructureError: They share one.
    """
    if trained & taught:
        raise StructureError(
            "heal: model and teacher share parameters that would be trained; structurize(model, ...) without "
            "inplace=True leaves the dense model as the teacher"
        )


def check_loss(losses: Sequence[float], lr: float) -> None:
    """The last loss is a number.

    Raises:
        EntryError: It is infinite or none.
    """
    if not math.isfinite(losses[-1]):
        raise EntryError(
            f"heal: the loss of step {len(losses)} is {losses[-1]}; try a smaller lr (it is {lr:g}), a longer "
            f"warmup, clip=1.0, float32 parameters, and data without values that are not finite"
        )


def check_outputs(ours: Sequence[int], theirs: Sequence[int], match: str) -> None:
    """Shapes of two outputs that have a distance.

    Raises:
        ShapeError: They differ, or are those of logits of one class.
    """
    if tuple(ours) != tuple(theirs):
        raise ShapeError(f"heal: the model gives {tuple(ours)}, the teacher {tuple(theirs)}")
    if match == "logits" and ours[-1] == 1:
        raise ShapeError("heal: the softmax of a single output is always 1; give match='values' for a regression")


def compared(output: Any, kind: type, what: str) -> Any:
    """The array of an output that is compared; ``kind`` is its type, and ``what`` the word of messages for it.

    Raises:
        StructureError: There is none.
    """
    if isinstance(output, kind):
        return output
    for name in OUTPUTS:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, kind):
            return value
    raise StructureError(
        f"heal: expected {what} or an output with logits or last_hidden_state, got {type(output).__name__}; "
        f"give forward=lambda model, batch: ... that returns the {what.split()[-1]} to compare"
    )
