"""Powers that measured numbers follow: a straight line through their logarithms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """``coefficient * n**exponent`` by least squares in the logarithms.

    Attributes:
        exponent: The power.
        error: Its standard error; infinite for two points.
        coefficient: The value at n = 1.
    """

    exponent: float
    error: float
    coefficient: float

    def __call__(self, size: float) -> float:
        """The value of the fitted power at a size."""
        return self.coefficient * size**self.exponent


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """The power of n with which positive values grow, every point with the same weight.

    Raises:
        ValueError: There are fewer than two sizes.

    Example:
        >>> round(fit([1, 2, 4], [3, 12, 48]).exponent, 6)
        2.0
    """
    x, y = [math.log(n) for n in sizes], [math.log(value) for value in values]
    if len(set(x)) < 2:
        raise ValueError(f"an exponent needs two sizes, got {len(set(x))}")
    slope, intercept = statistics.linear_regression(x, y)
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(rest / (len(x) - 2) / spread) if len(x) > 2 else math.inf
    return Fit(slope, error, math.exp(intercept))
