"""Error against a cost: the curve of a structure, its power law, and what it saves at equal error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from structops import power_law
from structops.power_law import Fit


@dataclass(frozen=True)
class Point:
    """One size of a structure: geometric means over seeds.

    Attributes:
        cost: MACs, parameters, seconds, ...
        error: What falls with it.
        low: Lowest error of a seed.
        high: Highest error of a seed.
    """

    cost: float
    error: float
    low: float
    high: float

    @classmethod
    def of(cls, costs: Iterable[float], errors: Iterable[float]) -> Point | None:
        """The point of several seeds; None where one diverged, or made no error at all, which has no logarithm."""
        found = list(errors)
        if not all(math.isfinite(error) and error > 0 for error in found):
            return None
        return cls(_mean(list(costs)), _mean(found), min(found), max(found))


@dataclass(frozen=True)
class Curve:
    """The sizes of one structure, by rising cost."""

    label: str
    points: tuple[Point, ...]

    @classmethod
    def of(cls, label: str, points: Iterable[Point | None]) -> Curve:
        """The points that there are, in order."""
        return cls(label, tuple(sorted((p for p in points if p is not None), key=lambda point: point.cost)))

    @property
    def law(self) -> Fit | None:
        """The power law E ∝ C^(-α) by least squares in the logarithms; None for fewer than three sizes."""
        if len({point.cost for point in self.points}) < 3:
            return None
        return power_law.fit([point.cost for point in self.points], [point.error for point in self.points])

    @property
    def best(self) -> Point | None:
        """The point of lowest error."""
        return min(self.points, key=lambda point: point.error, default=None)

    def cost_at(self, error: float) -> float | None:
        """The lowest cost at which the curve, straight between its points in the logarithms, comes down to an error.

        None where it never does; a curve that starts below has its first cost, which is then an upper bound.
        """
        for before, after in zip((None, *self.points), self.points, strict=False):
            if after.error > error:
                continue
            if before is None or before.error <= error:
                return after.cost
            share = math.log(before.error / error) / math.log(before.error / after.error)
            return math.exp((1 - share) * math.log(before.cost) + share * math.log(after.cost))
        return None

    def error_at(self, cost: float) -> float | None:
        """The error at a cost, straight between points in the logarithms; None outside of them."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if before.cost <= cost <= after.cost:
                share = math.log(cost / before.cost) / math.log(after.cost / before.cost)
                return math.exp((1 - share) * math.log(before.error) + share * math.log(after.error))
        return self.points[0].error if len(self.points) == 1 and self.points[0].cost == cost else None


@dataclass(frozen=True)
class Ratio:
    """A quotient of costs.

    Attributes:
        value: The quotient.
        bound: ``""`` if it was measured; ``"≥"`` or ``"≤"`` where one curve starts below the error, so that its first
            cost stands in for a lower one.
    """

    value: float
    bound: str = ""

    def __str__(self) -> str:
        """With three digits."""
        return f"{self.bound} {self.value:.3g}".strip()


def cost_ratio(curve: Curve, reference: Curve) -> Ratio | None:
    """Cost of a curve relative to that of the reference at equal error; below 1 the curve needs less.

    The error is the higher one of their lowest errors, so that neither curve is extrapolated.  None where one is empty.
    """
    if curve.best is None or reference.best is None:
        return None
    level = max(curve.best.error, reference.best.error)
    ours, theirs = curve.cost_at(level), reference.cost_at(level)
    if not ours or not theirs:
        return None
    starts = [one.points[0].error < level for one in (curve, reference)]
    bound = {(True, False): "≤", (False, True): "≥"}.get((starts[0], starts[1]), "")
    return Ratio(ours / theirs, bound)


def hull(points: Sequence[Point]) -> tuple[Point, ...]:
    """The lower convex hull in the logarithms, as far as it falls: the frontier of the follow-up paper."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
            kept.pop()
        kept.append(point)
    falling = [k for k, point in enumerate(kept) if k and point.error >= kept[k - 1].error]
    return tuple(kept[: falling[0]] if falling else kept)


def _turn(a: Point, b: Point, c: Point) -> float:
    (ax, ay), (bx, by), (cx, cy) = ((math.log(p.cost), math.log(p.error)) for p in (a, b, c))
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
