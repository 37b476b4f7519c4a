"""Augmentation: random numbers are drawn for a whole batch, and pure functions of images and numbers apply them.

Drawing apart from applying lets each of several processes apply its rows of one draw.  RandAugment, random erasing
and colour jitter of the paper's ImageNet recipe (Section 4.4) are absent: they are functions of torchvision and timm,
which these studies do without, since a torchvision of another build than torch breaks transformers at import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from structops.errors import ShapeError, StructureError

Numbers = np.ndarray[Any, Any]
RATIO = (3 / 4, 4 / 3)  # of width to height, of the boxes of a random resized crop
ATTEMPTS = 10  # to find a box inside the image, as torchvision does


@dataclass(frozen=True)
class Augment:
    """What is done to a training batch, in this order; the default is nothing.

    Attributes:
        resized_crop: Least and greatest share of the area of a random box, which is resized to the whole image
            (bilinear); its ratio of width to height is 3/4 to 4/3.
        crop: Pixels of zeros (the mean, after normalisation) around an image, out of which a random window of its own
            size is cut.
        flip: Whether half of the images are mirrored left to right.
        noise: Standard deviation of Gaussian noise on the normalised inputs.
        mixup: α of MixUp: inputs and targets become λ·(x, y) + (1−λ)·(x', y') with another row of the batch, where
            λ ~ Beta(α, α) is one number a batch.
        smoothing: s of label smoothing: targets (1−s)·onehot + s/classes.

    Raises:
        StructureError: If a value is outside its range.
    """

    noise: float = 0
    crop: int = 0
    flip: bool = False
    resized_crop: tuple[float, float] | None = None
    mixup: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        wrong = {
            "noise >= 0": not 0 <= self.noise < math.inf,
            "a whole number crop >= 0": self.crop != int(self.crop) or self.crop < 0,
            "mixup >= 0": not 0 <= self.mixup < math.inf,
            "0 <= smoothing < 1": not 0 <= self.smoothing < 1,
        }
        if self.resized_crop is not None:
            object.__setattr__(self, "resized_crop", tuple(self.resized_crop))  # a list, from JSON or TOML
            least, greatest = self.resized_crop
            wrong["0 < least <= greatest <= 1 in resized_crop"] = not 0 < least <= greatest <= 1
        if any(wrong.values()):
            raise StructureError(f"expected {', '.join(rule for rule in wrong if wrong[rule])}; got {self}")

    def __bool__(self) -> bool:
        return self != NOTHING

    @property
    def soft(self) -> bool:
        """Whether targets are probabilities of classes instead of labels."""
        return bool(self.mixup or self.smoothing)

    def check(self, kind: str, axes: int) -> None:
        """Raise StructureError if a task of this kind, whose inputs have so many axes, has no such augmentation."""
        on = [name for name, value in vars(self).items() if value]
        possible = {"noise", "mixup"} if kind != "language" else set()
        possible |= {"smoothing"} if kind == "classification" else set()
        possible |= {"crop", "flip", "resized_crop"} if axes == 3 else set()
        if wrong := [name for name in on if name not in possible]:
            what = "images" if axes == 3 else "vectors" if kind != "language" else "text"
            raise StructureError(
                f"no {', '.join(wrong)} for {kind} of {what}; possible: {', '.join(sorted(possible)) or 'nothing'}"
            )


NOTHING = Augment()
PAPER = Augment(flip=True, resized_crop=(0.08, 1.0), mixup=0.8, smoothing=0.3)  # for CIFAR; paper, Section 4.1


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of random resized crops, in shares of images whose size need not be known yet.

    Attributes:
        area: Shares of the area, shape (images, ATTEMPTS); the first that fits counts.
        ratio: Widths over heights, same shape.
        place: Vertical and horizontal place in the room that the box leaves, in [0, 1), shape (images, 2).
    """

    area: Numbers
    ratio: Numbers
    place: Numbers

    @classmethod
    def sample(cls, rng: np.random.Generator, count: int, scale: tuple[float, float]) -> Boxes:
        """Area uniform over ``scale``, logarithm of the ratio uniform, place uniform."""
        area = rng.uniform(*scale, (count, ATTEMPTS))
        ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (count, ATTEMPTS)))
        return cls(area, ratio, rng.random((count, 2)))

    def rows(self, index: Any) -> Boxes:
        """Those of some images."""
        return Boxes(self.area[index], self.ratio[index], self.place[index])

    def pixels(self, height: Any, width: Any) -> Numbers:
        """Top, left, height and width in whole pixels, shape (images, 4), of images of such sizes.

        If none of the attempts fits in an image, its box is the largest one in the centre with an allowed ratio.
        """
        height, width = (np.broadcast_to(size, len(self.area))[:, None] for size in (height, width))
        area = self.area * height * width
        heights = np.rint(np.sqrt(area / self.ratio)).astype(np.int64)
        widths = np.rint(np.sqrt(area * self.ratio)).astype(np.int64)
        fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
        first = (np.arange(len(fits)), fits.argmax(axis=1))
        height, width, fits = height[:, 0], width[:, 0], fits.any(axis=1)
        high = np.where(fits, heights[first], np.minimum(height, np.rint(width / RATIO[0])).astype(np.int64))
        wide = np.where(fits, widths[first], np.minimum(width, np.rint(height * RATIO[1])).astype(np.int64))
        place = np.where(fits[:, None], self.place, 0.5)
        top = (place[:, 0] * (height - high + 1)).astype(np.int64)
        left = (place[:, 1] * (width - wide + 1)).astype(np.int64)
        return np.stack([top, left, high, wide], axis=1)


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of one batch; None where an augmentation is off.

    Attributes:
        boxes: Of random resized crops.
        offsets: Top and left of the windows of padded crops, shape (batch, 2), between 0 and 2·padding.
        padding: Pixels around an image.
        mirrored: Which images are flipped, shape (batch,).
        noise: What is added to the inputs, shape (batch, numbers of an input).
        partner: Rows that MixUp adds, a permutation of shape (batch,).
        weight: λ of MixUp.
    """

    boxes: Boxes | None = None
    offsets: Numbers | None = None
    padding: int = 0
    mirrored: Numbers | None = None
    noise: Numbers | None = None
    partner: Numbers | None = None
    weight: float = 1.0

    @classmethod
    def sample(cls, rng: np.random.Generator, count: int, size: int, options: Augment) -> Draws:
        """For ``count`` inputs of ``size`` numbers each."""
        return cls(
            boxes=Boxes.sample(rng, count, options.resized_crop) if options.resized_crop else None,
            offsets=rng.integers(0, 2 * options.crop + 1, (count, 2)) if options.crop else None,
            padding=options.crop,
            mirrored=rng.random(count) < 0.5 if options.flip else None,
            partner=rng.permutation(count) if options.mixup else None,
            weight=float(rng.beta(options.mixup, options.mixup)) if options.mixup else 1.0,
            noise=np.float32(options.noise) * rng.standard_normal((count, size), dtype=np.float32)
            if options.noise
            else None,
        )

    def rows(self, index: Numbers) -> Draws:
        """Those of some rows; MixUp, which joins rows, is left out."""
        return Draws(
            boxes=None if self.boxes is None else self.boxes.rows(index),
            offsets=None if self.offsets is None else self.offsets[index],
            padding=self.padding,
            mirrored=None if self.mirrored is None else self.mirrored[index],
            noise=None if self.noise is None else self.noise[index],
        )

    def apply(self, images: Numbers) -> Numbers:
        """Window, mirror and noise; the boxes were cut out when the images were read."""
        if self.offsets is not None:
            images = shift(images, self.offsets, self.padding)
        if self.mirrored is not None:
            images = flip(images, self.mirrored)
        return images if self.noise is None else images + self.noise.reshape(images.shape)


def resized_crops(images: Numbers, boxes: Boxes) -> Numbers:
    """Boxes of images (b, C, H, W), each resized to H x W by bilinear interpolation between the centres of pixels."""
    height, width = images.shape[-2:]
    top, left, high, wide = boxes.pixels(height, width).T
    down, across = _interpolation(top, high, height), _interpolation(left, wide, width)
    return (down[:, None] @ images) @ across[:, None].transpose(0, 1, 3, 2)


def _interpolation(start: Numbers, length: Numbers, size: int) -> Numbers:
    """Matrices (b, size, size) that stretch pixels ``start`` to ``start + length`` of a line over the whole line."""
    centre = (np.arange(size) + 0.5) * (length[:, None] / size) - 0.5
    centre = np.clip(centre, 0, length[:, None] - 1)  # the outermost pixels of the box reach to its edge
    lower = np.floor(centre).astype(np.int64)
    upper = np.minimum(lower + 1, length[:, None] - 1)
    weight = (centre - lower).astype(np.float32)
    matrix = np.zeros((len(start), size, size), np.float32)
    image, line = np.arange(len(start))[:, None], np.arange(size)[None]
    matrix[image, line, start[:, None] + lower] += 1 - weight
    matrix[image, line, start[:, None] + upper] += weight
    return matrix


def shift(images: Numbers, offsets: Numbers, padding: int) -> Numbers:
    """Windows of images (b, C, H, W) within a border of zeros, each as large as its image, at ``offsets`` (b, 2)."""
    height, width = images.shape[-2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(len(images)), :, offsets[:, 0], offsets[:, 1]]


def flip(images: Numbers, mirrored: Numbers) -> Numbers:
    """Images of shape (b, C, H, W), those with ``mirrored`` (b,) left to right."""
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def soft_targets(labels: Numbers, num_classes: int, smoothing: float = 0.0) -> Numbers:
    """Probabilities (b, num_classes) of labels (b,): (1−s)·onehot + s/num_classes; each row sums to one."""
    targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return targets


def blend(ours: Numbers, theirs: Numbers, weight: float) -> Numbers:
    """MixUp: λ·ours + (1−λ)·theirs, in the dtype of the arrays.

    Raises:
        ShapeError: If the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ShapeError(f"MixUp joins arrays of one shape, got {ours.shape} and {theirs.shape}")
    return ours.dtype.type(weight) * ours + ours.dtype.type(1 - weight) * theirs
