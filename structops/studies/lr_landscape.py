"""Loss over learning rate at growing widths, on real digits: does a rate that was tuned on a small network transfer?

All networks are trained by Adam.  The rate is that of the dense network of width 64; rules turn it into those of
factors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from structops.errors import StructureError
from structops.spec import structure
from structops.studies.data import digits
from structops.studies.lab import figures
from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results, Study, Work
from structops.studies.lab.tables import Table
from structops.studies.lr_sweep import Point, SweepReport
from structops.studies.rules import RULES, check_names, rule_of
from structops.studies.training import Recipe, epochs

LAST = 10  # steps whose mean loss counts
MOST = 1000  # rates of a grid


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        structure: Of the hidden layers.
        rule: A name of `RULES`.
        width: Of the residual stream.
        lr: Learning rate of the dense network of width 64.
        seed: Of initial values and batches.
        epochs: Passes over the training images, with noise on the pixels.
        expansion: Width inside a block, relative to that of the residual stream.
        hidden_only: Whether the rate is that of hidden layers alone, while the input layer and the head keep theirs.
    """

    structure: str
    rule: str
    width: int
    lr: float
    seed: int
    epochs: int
    expansion: int = 4
    hidden_only: bool = True


@dataclass(frozen=True)
class LrLandscape(Study):
    """Does the best learning rate stay the same as the network grows?  Train at every width and rate.

    Attributes:
        structures: Of the hidden layers.
        rules: Of `RULES`; for a dense network all are the same, and the first is taken.
        widths: Of the networks.
        lrs: Powers of two of the rates, ``first:last`` or ``first:last:step``.
        seed: First seed.
        seeds: Number of seeds.
        epochs: Passes over the training images.
        all_layers: Whether the rates of input layer and head are swept, too.
    """

    name: ClassVar[str] = "lr-landscape"
    title: ClassVar[str] = "Learning-rate landscape"

    structures: Annotated[tuple[str, ...], option(help="Specs of the hidden layers.")] = ("dense", "btt")
    rules: Annotated[tuple[str, ...], option("--rules", "--rule", help="Of paper, corrected and naive.")] = (
        "paper",
        "naive",
    )
    widths: Annotated[tuple[int, ...], option(help="Widths, at least two.")] = (64, 128, 256)
    lrs: Annotated[str, option(help="Powers of two of the learning rates, first:last or first:last:step.")] = "-12:-2"
    seed: Annotated[int, option(help="First seed.")] = 0
    seeds: Annotated[int, option(min=1, help="Number of seeds.")] = 2
    epochs: Annotated[int, option(min=1, help="Passes over the training images.")] = 6
    all_layers: Annotated[bool, option("--all-layers", help="Sweep the rates of input layer and head, too.")] = False

    def __post_init__(self) -> None:
        """Check names and the grid."""
        check_names(self.rules, RULES)
        if len(set(self.widths)) < 2:
            raise StructureError(f"a landscape needs two widths, got {self.widths}")
        powers(self.lrs)

    def runs(self) -> Sequence[Trial]:
        """Every structure, rule, width, rate and seed."""
        return [
            Trial(spec, rule, width, 2.0**power, seed, self.epochs, hidden_only=not self.all_layers)
            for spec in self.structures
            for rule in (self.rules[:1] if structure(spec).name == "dense" else self.rules)
            for width in sorted(set(self.widths))
            for power in powers(self.lrs)
            for seed in range(self.seed, self.seed + self.seeds)
        ]

    def work(self) -> Work:
        """Train."""
        return Work(run_trial, lambda trial: f"{trial.structure}, {trial.rule}, width {trial.width}, seed {trial.seed}")

    def report(self, results: Results) -> Report:
        """Best rates of every width, and the losses over rates."""
        reports = reports_of(results)
        return Report({"rates": rates_table(reports)}, {"losses": figure(reports)}, findings(reports))


