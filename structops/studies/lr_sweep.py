"""A sweep over learning rates at several widths: where the best rate is, how flat the loss is, how far it drifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from structops.errors import StructureError
from structops.report import write_figure
from structops.studies.lab.store import append_line, read_lines

TOLERANCE = 0.25  # octaves a doubling of width
BASIN = 1.1  # losses up to this multiple of the lowest count as good


@dataclass(frozen=True)
class Point:
    """The loss of one training.

    Attributes:
        width: Width of the model.
        lr: Learning rate.
        seed: Seed.
        loss: Its loss; NaN if it diverged.
        label: What the sweep is of; results are taken up again only under the same label.
    """

    width: int
    lr: float
    seed: int
    loss: float
    label: str = ""


@dataclass(frozen=True)
class Optimum:
    """The best learning rate at one width.

    Attributes:
        width: Width of the model.
        log2_lr: Logarithm of the best rate: the vertex of a parabola through the lowest loss and its neighbours.
        loss: The lowest mean loss on the grid.
        flatness: Octaves of learning rate around it whose loss is at most `BASIN` times as large.
        edge: Whether the lowest loss is at the end of the grid, so that the best rate may lie beyond.
    """

    width: int
    log2_lr: float
    loss: float
    flatness: float
    edge: bool


@dataclass(frozen=True)
class SweepReport:
    """What `lr_sweep` found.

    Attributes:
        points: All trainings.
        tolerance: Octaves a doubling of width from which the best rate drifts.
    """

    points: tuple[Point, ...]
    tolerance: float = TOLERANCE

    def means(self, width: int) -> tuple[list[float], list[float]]:
        """Rates in ascending order and the mean loss over seeds at each; NaN where one diverged."""
        found: dict[float, list[float]] = {}
        for point in self.points:
            if point.width == width:
                found.setdefault(point.lr, []).append(point.loss)
        rates = sorted(found)
        return rates, [sum(found[lr]) / len(found[lr]) for lr in rates]

    @property
    def widths(self) -> list[int]:
        """All widths in ascending order."""
        return sorted({point.width for point in self.points})

    @property
    def optima(self) -> tuple[Optimum, ...]:
        """The best rate at every width at which some training did not diverge."""
        found = (_optimum(width, *self.means(width)) for width in self.widths)
        return tuple(optimum for optimum in found if optimum)

    @property
    def drift(self) -> float:
        """Octaves by which the best rate moves a doubling of width; NaN with less than two widths."""
        x, y = [math.log2(o.width) for o in self.optima], [o.log2_lr for o in self.optima]
        if len(x) < 2:
            return math.nan
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((a - mean_x) ** 2 for a in x)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread

    @property
    def penalty(self) -> float:
        """Loss of the largest model with the best rate of the smallest, relative to its own lowest loss.

        The number that counts: what tuning at the smallest width costs.  It is infinite where that rate diverges.
        """
        optima = self.optima
        if len(optima) < 2:
            return math.nan
        loss = _interpolate(*self.means(optima[-1].width), optima[0].log2_lr)
        return loss / optima[-1].loss if math.isfinite(loss) else math.inf

    @property
    def verdict(self) -> str:
        """``"transfers"``, ``"drift"``, ``"flat"`` or ``"edge"``.

        ``"flat"``: the best rate moves, but within the basin of good rates at every width, so that the losses cannot
        tell.  ``"edge"``: a best rate lies at the end of the grid; sweep a wider range.
        """
        optima = self.optima
        if len(optima) < 2 or any(optimum.edge for optimum in optima):
            return "edge"
        if abs(self.drift) <= self.tolerance:
            return "transfers"
        moved = max(o.log2_lr for o in optima) - min(o.log2_lr for o in optima)
        return "flat" if moved < min(o.flatness for o in optima) / 2 else "drift"

    def table(self) -> str:
        """One line a width, and the verdict below."""
        lines = ["width  log2 of best lr  lowest loss  flat octaves"]
        for o in self.optima:
            edge = " (end of the grid)" if o.edge else ""
            lines.append(f"{o.width:<5}  {o.log2_lr:<15.2f}  {o.loss:<11.4g}  {o.flatness:.1f}{edge}")
        lines.append(
            f"verdict: {self.verdict}; {self.drift:+.2f} octaves a doubling of width; with the best rate of the "
            f"smallest model the largest has {self.penalty:.3g} times its lowest loss"
        )
        return "\n".join(lines)

    __str__ = table

    def to_data(self) -> dict[str, Any]:
        """All numbers as plain data; those that are not finite become None."""
        return {
            "verdict": self.verdict,
            "drift": _none(self.drift),
            "penalty": _none(self.penalty),
            "optima": [asdict(optimum) for optimum in self.optima],
            "points": [{**asdict(point), "loss": _none(point.loss)} for point in self.points],
        }

    def plot(self, path: str | Path) -> None:
        """Loss over learning rate, a line a width, as PNG; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 4), layout="constrained")
        panel = figure.subplots()
        self.draw(panel)
        panel.set_ylabel("loss")
        panel.legend(frameon=False)
        write_figure(Path(path), figure)

    def draw(self, panel: Any) -> None:
        """Loss over learning rate into matplotlib axes, a line a width, the best rate marked."""
        for k, width in enumerate(self.widths):
            rates, losses = self.means(width)
            panel.plot(rates, losses, marker=".", color=f"C{k}", label=f"width {width}")
            best = [o for o in self.optima if o.width == width]
            panel.plot([2**o.log2_lr for o in best], [o.loss for o in best], "v", color=f"C{k}", markersize=9)
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel="learning rate")
        panel.grid(alpha=0.3)


