"""Real data that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images as normalised vectors, with their labels.

    Attributes:
        train_x: Shape (1437, 64), zero mean and unit variance over the training set.
        train_y: Digits, shape (1437,).
        test_x: Shape (360, 64).
        test_y: Shape (360,).
    """

    train_x: np.ndarray[Any, Any]
    train_y: np.ndarray[Any, Any]
    test_x: np.ndarray[Any, Any]
    test_y: np.ndarray[Any, Any]


def digits() -> Split:
    """1,797 handwritten digits of 8 x 8 pixels; the split into four fifths and one fifth is always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the studies need scikit-learn: pip install 'structops[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    mean, std = images[train].mean(), images[train].std()
    pixels = ((images - mean) / std).astype(np.float32)
    return Split(pixels[train], labels[train], pixels[test], labels[test])
