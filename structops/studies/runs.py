"""One training of a study, as settings: a network, its data, and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from structops.errors import StructureError
from structops.studies.data import Augment, Task, load
from structops.studies.models import Model


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW, with rates that follow the factors' shapes and the width.

    Attributes:
        lr: Learning rate of the dense network of ``base_width``.
        base_width: Width at which ``lr`` is right; other widths follow muP.
        structure_aware: Whether a factor's learning rate follows from its shape; if not, it is that of the dense layer.
        epochs: Passes over the training data, if ``steps`` is 0.
        steps: Optimiser steps.
        batch: Examples per step.
        warmup: Steps of linear warm-up.
        schedule: ``cosine`` to zero, or ``constant``.
        weight_decay: That of AdamW for dense weights.
        clip: Largest norm of the gradient; 0 for none.
    """

    lr: float = 3e-3
    base_width: int = 64
    structure_aware: bool = True
    epochs: int = 20
    steps: int = 0
    batch: int = 128
    warmup: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise StructureError(f"schedule {self.schedule!r} not among cosine, constant")
        if self.lr <= 0 or self.batch < 1 or (self.steps or self.epochs) < 1:
            raise StructureError(f"a training needs a positive rate, a batch and a step, got {self}")

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied by at a step, from 0 on."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / steps) if self.schedule == "cosine" else 1.0)


@dataclass(frozen=True)
class Data:
    """What `structops.studies.data.load` is called with.

    Attributes:
        name: Of the data.
        augment: Of training batches.
        permute_pixels: Whether images become vectors in one random order of pixels.
        options: Further arguments, as (name, value) pairs.
    """

    name: str
    augment: Augment = field(default_factory=Augment)
    permute_pixels: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Task:
        """The task; that of the last few calls is kept."""
        return _loaded(self)


@lru_cache(maxsize=4)
def _loaded(data: Data) -> Task:
    return load(data.name, augment=data.augment, permute_pixels=data.permute_pixels, **dict(data.options))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: Name of the network, of `structops.studies.models.MODELS`.
        model: Its sizes.
        data: What it is trained on.
        recipe: How it is trained.
        seed: Of initial values and of batches.
    """

    kind: str
    model: Model
    data: Data
    recipe: Recipe
    seed: int = 0
