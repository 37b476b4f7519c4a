"""Data sets of the library ``datasets``, of the Hugging Face Hub or in local files of parquet, JSON or CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structops.errors import DataError
from structops.studies.data.built_in import fixed_split
from structops.studies.data.pictures import IMAGENET_MEAN, IMAGENET_STD, Pictures
from structops.studies.data.task import Task
from structops.studies.data.text import language

Numbers = np.ndarray[Any, Any]
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TEST_SPLITS = ("test", "validation", "valid", "val")
GREY = ("1", "L")


@dataclass(frozen=True, eq=False)
class Rows:
    """Opens the images of a column by the numbers of their rows.

    Attributes:
        data: Of the library.
        column: With the images.
        order: Row of each number.
    """

    data: Any
    column: str
    order: Numbers

    def __call__(self, number: int) -> Any:
        """The image, of Pillow."""
        return self.data[int(self.order[number])][self.column]


def hub(
    path: Path,
    *,
    subset: str = "",
    input: str = "",
    label: str = "label",
    size: int = 0,
    centre: float = 1.0,
    tokens: str = "char",
    context: int = 128,
    vocab_size: int = 512,
    test_fraction: float = 0.1,
) -> Task:
    """A task of a column of images and one of classes, or of a column of text.

    A data set without a split ``test`` or ``validation`` is divided: images four to one at random, always the same,
    and text at its end.

    Args:
        path: What exists there, a file or a folder, is read; otherwise it is a name on the Hub, which is downloaded.
        subset: Of a data set that has several, for example ``wikitext-2-raw-v1``.
        input: Column of the inputs; by default the first one of images, or else ``text``.
        label: Column of the classes of images.
        size: Height and width to which images are resized; 0 for the shorter side of the first one.
        centre: Share of the shorter side of an image that is read.
        tokens: For text, as in :func:`structops.studies.data.text.language`; so are the following.
        context: Tokens of a window.
        vocab_size: Of ``tokens="bpe"``.
        test_fraction: Share of the text that is the test, if there is no split for it.

    Raises:
        ImportError: If ``datasets`` is not installed.
        DataError: If the data cannot be had, or have no such columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hub:NAME needs the library datasets: pip install datasets") from error
    name = f"hub:{path}"
    try:
        if path.is_file():
            if path.suffix not in BUILDERS:
                raise DataError(f"{path}: expected a file of {', '.join(BUILDERS)}, or a folder of such files")
            splits = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path))
        else:
            splits = datasets.load_dataset(path.as_posix(), subset or None)
    except DataError:
        raise
    except Exception as error:  # whatever the library, a server or a file format raises
        raise DataError(f"{name}: {type(error).__name__}: {error}") from error
    if "train" not in splits:
        raise DataError(f"{name}: expected a split train, found {', '.join(splits)}")
    train = splits["train"]
    test = next((splits[split] for split in TEST_SPLITS if split in splits), None)
    pictures = [column for column, feature in train.features.items() if isinstance(feature, datasets.Image)]
    column = input or (pictures[0] if pictures else "text")
    if column not in train.features or (column in pictures and label not in train.features):
        wanted = f"images or text in column {column!r}, and for images classes in column {label!r}"
        raise DataError(f"{name}: expected {wanted}; there are {', '.join(train.features)} (options input and label)")
    if column not in pictures:
        texts = ["" if part is None else "\n".join(_strings(part[column], name, column)) for part in (train, test)]
        return language(
            name, *texts, tokens=tokens, context=context, vocab_size=vocab_size, test_fraction=test_fraction
        )
    if test is None:
        first, second = fixed_split(len(train))
        test = train
    else:
        first, second = np.arange(len(train)), np.arange(len(test))
    example = train[0][column]
    grey = example.mode in GREY
    parts = []
    for data, order in ((train, first), (test, second)):
        labels = np.array(data[label])
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(f"{name}: expected classes 0, 1, ... in column {label!r}, got {labels[:3].tolist()}")
        where = [f"{name}, row {row}" for row in order]
        mean, std = ((0.5,), (0.5,)) if grey else (IMAGENET_MEAN, IMAGENET_STD)
        rows = Rows(data, column, order)
        parts.append(
            Pictures(rows, where, labels[order].astype(np.int64), size or min(example.size), mean, std, centre)
        )
    known = getattr(train.features[label], "names", None)
    classes = len(known) if known else int(parts[0].labels.max()) + 1
    if parts[1].labels.max() >= classes:
        raise DataError(f"{name}: class {parts[1].labels.max()} of the test is none of the {classes} of the training")
    ours, check = parts
    facts = {"classes": known, "train": len(first), "test": len(second)}
    return Task(name, "classification", ours, check, ours.shape, num_classes=classes, facts=facts)


def _strings(values: Any, name: str, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        DataError: If they are something else.
    """
    values = list(values)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{name}: expected text in column {column!r}, got {values[0]!r}")
    return values
