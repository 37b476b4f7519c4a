"""Error over learning rate, a panel a variant of the network: what two studies draw and tabulate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from structops.studies.curves import NAMES, points_table
from structops.studies.lab import figures
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.lab.tables import Table
from structops.studies.runs import Run

Key = tuple[str, str]  # the panel and the curve
LEAST = 0.02  # relative differences below it are not told apart


def report_of(
    results: Results, error: str, key: Callable[[Run], Key], columns: tuple[str, str], findings: Sequence[Finding]
) -> Report:
    """Errors over rates: the lowest ones, all networks, and a figure with a panel a key."""
    found = by_rate(results, error, key)
    tables = {"best": best_table(found, error, columns)}
    tables["networks"] = points_table(results, lambda run: ", ".join(key(run)))
    return Report(tables, {"rates": rate_figure(found, error)}, findings)


def by_rate(results: Results, error: str, key: Callable[[Run], Key]) -> dict[Key, dict[float, float]]:
    """Mean errors over seeds of every panel, curve and rate; infinite where a training diverged."""
    found: dict[Key, dict[float, list[float]]] = {}
    for run, result in results.items():
        value = math.inf if result[error] is None else float(result[error])
        found.setdefault(key(run), {}).setdefault(run.recipe.lr, []).append(value)
    return {
        name: {lr: sum(values) / len(values) for lr, values in sorted(rates.items())} for name, rates in found.items()
    }


def best_table(found: dict[Key, dict[float, float]], error: str, columns: tuple[str, str]) -> Table:
    """A row a curve: its lowest error and the rate that has it, and errors at the other rates."""
    rates = sorted({lr for errors in found.values() for lr in errors})
    rows = []
    for key, errors in found.items():
        lr = min(errors, key=lambda rate: errors[rate])
        rows.append((*key, lr, errors[lr], *(errors.get(rate) for rate in rates)))
    names = tuple(f"at {rate:g}" for rate in rates)
    return Table(f"Lowest {NAMES[error]} over learning rates", (*columns, "best rate", "lowest", *names), tuple(rows))


def rate_figure(found: dict[Key, dict[float, float]], error: str) -> Any:
    """Error over learning rate; crosses at the upper edge are trainings that diverged."""
    panels_of = list(dict.fromkeys(panel for panel, _ in found))
    curves_of = list(dict.fromkeys(curve for _, curve in found))
    with figures.canvas(len(panels_of), width=3.4, sharey=True) as (figure, panels):
        for name, panel in zip(panels_of, panels, strict=True):
            for (where, curve), errors in found.items():
                if where != name:
                    continue
                finite = {lr: value for lr, value in errors.items() if math.isfinite(value)}
                look = figures.look(curves_of, curve)
                panel.plot(list(finite), list(finite.values()), label=curve, **look)
                lost = [lr for lr in errors if lr not in finite]
                panel.plot(
                    *(lost, [0.99] * len(lost), "x"),
                    color=look["color"],
                    transform=panel.get_xaxis_transform(),
                )
            panel.set(xscale="log", yscale="log", xlabel="learning rate of the dense network", title=name)
            figures.log_ticks(panel)
        panels[0].set_ylabel(NAMES[error])
        handles = {
            text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        panels[-1].legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def lowest(found: dict[Key, dict[float, float]], key: Key) -> float | None:
    """The lowest error of a curve over its rates; None where there is none."""
    return min(found[key].values()) if key in found else None


def below(one: float, other: float) -> bool | None:
    """Whether the first is lower; None where the two are equal or less than `LEAST` apart."""
    if one == other or (math.isfinite(one) and math.isfinite(other) and abs(one - other) < LEAST * other):
        return None
    return one < other


def shown(values: Sequence[float | None]) -> str:
    """Errors as text."""
    return " and ".join("none" if value is None else f"{value:.3g}" for value in values)
