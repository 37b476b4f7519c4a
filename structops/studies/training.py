"""What the trainings of both libraries share: the recipe, the order of the batches, and the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from structops.studies.data import Split

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW without decay of weights, the learning rate decayed to zero along a cosine.

    Attributes:
        lr: Learning rate of the dense network of ``base_width``.
        base_width: Width at which ``lr`` is right; other widths follow muP.
        epochs: Passes over the training set.
        batch: Images per step; the rest of an epoch that fills no batch is left out.
        noise: Standard deviation of Gaussian noise on the normalised pixels, drawn anew at every step.
        structure_aware: Whether a factor's learning rate follows from its shape; if not, it is that of the dense layer.
    """

    lr: float = 3e-3
    base_width: int = 64
    epochs: int = 30
    batch: int = 120
    noise: float = 0.5
    structure_aware: bool = True

    def steps(self, data: Split) -> int:
        """Steps of the whole training."""
        return self.epochs * (len(data.train_x) // self.batch)


@dataclass(frozen=True)
class Result:
    """What a training gave.

    Attributes:
        losses: Mean training loss of every epoch, with noise.
        accuracy: Of the test images, without noise, after the last epoch.
    """

    losses: list[float]
    accuracy: float

    @property
    def train_loss(self) -> float:
        """Mean of the last three epochs."""
        return sum(self.losses[-3:]) / len(self.losses[-3:])


def epochs(data: Split, recipe: Recipe, seed: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Per epoch, noisy images (steps, batch, 64) and labels (steps, batch), from the seed alone."""
    rng = np.random.default_rng(seed)
    steps = len(data.train_x) // recipe.batch
    for _ in range(recipe.epochs):
        index = rng.permutation(len(data.train_x))[: steps * recipe.batch].reshape(steps, recipe.batch)
        images = data.train_x[index]
        noise = rng.standard_normal(images.shape, dtype=np.float32)
        yield images + np.float32(recipe.noise) * noise, data.train_y[index]
