"""CIFAR-10 and CIFAR-100 in their binary version, from a folder or from the archive as it is downloaded.

Source: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html.  The page states no licence.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structops.errors import DataError
from structops.studies.data.built_in import channel_statistics
from structops.studies.data.task import Arrays, Task

Numbers = np.ndarray[Any, Any]
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """What the binary version of one of the two consists of.

    Attributes:
        archive: Name of the download.
        pickles: Name of the download that is not read, since reading pickles runs what is written in them.
        train: Files of the training set.
        test: File of the test set.
        labels: Bytes before the pixels of an image; the last one is the class.
        classes: Number of classes.
    """

    archive: str
    pickles: str
    train: tuple[str, ...]
    test: str
    labels: int
    classes: int


CIFAR10 = Layout(
    archive="cifar-10-binary.tar.gz",
    pickles="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
    test="test_batch.bin",
    labels=1,
    classes=10,
)
CIFAR100 = Layout(
    archive="cifar-100-binary.tar.gz",
    pickles="cifar-100-python.tar.gz",
    train=("train.bin",),
    test="test.bin",
    labels=2,  # 20 coarse classes, then 100 fine ones
    classes=100,
)


def cifar10(path: Path) -> Task:
    """Images (3, 32, 32) of 10 classes, 50,000 for training and 10,000 for the test; see :func:`read`."""
    return read(f"cifar10:{path}", path, CIFAR10)


def cifar100(path: Path) -> Task:
    """Images (3, 32, 32) of 100 classes, 50,000 for training and 10,000 for the test; see :func:`read`."""
    return read(f"cifar100:{path}", path, CIFAR100)


def read(name: str, path: Path, layout: Layout) -> Task:
    """The task of a folder or an archive, normalised by the mean and the deviation of each channel in training.

    Args:
        name: Of the task.
        path: The folder with the files, the folder that the archive unpacks to inside it, or the archive.
        layout: Which of the two.

    Raises:
        DataError: If files are missing, cut off or of the python version, or a label is not a class.
    """
    names = [*layout.train, layout.test]
    files = _archived(path, names, layout) if path.is_file() else _in_folder(path, names, layout)
    parts = [_parsed(*files[name], layout) for name in names]
    x = np.concatenate([images for images, _ in parts[:-1]])
    y = np.concatenate([labels for _, labels in parts[:-1]])
    mean, std = channel_statistics(x)
    facts = {"source": "Krizhevsky 2009", "licence": "not stated", "train_mean": (mean.ravel() / 255).tolist()}
    facts["train_std"] = (std.ravel() / 255).tolist()
    train, test = Arrays(x, y, mean, std), Arrays(*parts[-1], mean, std)
    return Task(name, "classification", train, test, SHAPE, num_classes=layout.classes, facts=facts)


def _in_folder(path: Path, names: Sequence[str], layout: Layout) -> dict[str, tuple[str, bytes]]:
    """Where each file is, and what it holds."""
    if not path.is_dir():
        raise DataError(f"{path}: not found; {_wanted(names, layout)}")
    folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
    found = next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)
    if found is None:
        there = {file.name for folder in folders for file in folder.iterdir()}
        if missing := [name for name in names if name not in there]:
            pickled = bool(there & {"data_batch_1", "train", "batches.meta", "meta", layout.pickles})
            raise DataError(f"{path}: no {', '.join(missing)}; {_wanted(names, layout, pickled)}")
        raise DataError(f"{path}: the files are in different folders; {_wanted(names, layout)}")
    return {name: (str(found / name), (found / name).read_bytes()) for name in names}


def _archived(path: Path, names: Sequence[str], layout: Layout) -> dict[str, tuple[str, bytes]]:
    """What each file of an archive holds; nothing is unpacked to disk."""
    files: dict[str, tuple[str, bytes]] = {}
    pickled = False
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                pickled |= name in ("data_batch_1", "train", "batches.meta", "meta")
                if name in names and (file := archive.extractfile(member)) is not None:
                    files[name] = (f"{path}, {member.name}", file.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not a whole archive ({error}); {_wanted(names, layout)}") from error
    if missing := [name for name in names if name not in files]:
        raise DataError(f"{path}: no {', '.join(missing)}; {_wanted(names, layout, pickled)}")
    return files


def _wanted(names: Sequence[str], layout: Layout, pickled: bool = False) -> str:
    """What was expected, at the end of an error."""
    why = (
        f"these are pickles, as in {layout.pickles}, which are not read because they can run code; " if pickled else ""
    )
    return f"{why}expected the binary version, {layout.archive}, or a folder with {', '.join(names)}"


def _parsed(where: str, content: bytes, layout: Layout) -> tuple[Numbers, Numbers]:
    """Images (n, 3, 32, 32) as bytes, and their classes (n,)."""
    size = layout.labels + PIXELS
    if not content or len(content) % size:
        raise DataError(f"{where}: expected records of {size} bytes, got {len(content)} bytes; the file seems cut off")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, layout.labels - 1].astype(np.int64)
    if labels.max() >= layout.classes:
        raise DataError(f"{where}: label {labels.max()} is none of {layout.classes} classes; is this another data set?")
    return records[:, layout.labels :].reshape(-1, *SHAPE), labels
