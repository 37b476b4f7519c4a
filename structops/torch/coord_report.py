"""The report of a coordinate check: fitted powers of width, predictions, verdict and culprit.  Numbers only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from structops import power_law
from structops.errors import StructureError

TOLERANCE = 0.15
FINE = ("ok", "not trained")  # verdicts


@dataclass(frozen=True)
class Record:
    """What was measured of a layer, or of one of its factors, in one model after the last step.

    All but ``width`` and ``seed`` are root mean squares over a fixed batch, or spectral norms averaged over blocks.

    Attributes:
        width: Width of the model.
        seed: Seed of its initial values.
        layer: Name of the layer.
        factor: Name of the parameter, or ``""`` for the layer as a whole.
        start: Output of the layer at the start.
        output: Output of the layer at the end.
        feature: Change of the output since the start; it includes what earlier layers changed.
        own: Output at the end less that of the same input through the old weight: what this weight alone changed.
        norm: Spectral norm at the end, relative to the rule's sqrt(fan-out / fan-in); 0 for a layer.
        change: Spectral norm of the change, relative to the same; 0 for a layer.
    """

    width: int
    seed: int
    layer: str
    factor: str
    start: float
    output: float
    feature: float
    own: float
    norm: float = 0.0
    change: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What the sizes of a model and its learning rates say about a layer or one of its factors, at one width.

    Attributes:
        width: Width of the model.
        layer: Name of the layer.
        factor: Name of the parameter, or ``""`` for the layer.
        role: Its role in the plan.
        structure: The structure of the layer, or ``"plain"``.
        start: Output at the start for an input of ordinary size; 0 if it starts at zero.
        own: Change of the output, relative to that by the rule.
    """

    width: int
    layer: str
    factor: str
    role: str
    structure: str
    start: float
    own: float


@dataclass(frozen=True)
class Slope:
    """A fitted power of width.

    Attributes:
        value: The power; NaN without two widths of a positive measured value.
        band: Half the width of its 95 % band, from the scatter over seeds and widths.
    """

    value: float
    band: float

    def __str__(self) -> str:
        """``-0.03 ± 0.02``."""
        return f"{self.value:+.2f} ± {self.band:.2f}" if math.isfinite(self.value) else "-"


@dataclass(frozen=True)
class CoordRow:
    """The powers of width of a layer, or of one of its factors.

    Attributes:
        layer: Name of the layer.
        factor: Name of the parameter, or ``""``.
        role: Its role in the plan.
        structure: The structure of the layer, or ``"plain"``.
        start: Of the output at the start.
        start_predicted: Its power by the sizes alone: a low-rank layer starts with -1/4 by design.
        feature: Of the change of the features.
        own: Of the change that its own weight makes.
        norm: Of the spectral norm.
        change: Of the spectral norm of the change.
        predicted: Of the change of this weight, from the learning rates in use: 0 by the rule, less where a rate is too
            small for wide models.
        verdict: ``"ok"``; ``"drift, as predicted"``; ``"drift"``; ``"diverged"``; ``"unmoved"``; ``"not trained"``,
            which is no fault; or ``""`` for a factor.
    """

    layer: str
    factor: str
    role: str
    structure: str
    start: Slope
    start_predicted: float
    feature: Slope
    own: Slope
    norm: Slope
    change: Slope
    predicted: float
    verdict: str