def powers(text: str) -> list[float]:
    """The numbers of ``first:last:step``, ascending.

    Raises:
        StructureError: It is no such text, or gives fewer than three numbers.
    """
    try:
        first, last, *rest = (float(part) for part in text.split(":"))
        step = rest[0] if len(rest) == 1 else 1.0
        values = [first + k * step for k in range(int((last - first) / step + 1e-9) + 1)] if len(rest) < 2 else []
    except (ValueError, ZeroDivisionError, OverflowError):
        values = []
    if not 3 <= len(values) <= MOST or values[0] > values[-1] or not -100 <= values[0] <= values[-1] <= 100:
        raise StructureError(f"expected first:last or first:last:step with three or more powers of two, got {text!r}")
    return values


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train one network in this process."""
    start = time.perf_counter()
    return {"loss": train(trial), "seconds": time.perf_counter() - start}


def train(trial: Trial) -> float:
    """Mean loss of the last steps of a training; infinite once it is not finite."""
    import torch
    from torch.nn import functional

    from structops.studies.network import build, optimizers

    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = build(trial.structure, trial.width, trial.expansion)
        made = optimizers(model, rule_of(trial.rule, "adam"), trial.lr, trial.expansion, hidden_only=trial.hidden_only)
        losses: list[float] = []
        for images, labels in epochs(data, Recipe(epochs=trial.epochs), trial.seed):
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


# ------------------------------------------------------------------------------------------------------------ reporting


def reports_of(results: Results) -> dict[tuple[str, str], SweepReport]:
    """The sweep of every structure and rule."""
    found: dict[tuple[str, str], list[Point]] = {}
    for trial, result in results.items():
        loss = math.nan if result["loss"] is None else result["loss"]
        found.setdefault((trial.structure, trial.rule), []).append(Point(trial.width, trial.lr, trial.seed, loss))
    return {key: SweepReport(tuple(points)) for key, points in found.items()}


def rates_table(reports: dict[tuple[str, str], SweepReport]) -> Table:
    """One row a sweep; the best rates are those of the widths in ascending order."""
    rows = tuple(
        (
            *key,
            " / ".join(f"{o.log2_lr:.1f}" + ("*" if o.edge else "") for o in report.optima),
            " / ".join(f"{o.flatness:.1f}" for o in report.optima),
            *(f"{report.drift:+.2f}", f"x {report.penalty:.2f}", report.verdict),
        )
        for key, report in reports.items()
    )
    columns = (
        "structure",
        "rule",
        "log2 of best lr",
        "flat octaves",
        "octaves a doubling",
        "cost of transfer",
        "verdict",
    )
    widths = " / ".join(str(width) for width in next(iter(reports.values())).widths) if reports else ""
    return Table(f"Best learning rates at widths {widths}; * at the end of the grid", columns, rows)


def findings(reports: dict[tuple[str, str], SweepReport]) -> list[Finding]:
    """What figure 2b of the paper shows."""
    found = []
    for (spec, rule), report in reports.items():
        here = f"best rate moves by {report.drift:+.2f} octaves a doubling, which costs x {report.penalty:.2f}"
        if rule == "naive":
            claim = f"{spec}: with the naive rule the best rate drifts with the width"
            found.append(Finding(claim, "§4.2, Fig. 2b", here, report.verdict == "drift"))
        elif rule == "paper":
            claim = f"{spec}: with the paper's rule the best rate stays"
            found.append(Finding(claim, "§4.2, Fig. 2b", here, report.verdict != "drift"))
    return found


def figure(reports: dict[tuple[str, str], SweepReport]) -> Any:
    """Loss over learning rate, a panel a sweep."""
    with figures.canvas(max(1, len(reports)), sharey=True) as (result, panels):
        for panel, ((spec, rule), report) in zip(panels, reports.items(), strict=False):
            report.draw(panel)
            panel.set_title(spec if spec == "dense" else f"{spec}, {rule} rule")
        panels[0].set_ylabel(f"training loss, last {LAST} steps")
        panels[0].legend()
    return result
