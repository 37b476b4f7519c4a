"""Loss over learning rate at growing widths, on real digits: does a rate that was tuned on a small network transfer?

All networks are trained by Adam.  The rate is that of the dense network of width 64; rules turn it into those of
factors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

from structops.errors import StructureError
from structops.report import machine, table, write_figure, write_json
from structops.spec import structure
from structops.studies.data import digits
from structops.studies.lab.pool import run_all
from structops.studies.lab.store import locked
from structops.studies.lr_sweep import Point, SweepReport, append, load
from structops.studies.network import RULES, build, optimizers
from structops.studies.training import Recipe, epochs

STRUCTURES = ("dense", "btt")
RULE_NAMES = ("paper", "naive")
WIDTHS = (64, 128, 256)
LAST = 10  # steps whose mean loss counts


@dataclass(frozen=True)
class Landscape:
    """What a sweep is of.

    Attributes:
        structure: Of the hidden layers.
        rule: A name of `RULES`.
        epochs: Passes over the training images, with noise on the pixels.
        expansion: Width inside a block, relative to that of the residual stream.
        hidden_only: Whether the rate is that of hidden layers alone, while the input layer and the head keep theirs.
    """

    structure: str
    rule: str
    epochs: int = 6
    expansion: int = 4
    hidden_only: bool = True

    @property
    def label(self) -> str:
        """All of it as text, the name of the sweep in the file of results."""
        layers = "hidden" if self.hidden_only else "all"
        return f"{self.structure}|{self.rule}|epochs={self.epochs}|expansion={self.expansion}|{layers}"


@dataclass(frozen=True)
class Job:
    """One training."""

    landscape: Landscape
    width: int
    lr: float
    seed: int


def run_job(job: Job) -> Point:
    """Train one network in this process."""
    return Point(job.width, job.lr, job.seed, train(job), job.landscape.label)


def train(job: Job) -> float:
    """Mean loss of the last steps of a training; infinite once it is not finite."""
    what, data = job.landscape, digits()
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        model = build(what.structure, job.width, what.expansion)
        rule = RULES[what.rule]("adam")
        made = optimizers(model, rule, job.lr, what.expansion, hidden_only=what.hidden_only)
        losses: list[float] = []
        for images, labels in epochs(data, Recipe(epochs=what.epochs), job.seed):
            for x, y in zip(torch.from_numpy(images), torch.from_numpy(labels), strict=True):
                loss = functional.cross_entropy(model(x), y)
                for optimizer in made:
                    optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer in made:
                    optimizer.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    return math.inf
    return sum(losses[-LAST:]) / len(losses[-LAST:])


def lr_landscape(
    *,
    structures: Sequence[str],
    rules: Sequence[str],
    widths: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int],
    passes: int,
    hidden_only: bool = True,
    out: Path,
    console: Console,
    workers: int | None = None,
) -> dict[Landscape, SweepReport]:
    """Sweep; write ``lr-landscape.jsonl`` as it goes, then ``lr-landscape.json`` and ``lr-landscape.png``.

    Stopped in any way and started again with the same folder, it goes on where it was.

    Args:
        structures: Specs of the hidden layers.
        rules: Of `RULES`; for a dense network all are the same, and the first is taken.
        widths: Of the networks.
        lrs: Learning rates of the dense network of width 64.
        seeds: Seeds of initial values and batches.
        passes: Passes over the training images.
        hidden_only: Whether the rate is that of hidden layers alone.
        out: Folder of the files.
        console: Where the table and the progress go.
        workers: Processes; one a core if not given, none with 0.

    Raises:
        StructureError: A rule or structure is unknown, or there are less than three rates.
    """
    if unknown := [name for name in rules if name not in RULES]:
        raise StructureError(f"{', '.join(unknown)} not among {'; '.join(RULES)}")
    if len(set(lrs)) < 3:
        raise StructureError("a landscape needs three learning rates")
    landscapes = [
        Landscape(spec, rule, passes, hidden_only=hidden_only)
        for spec in structures
        for rule in (rules[:1] if structure(spec).name == "dense" else rules)
    ]
    file = out / "lr-landscape.jsonl"
    found = {(p.label, p.width, p.lr, p.seed): p for p in load(file)}
    jobs = [Job(what, width, lr, seed) for what in landscapes for width in widths for lr in lrs for seed in seeds]
    todo = [job for job in jobs if (job.landscape.label, job.width, job.lr, job.seed) not in found]
    start = time.perf_counter()
    with locked(out):
        ended = run_all(
            run_job,
            todo,
            console=console,
            describe=lambda job: f"{job.landscape.structure}, {job.landscape.rule}, width {job.width}",
            workers=workers,
            done=len(jobs) - len(todo),
        )
        for _, point in ended:
            append(file, point)
            found[point.label, point.width, point.lr, point.seed] = point
    reports = {
        what: SweepReport(tuple(found[what.label, width, lr, seed] for width in widths for lr in lrs for seed in seeds))
        for what in landscapes
    }
    data = [{**asdict(what), **report.to_data()} for what, report in reports.items()]
    write_json(out / "lr-landscape.json", {"machine": machine(), "sweeps": data})
    write_figure(out / "lr-landscape.png", figure(reports))
    console.print(summary_table(reports))
    seconds = time.perf_counter() - start
    console.print(f"{len(todo)} of {len(jobs)} trainings were new, {seconds:.0f} s; in {out}")
    return reports


# ------------------------------------------------------------------------------------------------------------ reporting

COLUMNS = ("structure", "rule", "log2 of best lr", "flat octaves", "octaves a doubling", "cost of transfer", "verdict")


def summary_cells(reports: dict[Landscape, SweepReport]) -> list[tuple[str, ...]]:
    """One row a sweep; the best rates are those of the widths in ascending order."""
    return [
        (
            *(what.structure, what.rule),
            " / ".join(f"{o.log2_lr:.1f}" + ("*" if o.edge else "") for o in report.optima),
            " / ".join(f"{o.flatness:.1f}" for o in report.optima),
            *(f"{report.drift:+.2f}", f"x {report.penalty:.2f}", report.verdict),
        )
        for what, report in reports.items()
    ]


def summary_table(reports: dict[Landscape, SweepReport]) -> Any:
    """The table of `summary_cells`."""
    widths = " / ".join(map(str, next(iter(reports.values())).widths))
    result = table(f"Best learning rates at widths {widths}; * at the end of the grid", COLUMNS, summary_cells(reports))
    for column in result.columns:  # in a narrow terminal text goes on in the next line
        column.overflow, column.no_wrap = "fold", False
    return result


def figure(reports: dict[Landscape, SweepReport]) -> Any:
    """Loss over learning rate, a panel a sweep."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(4 * len(reports), 3.8), layout="constrained")
    panels = result.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for panel, (what, report) in zip(panels, reports.items(), strict=True):
        report.draw(panel)
        panel.set_title(what.structure if what.structure == "dense" else f"{what.structure}, {what.rule} rule")
    panels[0].set_ylabel(f"training loss, last {LAST} steps")
    panels[0].legend(frameon=False)
    return result
