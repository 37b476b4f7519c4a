"""What contestants have in common, and the check that they compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from structops.errors import BackendError

# Of the Frobenius norm: far above rounding, far below what a wrong order of axes gives, which is about 1.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
MOST_NUMBERS = 2**20


class Absent(BackendError):
    """Why a contestant cannot take part in a case; it goes into the report and no further."""


class DisagreementError(BackendError):
    """A way of computing a structure gives other numbers than the rest; its time would mean nothing."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: Of `structops.bench.cases.CONTESTANTS`.
        step: Computes the case once.  On a device it may return before the device has finished.
        results: What ``step`` computes, by name: ``y``, and in training ``dx`` and ``d0``, ``d1``, ... of the factors
            as they are stored; of large arrays a sample (see `sample`).
        memory: Bytes that one step takes, by kind; see `structops.bench.memory`.
    """

    name: str
    step: Callable[[], Any]
    results: Callable[[], dict[str, np.ndarray]]
    memory: Callable[[], dict[str, float]]


def sample(size: int) -> slice:
    """Which entries of a flat array are compared: all, or about a million, evenly spread over rows and columns."""
    return slice(None, None, (size // MOST_NUMBERS) | 1)


def check_agreement(contestants: Sequence[Contestant], dtype: str) -> dict[str, float]:
    """The largest relative difference of each contestant to the first one that has all the results.

    Raises:
        DisagreementError: A difference is more than rounding; the message says whose, and of what.
    """
    found = {contestant.name: contestant.results() for contestant in contestants}
    first = max(found, key=lambda name: len(found[name]))
    errors = {name: _difference(found[first], results) for name, results in found.items()}
    for name, (error, what) in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise DisagreementError(
                f"{name} and {first} differ in {what} by {error:.1e} of its norm; in {dtype} expected at most "
                f"{TOLERANCE[dtype]:.0e}"
            )
    return {name: error for name, (error, _) in errors.items()}


def _difference(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative difference, and the result in which it is."""
    differences = []
    for what, array in received.items():
        reference = expected[what]
        if array.shape != reference.shape:
            return float("nan"), f"the shape of {what}, {array.shape} and {reference.shape},"
        norm = float(np.linalg.norm(reference)) or 1.0
        differences.append((float(np.linalg.norm(array - reference)) / norm, what))
    return max(differences, key=lambda pair: (not pair[0] <= np.inf, pair[0]))
