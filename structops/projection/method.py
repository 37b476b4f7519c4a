"""What a method of projection is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from structops._array import Array

Optimality = Literal["exact", "quasi", "local"]


@dataclass(frozen=True)
class Options:
    """How to project.

    Attributes:
        covariance: Second moments of the input, (in_features, in_features), of the dtype of the matrix; or None.
        refine: Sweeps at most; None for as many as the method needs.
        seed: Of a random start beside the deterministic one; None for none.
    """

    covariance: Array | None = None
    refine: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Found:
    """What is known about the result of a method, and the result.

    Attributes:
        optimality: ``"exact"``, ``"quasi"`` or ``"local"``.
        reason: One sentence.
        factors: Stored factors in order of application.
    """

    optimality: Optimality
    reason: str
    factors: tuple[Array, ...] = ()

    def having(self, factors: Sequence[Array]) -> Found:
        """The same judgement of these factors."""
        return replace(self, factors=tuple(factors))


Method = Callable[[Any, Array, Options], Found]  # of a plan, a matrix (out_features, in_features), and options