@dataclass(frozen=True)
class CoordReport(Sequence[CoordRow]):
    """What `coord_check` found: one row a layer and one a factor; prints as a table.

    Attributes:
        records: All measurements.
        forecasts: What the sizes and learning rates say.
        steps: Number of optimiser steps before the measurement.
        tolerance: The power of width from which a layer drifts.
    """

    records: tuple[Record, ...]
    forecasts: tuple[Forecast, ...]
    steps: int
    tolerance: float = TOLERANCE

    def __getitem__(self, key: Any) -> Any:
        """A row by number, or by the name of a layer or parameter.

        Raises:
            KeyError: There is no layer or parameter of this name.
        """
        if isinstance(key, str):
            for row in self.rows:
                if key == (row.factor or row.layer):
                    return row
            raise KeyError(f"the report has no layer or parameter {key!r}")
        return self.rows[key]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[CoordRow]:
        """The rows in the order of the model."""
        return iter(self.rows)

    @property
    def rows(self) -> tuple[CoordRow, ...]:
        """One row a layer, and below it one a factor, if it has several."""
        names = dict.fromkeys((record.layer, record.factor) for record in self.records)
        return tuple(self._row(*name) for name in names)

    @property
    def hidden(self) -> tuple[CoordRow, ...]:
        """The rows of hidden layers, which the verdict is about."""
        return tuple(row for row in self.rows if row.role == "hidden" and not row.factor)

    @property
    def ok(self) -> bool:
        """Whether no hidden layer drifts."""
        return all(row.verdict in FINE for row in self.hidden)

    @property
    def culprit(self) -> str:
        """The layer to look at: the one whose own weight drifts most, else the first that drifts; ``""`` if none.

        A layer's features also move because those before it do.  The change that its own weight makes of the same input
        tells the two apart.
        """
        drifting = [row for row in self.rows if not row.factor and row.verdict not in FINE]
        if not drifting:
            return ""
        own = {row.layer: abs(row.own.value) for row in drifting if math.isfinite(row.own.value)}
        worst = max(own, key=lambda layer: own[layer], default=drifting[0].layer)
        return worst if own.get(worst, math.inf) > self.tolerance else drifting[0].layer

    def assert_flat(self, tolerance: float = TOLERANCE) -> None:
        """For tests: the change of no hidden layer's features follows a power of width.

        Args:
            tolerance: The largest power, in absolute value.

        Raises:
            AssertionError: One does; the message has the table.
        """
        report = CoordReport(self.records, self.forecasts, self.steps, tolerance)
        assert report.ok, f"features drift with width; look at {report.culprit!r}\n{report.table()}"

    # ---------------------------------------------------------------------------------------------------------- output

    def table(self) -> str:
        """One line a layer and factor, and the verdict below."""
        head: tuple[str, ...] = (
            "layer",
            "structure",
            "feature change",
            "own change",
            "predicted",
            "norm",
            "change of norm",
        )
        head += ("at start", "predicted", "verdict")
        body = [
            (
                "  " + row.factor.rpartition(".")[2] if row.factor else row.layer,
                "" if row.factor else row.structure,
                "" if row.factor else str(row.feature),
                str(row.own),
                f"{row.predicted:+.2f}",
                str(row.norm) if row.norm.value == row.norm.value else "",
                str(row.change) if row.change.value == row.change.value else "",
                "" if row.factor else str(row.start),
                "" if row.factor or not math.isfinite(row.start_predicted) else f"{row.start_predicted:+.2f}",
                row.verdict,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *body)
        ]
        sizes = ", ".join(map(str, sorted({record.width for record in self.records})))
        seeds = len({record.seed for record in self.records})
        title = f"powers of width after {self.steps} steps; widths {sizes}; {seeds} seed(s)"
        last = "ok" if self.ok else f"drift; look at {self.culprit}"
        return "\n".join([title, *lines, f"verdict: {last}"])

    __str__ = table

    def to_json(self) -> str:
        """Rows, verdict and all measurements as JSON; numbers that are not finite become null."""
        data = {
            "steps": self.steps,
            "tolerance": self.tolerance,
            "ok": self.ok,
            "culprit": self.culprit,
            "rows": [asdict(row) for row in self.rows],
            "records": [asdict(record) for record in self.records],
            "forecasts": [asdict(forecast) for forecast in self.forecasts],
        }
        return json.dumps(_finite(data), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CoordReport:
        """The report that `to_json` wrote.

        Raises:
            StructureError: The text is no such report.
        """
        try:
            data = json.loads(text)
            nan = float("nan")
            rows: list[dict[str, Any]] = [{k: nan if v is None else v for k, v in r.items()} for r in data["records"]]
            records = [Record(**row) for row in rows]
            forecasts = [Forecast(**row) for row in data["forecasts"]]
            return cls(tuple(records), tuple(forecasts), data["steps"], data["tolerance"])
        except (KeyError, TypeError, ValueError) as error:
            raise StructureError(f"not a report of coord_check: {error!r}") from error

    def plot(self, figure: Any) -> Any:
        """Draw changes of features and of own weights over width, a line a hidden layer.

        Args:
            figure: A matplotlib figure, which is filled; nothing here imports matplotlib.

        Returns:
            The figure, so that ``report.plot(Figure()).savefig("check.png")`` works.
        """
        panels = figure.subplots(1, 2, sharey=True)
        for panel, key, word in zip(panels, ("feature", "own"), ("features", "the own weight's making"), strict=True):
            for row in self.hidden:
                widths, means = self.means(row.layer, "", key)
                if not widths:
                    continue
                panel.plot(widths, means, marker="o", label=f"{row.layer}: {getattr(row, key).value:+.2f}")
            panel.set(xscale="log", yscale="log", xlabel="width", title=f"change of {word} in {self.steps} steps")
            panel.grid(alpha=0.3, which="both")
            panel.legend(frameon=False, fontsize="small")
        panels[0].set_ylabel("root mean square")
        return figure

    # ---------------------------------------------------------------------------------------------------------- fitting

    def means(self, layer: str, factor: str, key: str) -> tuple[list[int], list[float]]:
        """Widths, and the geometric mean over seeds of a measured quantity at each."""
        found: dict[int, list[float]] = {}
        for record in self.records:
            value = getattr(record, key)
            if (record.layer, record.factor) == (layer, factor) and value > 0 and math.isfinite(value):
                found.setdefault(record.width, []).append(math.log(value))
        widths = sorted(found)
        return widths, [math.exp(sum(found[width]) / len(found[width])) for width in widths]

    def _row(self, layer: str, factor: str) -> CoordRow:
        records = [r for r in self.records if (r.layer, r.factor) == (layer, factor)]
        forecasts = [f for f in self.forecasts if (f.layer, f.factor) == (layer, factor)]
        slopes = {
            key: fit((r.width, getattr(r, key)) for r in records)
            for key in ("start", "feature", "own", "norm", "change")
        }
        predicted = fit((f.width, f.own) for f in forecasts).value
        return CoordRow(
            layer=layer,
            factor=factor,
            role=forecasts[0].role,
            structure=forecasts[0].structure,
            start_predicted=fit((f.width, f.start) for f in forecasts).value,
            predicted=predicted,
            verdict="" if factor else self._verdict(records, forecasts, slopes["feature"].value, predicted),
            **slopes,
        )

    def _verdict(self, records: Sequence[Record], forecasts: Sequence[Forecast], slope: float, predicted: float) -> str:
        if not all(math.isfinite(r.feature) and math.isfinite(r.own) for r in records):
            return "diverged"
        if not all(r.feature for r in records):
            return "unmoved" if any(f.own for f in forecasts) else "not trained"
        if abs(slope) <= self.tolerance:
            return "ok"
        return "drift, as predicted" if abs(slope - predicted) <= self.tolerance else "drift"


# -------------------------------------------------------------------------------------------------------------- fitting


def fit(points: Iterable[tuple[float, float]]) -> Slope:
    """The power of width by least squares on logarithms, with its 95 % band.

    Args:
        points: Pairs of width and value; values that are zero or not finite are left out.

    Returns:
        NaN with fewer than two widths; an infinite band with two points.
    """
    kept = [(w, v) for w, v in points if v > 0 and math.isfinite(v)]
    widths, values = [w for w, _ in kept], [v for _, v in kept]
    if len(set(widths)) < 2:
        return Slope(math.nan, math.nan)
    found, free = power_law.fit(widths, values), len(kept) - 2
    return Slope(found.exponent, _student(free) * found.error if free else math.inf)


def _student(free: int) -> float:
    """The 97.5 % quantile of Student's t, by an expansion in 1 / degrees of freedom; exact values for the first."""
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return known.get(free, z + sum(term / free ** (k + 1) for k, term in enumerate(terms)))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
