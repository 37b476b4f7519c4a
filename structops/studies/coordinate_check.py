"""The coordinate check of structures, optimisers and rules on real digits: what grows or falls with width."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from structops.errors import StructureError
from structops.mup import Rule
from structops.report import machine, table, write_figure, write_json
from structops.studies.data import digits
from structops.studies.lab.pool import run_all
from structops.studies.network import RATES, RULES, build, optimizers
from structops.torch import plan
from structops.torch.coord_check import measure
from structops.torch.coord_report import CoordReport, CoordRow, Forecast, Record

STRUCTURES = ("dense", "low_rank", "monarch(blocks=4)", "tt(rank=4)", "btt", "kron")
WIDTHS = (64, 128, 256, 512, 1024)
BATCH = 120


@dataclass(frozen=True)
class Variant:
    """What is checked: a structure, an optimiser and a rule; ``share_exponent`` is that of the corrected rule."""

    structure: str
    optimizer: str
    rule: str
    share_exponent: float = 0.5

    @property
    def made(self) -> Rule:
        """The rule."""
        rule = RULES[self.rule](self.optimizer)
        return replace(rule, share_exponent=self.share_exponent) if rule.share_exponent else rule


@dataclass(frozen=True)
class Settings:
    """How the networks are trained.

    Attributes:
        widths: Of the networks.
        steps: Optimiser steps before the measurement.
        seeds: Seeds of initial values and batches.
        expansion: Width inside a block, relative to that of the residual stream.
        share_exponent: That of the corrected rule.
        rates: Learning rate of the dense network of width 64 for each optimiser.
    """

    widths: tuple[int, ...] = WIDTHS
    steps: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    expansion: int = 4
    share_exponent: float = 0.5
    rates: tuple[tuple[str, float], ...] = tuple(RATES.items())


@dataclass(frozen=True)
class Job:
    """One network from all seeds."""

    variant: Variant
    width: int
    settings: Settings


@dataclass(frozen=True)
class Done:
    """A job that has ended."""

    job: Job
    records: list[Record]
    forecasts: list[Forecast]
    seconds: float


@dataclass(frozen=True)
class Checked:
    """The report of a variant."""

    variant: Variant
    report: CoordReport


def variants(
    structures: Sequence[str], chosen: Sequence[str], rules: Sequence[str], settings: Settings
) -> list[Variant]:
    """All combinations, without those whose learning rates are those of another rule before it.

    Raises:
        StructureError: An optimiser or a rule is unknown.
    """
    if unknown := [name for name in chosen if name not in RATES] + [name for name in rules if name not in RULES]:
        raise StructureError(f"{', '.join(unknown)} not among {'; '.join([*RATES, *RULES])}")
    found = []
    for structure in structures:
        with torch.device("meta"):
            # Large and of unequal modes, so that two rules do not agree by accident.
            models = [build(structure, width, settings.expansion) for width in (256, 512)]
        for optimizer in chosen:
            seen = []
            for rule in rules:
                variant = Variant(structure, optimizer, rule, settings.share_exponent)
                rates = [[row.lr_scale for row in plan(model, variant.made)] for model in models]
                if rates not in seen:
                    seen.append(rates)
                    found.append(variant)
    return found


def batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images, from the seed alone."""
    data = digits()
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    chosen = [order[torch.arange(k * BATCH, (k + 1) * BATCH) % len(order)] for k in range(count)]
    return [(x[index], y[index]) for index in chosen]


def run_job(job: Job) -> Done:
    """Train and measure the network of one width from all seeds in this process."""
    start = time.perf_counter()
    variant, settings = job.variant, job.settings
    rate = dict(settings.rates)[variant.optimizer]
    records, forecasts = [], []
    for seed in settings.seeds:
        measured, said = measure(
            lambda width: build(variant.structure, width, settings.expansion),
            job.width,
            seed,
            batches(seed, settings.steps),
            functional.cross_entropy,
            lambda model: optimizers(model, variant.made, rate, settings.expansion),
            settings.steps,
            replace(variant.made, structure_aware=True),
            torch.from_numpy(digits().test_x),
        )
        records += measured
        forecasts = said
    return Done(job, records, forecasts, time.perf_counter() - start)


def coordinate_check(
    *,
    structures: Sequence[str],
    chosen: Sequence[str],
    rules: Sequence[str],
    settings: Settings,
    out: Path,
    console: Console,
    workers: int | None = None,
) -> list[Checked]:
    """Check all variants; write ``coordinate-check.json`` and ``coordinate-check.png`` into ``out``.

    An interrupt leaves the files with the variants that were finished, and is raised again.

    Args:
        structures: Specs of the hidden layers.
        chosen: Optimisers, of `RATES`.
        rules: Of `RULES`; one whose rates are those of a rule before it is left out.
        settings: How the networks are trained.
        out: Folder of the files.
        console: Where the table and the progress go.
        workers: Processes; one a core if not given, none with 0.

    Raises:
        StructureError: An optimiser, a rule or a structure is unknown.
    """
    todo = variants(structures, chosen, rules, settings)
    start = time.perf_counter()
    checked: list[Checked] = []

    def save() -> None:
        seconds = time.perf_counter() - start
        write_json(out / "coordinate-check.json", _data(checked, len(todo), settings, seconds))

    try:
        for one in _check_all(todo, settings, console, workers):
            checked.append(one)
            checked.sort(key=lambda one: todo.index(one.variant))
            save()
    finally:
        if checked:
            write_figure(out / "coordinate-check.png", figure(checked))
            console.print(summary_table(checked, settings))
        console.print(f"{len(checked)} of {len(todo)} checks, {time.perf_counter() - start:.0f} s; in {out}")
    return checked


