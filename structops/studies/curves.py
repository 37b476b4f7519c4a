"""From trainings to curves: one of every structure, against a cost; what their tables, figures and findings say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from structops.studies.lab import figures
from structops.studies.lab.frontier import Curve, Point, Ratio, cost_ratio
from structops.studies.lab.study import Finding, Results
from structops.studies.lab.tables import Table
from structops.studies.runs import Run

COSTS = {
    "macs": "MACs per example",
    "num_params": "parameters",
    "activations": "stored numbers per example",
    "seconds": "seconds of training",
}
NAMES = {
    "train_error": "training error",
    "test_error": "test error",
    "train_loss": "training loss",
    "test_loss": "test loss",
}
Label = Callable[[Run], str]


def structure_of(run: Run) -> str:
    """The label of most curves."""
    return str(run.model.structure)


def grouped(results: Results, label: Label = structure_of) -> dict[str, dict[Any, list[dict[str, Any]]]]:
    """Results of all seeds, by label and then by network, in the order of the runs."""
    found: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for run, result in results.items():
        found.setdefault(label(run), {}).setdefault(run.model, []).append(result)
    return found


def curves(results: Results, cost: str, error: str, label: Label = structure_of) -> dict[str, Curve]:
    """The curve of every label; a network of which a training diverged is no point."""
    return {
        name: Curve.of(
            name,
            (
                Point.of((row[cost] for row in rows), (_number(row[error]) for row in rows))
                for rows in networks.values()
            ),
        )
        for name, networks in grouped(results, label).items()
    }


def points_table(results: Results, label: Label = structure_of) -> Table:
    """A row a network: sizes, and means over seeds."""
    rows = []
    for name, networks in grouped(results, label).items():
        for model, found in networks.items():
            means = [_mean([_number(row[key]) for row in found]) for key in ("train_error", "test_error", "test_loss")]
            sizes = (model.macs, model.num_params, model.activations)
            seconds = _mean([row["seconds"] for row in found])
            rows.append((name, model.width, *sizes, *means, seconds, len(found)))
    columns = ("structure", "width", "MACs", "parameters", "stored", "training error", "test error", "test loss")
    return Table("All networks", (*columns, "seconds", "seeds"), tuple(rows))


def laws_table(results: Results, error: str, reference: str = "dense", label: Label = structure_of) -> Table:
    """A row a structure: the power law in MACs, and its costs relative to the reference's at equal error."""
    by_cost = {cost: curves(results, cost, error, label) for cost in COSTS}
    rows = []
    for name, curve in by_cost["macs"].items():
        law = curve.law
        ratios = [
            _text(cost_ratio(by_cost[cost][name], by_cost[cost][reference])) if reference in by_cost[cost] else None
            for cost in COSTS
        ]
        best = curve.best.error if curve.best else None
        rows.append((name, -law.exponent if law else None, law.error if law else None, best, *ratios))
    title = f"Power laws of the {NAMES[error]} in MACs; costs at equal error, relative to {reference}"
    columns = ("structure", "α", "±", "lowest", "MACs", "params", "stored", "seconds")
    return Table(title, columns, tuple(rows))


def cost_figure(
    results: Results, costs: Sequence[str], error: str, label: Label = structure_of, lines: bool = True
) -> Any:
    """Error against costs, a panel a cost, a curve a label; bars reach from the lowest to the highest seed."""
    with figures.canvas(len(costs), sharey=True) as (figure, panels):
        for cost, panel in zip(costs, panels, strict=True):
            found = curves(results, cost, error, label)
            for name, curve in found.items():
                x, y = [p.cost for p in curve.points], [p.error for p in curve.points]
                bars = [
                    [max(0.0, gap) for gap in gaps]
                    for gaps in zip(*((p.error - p.low, p.high - p.error) for p in curve.points), strict=True)
                ]
                look = figures.look(list(found), name)
                if lines and cost == "macs" and curve.law:
                    panel.plot(x, [curve.law(c) for c in x], color=look["color"], linestyle=look["linestyle"])
                    look["linestyle"] = "none"
                text = name if not (cost == "macs" and curve.law) else f"{name}, α = {-curve.law.exponent:.3f}"
                panel.errorbar(x, y, yerr=bars, label=text, capsize=2, elinewidth=0.8, **look)
            panel.set(xscale="log", yscale="log", xlabel=COSTS[cost])
            figures.log_ticks(panel)
        panels[0].set_ylabel(NAMES[error])
        # The names carry the exponents of the first panel; beside the panels they hide no point.
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def steeper(curve: Curve | None, other: Curve | None) -> bool | None:
    """Whether a curve falls faster than another, at the 5 % level of a t test; None where that cannot be told."""
    ours, theirs = (one.law if one else None for one in (curve, other))
    if curve is None or other is None or ours is None or theirs is None:
        return None
    from scipy.stats import t

    # Two numbers of each line are fitted; sizes, not seeds, are what scatters.
    freedom = len(curve.points) + len(other.points) - 4
    gap, error = theirs.exponent - ours.exponent, math.hypot(ours.error, theirs.error)
    return None if abs(gap) <= t.ppf(0.975, freedom) * error else gap > 0


def named(found: Iterable[str], structure: str) -> str:
    """The first label of a structure, with whatever arguments; the name itself if there is none."""
    return next((label for label in found if label.partition("(")[0] == structure), structure)


def exponents(found: Mapping[str, Curve], *names: str) -> str:
    """The exponents of some curves as text."""
    laws = [(name, found[name].law) for name in names if name in found]
    return ", ".join(f"{name} {-law.exponent:.3f} ± {law.error:.3f}" for name, law in laws if law)


def compared(claim: str, source: str, found: Mapping[str, Curve], one: str, other: str) -> Finding | None:
    """The finding that one structure has the larger exponent; None where one of them was not trained."""
    if one not in found or other not in found:
        return None
    return Finding(claim, source, exponents(found, one, other), steeper(found[one], found[other]))


def cheaper(
    claim: str,
    source: str,
    results: Results,
    error: str,
    one: str,
    other: str,
    cost: str,
    label: Label = structure_of,
) -> Finding | None:
    """The finding that one structure costs less than another at equal error; None where one was not trained.

    It cannot be told where the costs differ by less than 3 %.
    """
    found = curves(results, cost, error, label)
    if one not in found or other not in found:
        return None
    ratio = cost_ratio(found[one], found[other])
    if ratio is None:
        return Finding(claim, source, "no equal error", None)
    here = f"{one} needs {ratio} times the {COSTS[cost]} of {other}"
    less = ratio.value < 1
    unknown = abs(ratio.value - 1) < 0.03 or ratio.bound == ("≥" if less else "≤")
    return Finding(claim, source, here, None if unknown else less)


def _text(ratio: Ratio | None) -> str | None:
    return None if ratio is None else str(ratio)


def _number(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
