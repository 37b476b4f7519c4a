"""What a machine allows: the roofline, and where one way of computing overtakes another.  Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from structops.bench.cases import BYTES, Case

WORK = {"forward": 1, "train": 3}  # passes over the data: forward, gradient of the input, gradient of the factors


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches with one number format.

    Attributes:
        flops: Floating-point operations per second of a large matrix product.
        bandwidth: Bytes per second of a large copy, read and written.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What has to be done at least.

    Attributes:
        flops: Floating-point operations.
        traffic: Bytes read and written in memory.
    """

    flops: float
    traffic: float

    def bound(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least: the roofline (Williams, Waterman, Patterson 2009)."""
        return max(self.flops / ceilings.flops, self.traffic / ceilings.bandwidth)


def work(case: Case) -> Work:
    """The work of a structure, one product after the other and without copies.

    Input and output cross the memory once, what lies between two factors twice, and the parameters once a pass.  With
    16-bit numbers, square width d and h numbers between two factors these are 4d + 4h bytes a token, and 12d + 12h in
    training: each of the two products of a backward step moves as much as the forward one.
    """
    between = sum(case.chain.intermediate_widths) if case.chain else 0
    return _work(case, case.plan.macs, case.plan.num_params, between)


def dense_work(case: Case) -> Work:
    """The work of the dense layer of the same size: 4d bytes a token in 16 bit, 12d in training, and its matrix."""
    size = case.in_features * case.out_features
    return _work(case, size, size, 0)


def _work(case: Case, macs: int, num_params: int, between: int) -> Work:
    numbers = case.tokens * (case.in_features + case.out_features + 2 * between) + num_params
    return Work(WORK[case.run] * 2.0 * macs * case.tokens, WORK[case.run] * float(BYTES[case.dtype] * numbers))


@dataclass(frozen=True)
class Crossover:
    """From which size on something is faster.

    Attributes:
        size: The size, or None if it is slower even at the largest.
        smallest: The smallest size that was measured.
        largest: The largest size that was measured.
    """

    size: float | None
    smallest: float
    largest: float

    def __str__(self) -> str:
        """The size, or the end of the range that it lies beyond."""
        if self.size is None:
            return f"> {self.largest:,.0f}"
        return f"≤ {self.smallest:,.0f}" if self.size <= self.smallest else f"{self.size:,.0f}"


def crossover(sizes: Sequence[float], speedups: Sequence[float]) -> Crossover:
    """The smallest size from which on every speed-up is 1 or more, interpolated between logarithms.

    Raises:
        ValueError: There are no sizes, or not as many speed-ups.

    Example:
        >>> print(crossover([256, 1024, 4096], [0.25, 0.5, 2.0]))
        2,048
    """
    points = sorted(zip(sizes, speedups, strict=True))
    if not points:
        raise ValueError("a crossover needs at least one size")
    ends = points[0][0], points[-1][0]
    slower = max((index for index, (_, speedup) in enumerate(points) if speedup < 1), default=-1)
    if slower == len(points) - 1:
        return Crossover(None, *ends)
    if slower < 0:
        return Crossover(ends[0], *ends)
    (low, below), (high, above) = points[slower], points[slower + 1]
    share = math.log(1 / below) / math.log(above / below)
    return Crossover(math.exp(math.log(low) + share * math.log(high / low)), *ends)