def _check_all(todo: Sequence[Variant], settings: Settings, console: Console, workers: int | None) -> Iterator[Checked]:
    """The variants as their last network ends."""
    jobs = [Job(variant, width, settings) for variant in todo for width in settings.widths]
    # Dense networks take longest and go first; a variant's widths together, so that an interrupt keeps most variants.
    jobs.sort(key=lambda job: (job.variant.structure != "dense", todo.index(job.variant), -job.width))
    finished: dict[Variant, list[Done]] = {}
    ended = run_all(
        run_job,
        jobs,
        console=console,
        describe=lambda job: f"{job.variant.structure}, {job.variant.optimizer}, {job.width}",
        workers=workers,
    )
    for job, done in ended:
        finished.setdefault(job.variant, []).append(done)
        if len(finished[job.variant]) == len(settings.widths):
            parts = sorted(finished[job.variant], key=lambda part: part.job.width)
            records = tuple(record for part in parts for record in part.records)
            forecasts = tuple(forecast for part in parts for forecast in part.forecasts)
            yield Checked(job.variant, CoordReport(records, forecasts, settings.steps))


# ------------------------------------------------------------------------------------------------------------ reporting


def worst(report: CoordReport) -> CoordRow:
    """The hidden layer whose features drift most."""
    return max(report.hidden, key=lambda row: abs(row.feature.value) if math.isfinite(row.feature.value) else math.inf)


COLUMNS = ("optimizer", "structure", "rule", "feature change", "of layer", "own change", "predicted", "verdict")


def summary_cells(checked: Sequence[Checked]) -> list[tuple[str, ...]]:
    """One row a variant: the hidden layer that drifts most, and where to look."""
    cells: list[tuple[str, ...]] = []
    for one in sorted(checked, key=lambda one: list(RATES).index(one.variant.optimizer)):
        row = worst(one.report)
        verdict = "ok" if one.report.ok else f"{row.verdict}: {one.report.culprit}"
        variant = one.variant
        cells.append(
            (
                *(variant.optimizer, variant.structure, variant.rule, str(row.feature), row.layer, str(row.own)),
                *(f"{row.predicted:+.2f}", verdict),
            )
        )
    return cells


def summary_table(checked: Sequence[Checked], settings: Settings) -> Any:
    """The table of `summary_cells`."""
    widths, seeds = ", ".join(map(str, settings.widths)), len(settings.seeds)
    title = f"Powers of width after {settings.steps} steps; widths {widths}; {seeds} seed(s)"
    result = table(title, COLUMNS, summary_cells(checked))
    for column in result.columns:  # in a narrow terminal text goes on in the next line
        column.overflow = "fold"
    return result


def _data(checked: Sequence[Checked], total: int, settings: Settings, seconds: float) -> dict[str, Any]:
    return {
        "machine": machine(),
        "settings": asdict(settings),
        "finished": f"{len(checked)} of {total}",
        "seconds": seconds,
        "checks": [{**asdict(one.variant), **json.loads(one.report.to_json())} for one in checked],
    }


def figure(checked: Sequence[Checked]) -> Any:
    """Change of features of the last hidden layer over width: a panel an optimiser, a colour a structure."""
    from matplotlib.figure import Figure

    chosen = list(dict.fromkeys(one.variant.optimizer for one in checked))
    structures = list(dict.fromkeys(one.variant.structure for one in checked))
    styles = dict(zip(RULES, ("-", "-.", ":", "--"), strict=True))
    result = Figure(figsize=(1.5 + 4 * len(chosen), 4.2), layout="constrained")
    panels = result.subplots(1, len(chosen), squeeze=False)[0]
    for panel, optimizer in zip(panels, chosen, strict=True):
        for one in checked:
            if one.variant.optimizer != optimizer:
                continue
            widths, means = one.report.means(one.report.hidden[-1].layer, "", "feature")
            color = f"C{structures.index(one.variant.structure)}"
            panel.plot(widths, means, marker=".", color=color, linestyle=styles[one.variant.rule])
        panel.set(xscale="log", yscale="log", xlabel="width", title=optimizer)
        ticks = sorted({record.width for one in checked for record in one.report.records})
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"change of features, {checked[0].report.hidden[-1].layer}")
    lines = [(f"C{k}", "-", name) for k, name in enumerate(structures)]
    lines += [("0.4", styles[rule], f"rule: {rule}") for rule in styles if any(o.variant.rule == rule for o in checked)]
    for color, style, label in lines:
        panels[-1].plot([], [], color=color, linestyle=style, label=label)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return result
