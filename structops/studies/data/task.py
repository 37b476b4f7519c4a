"""A task: a training set and a test set, read in batches that follow from a seed and the number of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from structops.errors import ShapeError
from structops.studies.data.augment import NOTHING, Augment, Boxes, Draws, blend, resized_crops, soft_targets

Numbers = np.ndarray[Any, Any]
Kind = Literal["classification", "regression", "language"]


class Source(Protocol):
    """Examples that are read by their numbers."""

    def __len__(self) -> int:
        """Examples that :meth:`in_order` names."""

    def choose(self, step: int, batch_size: int, seed: int) -> Numbers:
        """Numbers of the examples of a training step, shape (batch_size,)."""

    def in_order(self) -> Numbers:
        """Numbers of all the examples, each once; for the test."""

    def read(self, index: Numbers, boxes: Boxes | None = None) -> tuple[Numbers, Numbers]:
        """The inputs and the targets of examples; ``boxes`` are what to cut out of each image before it is resized."""


class Examples:
    """Base of the sources that pass over their examples epoch by epoch, each epoch in an order of its own."""

    def __len__(self) -> int:
        raise NotImplementedError

    def choose(self, step: int, batch_size: int, seed: int) -> Numbers:
        """Batch ``step`` of the permutations of all epochs; the rest of an epoch that fills no batch is left out."""
        epoch, position = divmod(step, len(self) // batch_size)
        return shuffled(len(self), seed, epoch)[position * batch_size : (position + 1) * batch_size]

    def in_order(self) -> Numbers:
        """0, 1, 2, ..."""
        return np.arange(len(self))


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> Numbers:
    """The order of the examples in one epoch; read-only, since the next step gets the same array."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class Arrays(Examples):
    """Examples that are held in memory.

    Attributes:
        x: Inputs, shape (examples, ...).  Bytes are kept as bytes until a batch is read.
        y: Labels, int64 of shape (examples,), or targets, float32 of shape (examples,).
        mean: What to subtract from the inputs of a batch; broadcasts against one example.
        std: What to divide by then.
    """

    x: Numbers
    y: Numbers
    mean: Numbers | None = None
    std: Numbers | None = None

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: Numbers, boxes: Boxes | None = None) -> tuple[Numbers, Numbers]:
        """The normalised inputs as float32, and the targets; ``boxes`` are cut out and resized to the whole image."""
        x = self.x[index].astype(np.float32)
        if self.mean is not None:
            x -= self.mean.astype(np.float32)
        if self.std is not None:
            x /= self.std.astype(np.float32)
        if boxes is not None:
            x = resized_crops(x, boxes)
        return x, self.y[index]


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is trained on and tested on.

    Attributes:
        name: The text that :func:`structops.studies.data.load` made it of.
        kind: "classification", "regression" or "language" (the next token is the target).
        train: Training examples.
        test: Test examples, none of which is a training example.
        input_shape: Of one input: (channels, height, width), (features,) or (context,).
        num_classes: Classes; 0 unless the task is classification.
        vocab_size: Tokens of the vocabulary; 0 unless the task is language.
        augment: What is done to the batches of the training, never to those of the test.
        pixel_order: A fixed order of the pixels of all inputs, shape (features,), after which images are vectors.
        tokenizer: ``encode`` and ``decode`` of text; None if the data came as tokens or are no text.
        facts: What a report should say of the data: source, licence, checksum.
    """

    name: str
    kind: Kind
    train: Source
    test: Source
    input_shape: tuple[int, ...]
    num_classes: int = 0
    vocab_size: int = 0
    augment: Augment = NOTHING
    pixel_order: Numbers | None = None
    tokenizer: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.augment.check(self.kind, 3 if self.pixel_order is not None else len(self.input_shape))

    @property
    def out_features(self) -> int:
        """Outputs that a network needs: the classes, one number, or the vocabulary."""
        return {"classification": self.num_classes, "regression": 1, "language": self.vocab_size}[self.kind]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the training set; for text, batches of as many tokens as the set has.

        Raises:
            ShapeError: If not even one batch can be filled.
        """
        if not 1 <= batch_size <= len(self.train):
            raise ShapeError(f"{self.name}: a batch has 1 to {len(self.train)} training examples, got {batch_size}")
        return len(self.train) // batch_size

    def batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> tuple[Numbers, Numbers]:
        """The inputs and targets of a training step, a pure function of the arguments.

        Images and tables pass by epoch for epoch, each in the order ``default_rng([seed, epoch]).permutation``; of
        text, every step takes windows at random.  Process ``rank`` of ``world`` gets rows ``rank·batch_size/world`` to
        ``(rank+1)·batch_size/world`` of the batch that a single process would get, the same random numbers included.

        Args:
            step: From 0 on, through all epochs.
            batch_size: Examples of all processes together.
            seed: Of the order and the augmentation.
            rank: Of this process.
            world: Number of processes that share the batch.

        Returns:
            Inputs, float32 of shape (b, *input_shape) or for text int64 (b, context); and targets, int64 labels (b,),
            or float32 class probabilities (b, num_classes) if MixUp or label smoothing is on, float32 (b,) for
            regression, or int64 (b, context) for text.

        Raises:
            ShapeError: If the batch is larger than the training set or not a multiple of ``world``.
        """
        self.steps_per_epoch(batch_size)
        if step < 0 or not 0 <= rank < world:
            raise ShapeError(f"expected step >= 0 and 0 <= rank < world, got step {step}, rank {rank}, world {world}")
        if batch_size % world:
            raise ShapeError(f"{world} processes cannot share {batch_size} examples evenly: take a multiple of {world}")
        index = self.train.choose(step, batch_size, seed)
        rows = np.arange(batch_size // world) + rank * (batch_size // world)
        if not self.augment:
            return self._arranged(*self.train.read(index[rows]))

        # Every process draws for the whole batch, so that what an image gets does not depend on who reads it.
        rng = np.random.default_rng([seed, step, 1])
        draws = Draws.sample(rng, batch_size, math.prod(self.input_shape), self.augment)
        x, y = self._augmented(index, draws, rows)
        if self.kind == "classification" and self.augment.soft:
            y = soft_targets(y, self.num_classes, self.augment.smoothing)
        if draws.partner is not None:
            others, theirs = self._augmented(index, draws, draws.partner[rows])
            if self.kind == "classification":
                theirs = soft_targets(theirs, self.num_classes, self.augment.smoothing)
            x, y = blend(x, others, draws.weight), blend(y, theirs, draws.weight)
        return self._arranged(x, y)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Numbers, Numbers]]:
        """The whole test set in order and without augmentation; the last batch may be smaller."""
        if batch_size < 1:
            raise ShapeError(f"a batch has at least one example, got {batch_size}")
        order = self.test.in_order()
        for start in range(0, len(order), batch_size):
            yield self._arranged(*self.test.read(order[start : start + batch_size]))

    def _augmented(self, index: Numbers, draws: Draws, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Some rows of a batch, each with its share of the random numbers, before MixUp."""
        mine = draws.rows(rows)
        x, y = self.train.read(index[rows], mine.boxes)
        return mine.apply(x), y

    def _arranged(self, x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
        """The pixels in their fixed order."""
        return (x if self.pixel_order is None else x.reshape(len(x), -1)[:, self.pixel_order]), y


def permuted(task: Task, seed: int = 42) -> Task:
    """The same images as vectors, with pixels in one random order that all images share (paper, Section 4.1)."""
    order = np.random.default_rng(seed).permutation(math.prod(task.input_shape))
    return replace(task, input_shape=(len(order),), pixel_order=order)