def lr_sweep(
    train: Callable[[int, float, int], float],
    widths: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int] = (0,),
    *,
    path: str | Path | None = None,
    label: str = "",
    tolerance: float = TOLERANCE,
    progress: Callable[[Point], Any] | None = None,
) -> SweepReport:
    """Train at all widths, learning rates and seeds, and say whether the best rate stays the same.

    Args:
        train: Loss of a training of this width, learning rate and seed; not finite if it diverged.
        widths: At least two, for a drift.
        lrs: At least three, best a factor of two apart.
        seeds: Seeds.
        path: A file of JSON lines.  Every result is appended at once and results that are there are not computed again,
            so that a run may be stopped in any way and started again.
        label: What the sweep is of; several sweeps may share a file.
        tolerance: Octaves a doubling of width from which the best rate drifts.
        progress: Called with every new result.

    Raises:
        StructureError: The grid is too small or has rates that are not positive, or the file is no such file.

    Example:
        >>> def train(width, lr, seed):
        ...     return 1 + (math.log2(lr) + 7) ** 2
        >>> report = lr_sweep(train, (64, 128), [2.0**-k for k in range(5, 10)])
        >>> report.verdict, [round(optimum.log2_lr, 3) for optimum in report.optima]
        ('transfers', [-7.0, -7.0])
    """
    if not widths or not seeds or len(set(lrs)) < 3 or min(lrs) <= 0:
        raise StructureError("lr_sweep needs a width, a seed and three positive learning rates")
    known = {_key(point): point for point in (load(path) if path else ()) if point.label == label}
    points = []
    for width in widths:
        for lr in lrs:
            for seed in seeds:
                point = known.get((width, lr, seed))
                if point is None:
                    point = Point(width, lr, seed, float(train(width, lr, seed)), label)
                    if path:
                        append(path, point)
                    if progress:
                        progress(point)
                points.append(point)
    return SweepReport(tuple(points), tolerance)


def _key(point: Point) -> tuple[int, float, int]:
    return point.width, point.lr, point.seed


def load(path: str | Path) -> Iterator[Point]:
    """The results in a file of JSON lines; a last line that was cut off is ignored.

    Raises:
        StructureError: Another line is no result.
    """
    for number, row in read_lines(path):
        try:
            yield Point(**{**row, "loss": math.nan if row["loss"] is None else row["loss"]})
        except (KeyError, TypeError) as error:
            raise StructureError(f"{path}, line {number}: not a result of a sweep: {str(row)[:80]}") from error


def append(path: str | Path, point: Point) -> None:
    """Add a result to a file of JSON lines, on disk before this returns."""
    append_line(path, asdict(point))


def _none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _optimum(width: int, rates: Sequence[float], losses: Sequence[float]) -> Optimum | None:
    x = [math.log2(lr) for lr in rates]
    finite = [k for k, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        return None
    best = min(finite, key=lambda k: losses[k])
    edge = best in (0, len(x) - 1)
    where = x[best]
    if not edge and math.isfinite(losses[best - 1]) and math.isfinite(losses[best + 1]):
        where = _vertex(x[best - 1 : best + 2], losses[best - 1 : best + 2])
    return Optimum(width, where, losses[best], _basin(x, losses, best), edge)


def _vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola through three points is lowest; the middle one is the lowest of the three."""
    left, right = (y[0] - y[1]) / (x[0] - x[1]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    return x[1] if curvature <= 0 else (x[0] + x[1]) / 2 - left / (2 * curvature)


def _basin(x: Sequence[float], losses: Sequence[float], best: int) -> float:
    """Octaves around the lowest loss up to where the loss, linear in between, is `BASIN` times as large."""
    limit, ends = BASIN * losses[best], []
    for step in (-1, 1):
        k = best
        while 0 <= k + step < len(x) and losses[k + step] <= limit:
            k += step
        end = x[k]
        if 0 <= k + step < len(x) and math.isfinite(losses[k + step]):
            end += (limit - losses[k]) / (losses[k + step] - losses[k]) * (x[k + step] - x[k])
        ends.append(end)
    return ends[1] - ends[0]


def _interpolate(rates: Iterable[float], losses: Sequence[float], log2_lr: float) -> float:
    """The loss at a rate, linear in its logarithm; NaN beyond the grid and beside a training that diverged."""
    x = [math.log2(lr) for lr in rates]
    for k in range(len(x) - 1):
        if x[k] <= log2_lr <= x[k + 1]:
            share = (log2_lr - x[k]) / (x[k + 1] - x[k])
            return losses[k] if share == 0 else (1 - share) * losses[k] + share * losses[k + 1]
    return losses[-1] if x and log2_lr == x[-1] else math.nan
