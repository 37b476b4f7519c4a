"""Images in files of any size, decoded when a batch is read; ImageNet in the layout of ImageFolder, for example."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structops.errors import DataError
from structops.studies.data.augment import Boxes
from structops.studies.data.built_in import EXTRA
from structops.studies.data.task import Examples, Task

Numbers = np.ndarray[Any, Any]
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1]; the customary numbers
IMAGENET_STD = (0.229, 0.224, 0.225)
CENTRE = 0.875  # 224 of 256
THREADS = min(8, os.cpu_count() or 1)
TEST_FOLDERS = ("val", "test")


@dataclass(frozen=True, eq=False)
class Pictures(Examples):
    """Images that are opened one by one.

    Attributes:
        open: The image (of Pillow) with a number.
        names: What errors call an image, for each.
        labels: Classes, shape (images,).
        size: Height and width of what is read.
        mean: Of the channels, in [0, 1]; one number for grey images, three for colours.
        std: Deviation of the channels.
        centre: Share of the shorter side that is read where nothing is cut at random.
        threads: That decode at the same time.
    """

    open: Callable[[int], Any]
    names: Sequence[Any]
    labels: Numbers
    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    centre: float = CENTRE
    threads: int = THREADS

    def __post_init__(self) -> None:
        if self.size < 1 or self.threads < 1 or not 0 < self.centre <= 1:
            raise DataError(
                f"expected size >= 1, 0 < centre <= 1 and threads >= 1, got {self.size}, {self.centre}, {self.threads}"
            )
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise DataError(f"expected one or three means and positive deviations, got {self.mean} and {self.std}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as it is read: (channels, size, size)."""
        return len(self.mean), self.size, self.size

    def read(self, index: Numbers, boxes: Boxes | None = None) -> tuple[Numbers, Numbers]:
        """Normalised images (b, channels, size, size), float32, and classes (b,).

        With ``boxes``, each box is resized to the whole; without, the shorter side is resized to size/centre and the
        middle cut out.  Both are bilinear, and average when they shrink.
        """
        images = np.empty((len(index), *self.shape), np.float32)

        def decode(row: int) -> None:
            images[row] = self._decoded(int(index[row]), None if boxes is None else boxes.rows(slice(row, row + 1)))

        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(decode, range(len(index))):
                pass  # an error of a thread is raised here
        images -= np.array(self.mean, np.float32)[:, None, None]
        images /= np.array(self.std, np.float32)[:, None, None]
        return images, self.labels[index]

    def _decoded(self, number: int, box: Boxes | None) -> Numbers:
        """One image, in [0, 1]."""
        from PIL import Image

        try:
            with self.open(number) as file:
                image = file.convert("RGB" if len(self.mean) == 3 else "L")
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for what is broken
            raise DataError(f"{self.names[number]}: not an image that can be decoded ({error})") from error
        width, height = image.size
        if box is None:
            side = self.centre * min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            region = (left, top, left + side, top + side)
        else:
            top, left, high, wide = box.pixels(height, width)[0].tolist()
            region = (left, top, left + wide, top + high)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=region)
        pixels = np.asarray(image, np.float32) / 255
        return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


@dataclass(frozen=True)
class Files:
    """Opens image files by their numbers.

    Attributes:
        paths: Of the images.
    """

    paths: tuple[Path, ...]

    def __call__(self, number: int) -> Any:
        """The image, of which Pillow has only read the header."""
        from PIL import Image

        return Image.open(self.paths[number])


def images(
    path: Path,
    *,
    size: int = 224,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    centre: float = CENTRE,
    threads: int = THREADS,
) -> Task:
    """A task of folders of images: ``train/CLASS/*`` and ``val/CLASS/*`` or ``test/CLASS/*``.

    Classes are the folders in alphabetical order; ``facts["classes"]`` names them.  Files whose ending is none of
    Pillow's formats are left out.

    Args:
        path: The folder above.
        size: Height and width to which images are resized.
        mean: Of the channels in [0, 1]; a single number reads images as grey.
        std: Deviation of the channels.
        centre: Share of the shorter side that the test looks at.
        threads: That decode at the same time; Pillow decodes without holding Python's lock.

    Raises:
        DataError: If folders are missing or empty, the classes of the two parts differ, or, when a batch is read, an
            image is broken; the message names its file.
        ImportError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"images:PATH needs Pillow: {EXTRA}") from error
    endings = set(Image.registered_extensions())
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise DataError(f"{path}: expected train/CLASS/*.jpg and val/CLASS/*.jpg (or test/) in it")
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())
    others = sorted(folder.name for folder in test.iterdir() if folder.is_dir())
    if classes != others or not classes:
        apart = sorted(set(classes) ^ set(others))
        raise DataError(f"{path}: expected the same classes in train and {test.name}; {apart or 'none'} differ")
    parts = []
    for folder in (path / "train", test):
        paths, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in endings)
            if not found:
                raise DataError(f"{folder / name}: expected images, found none")
            paths += found
            labels += [label] * len(found)
        files = tuple(paths)
        parts.append(Pictures(Files(files), files, np.array(labels), size, tuple(mean), tuple(std), centre, threads))
    train, check = parts
    facts = {"classes": classes, "train": len(train), "test": len(check)}
    return Task(f"images:{path}", "classification", train, check, train.shape, num_classes=len(classes), facts=facts)
