"""The coordinate check of structures, optimisers and rules on real digits: what grows or falls with width."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from structops.errors import StructureError
from structops.studies.data import digits
from structops.studies.lab import figures
from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results, Study, Work
from structops.studies.lab.tables import Table
from structops.studies.rules import RATES, RULES, check_names, rule_of

if TYPE_CHECKING:
    from torch import Tensor

    from structops.mup import Rule
    from structops.torch.coord_report import CoordReport, CoordRow

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
        shared = {"share_exponent": self.share_exponent} if "share_exponent" in RULES[self.rule] else {}
        return rule_of(self.rule, self.optimizer, **shared)


@dataclass(frozen=True)
class Check:
    """One network from all seeds.

    Attributes:
        variant: What is checked.
        width: Of the residual stream.
        steps: Optimiser steps before the measurement.
        seeds: Seeds of initial values and batches.
        expansion: Width inside a block, relative to that of the residual stream.
        rate: Learning rate of the dense network of width 64.
    """

    variant: Variant
    width: int
    steps: int
    seeds: tuple[int, ...]
    expansion: int
    rate: float


@dataclass(frozen=True)
class CoordinateCheck(Study):
    """Does the change of features within a few steps stay the same as the network grows?  Fit its power of width.

    Attributes:
        structures: Of the hidden layers.
        optimizers: Of `RATES`.
        rules: Of `RULES`; one whose rates are those of a rule before it is left out.
        widths: Of the networks.
        steps: Optimiser steps before the measurement.
        seed: First seed.
        seeds: Number of seeds.
        expansion: Width inside a block, relative to that of the residual stream.
        share_exponent: That of the corrected rule.
    """

    name: ClassVar[str] = "coordinate-check"
    title: ClassVar[str] = "Coordinate check"

    structures: Annotated[tuple[str, ...], option(help="Specs of the hidden layers.")] = (
        *("dense", "low_rank", "monarch(blocks=4)", "tt(rank=4)", "btt", "kron"),
    )
    optimizers: Annotated[tuple[str, ...], option(help="Of adam, sgd and muon.")] = ("adam", "sgd", "muon")
    rules: Annotated[
        tuple[str, ...],
        option(
            "--rules",
            "--rule",
            help="Of paper, blocks (for SGD), corrected (for shared factors) and naive; those that differ.",
        ),
    ] = ("paper", "blocks", "corrected", "naive")
    widths: Annotated[tuple[int, ...], option(help="Widths, at least two.")] = (64, 128, 256, 512, 1024)
    steps: Annotated[int, option(min=1, help="Optimiser steps before the measurement.")] = 10
    seed: Annotated[int, option(help="First seed.")] = 0
    seeds: Annotated[int, option(min=1, help="Number of seeds.")] = 5
    expansion: Annotated[int, option(min=1, help="Width inside a block, relative to the stream.")] = 4
    share_exponent: Annotated[float, option(help="Of the corrected rule.")] = 0.5

    def __post_init__(self) -> None:
        """Check names."""
        check_names(self.optimizers, RATES)
        check_names(self.rules, RULES)
        if len(set(self.widths)) < 2:
            raise StructureError(f"a coordinate check needs two widths, got {self.widths}")

    def runs(self) -> Sequence[Check]:
        """Every variant at every width."""
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        return [
            Check(variant, width, self.steps, seeds, self.expansion, RATES[variant.optimizer])
            for variant in self.variants()
            for width in sorted(set(self.widths))
        ]

    def variants(self) -> Iterator[Variant]:
        """All combinations, without those whose learning rates are those of another rule before it."""
        import torch

        from structops.studies.network import build
        from structops.torch import plan

        for structure in self.structures:
            with torch.device("meta"):
                # Large and of unequal modes, so that two rules do not agree by accident.
                models = [build(structure, width, self.expansion) for width in (256, 512)]
            for optimizer in self.optimizers:
                seen = []
                for rule in self.rules:
                    variant = Variant(structure, optimizer, rule, self.share_exponent)
                    rates = [[row.lr_scale for row in plan(model, variant.made)] for model in models]
                    if rates not in seen:
                        seen.append(rates)
                        yield variant

    def work(self) -> Work:
        """Train and measure."""
        return Work(run_check, describe)

    def report(self, results: Results) -> Report:
        """Powers of width, and the change of features over width."""
        reports = reports_of(results)
        if not reports:
            return Report()
        tables = {"slopes": slopes_table(reports), "layers": layers_table(reports)}
        return Report(tables, {"features": figure(reports)}, findings(reports))


def describe(check: Check) -> str:
    """A few words on a check."""
    return f"{check.variant.structure}, {check.variant.optimizer}, {check.variant.rule}, width {check.width}"


def batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images, from the seed alone."""
    import torch

    data = digits()
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    chosen = [order[torch.arange(k * BATCH, (k + 1) * BATCH) % len(order)] for k in range(count)]
    return [(x[index], y[index]) for index in chosen]


def run_check(check: Check) -> dict[str, Any]:
    """Train and measure the network of one width from all seeds in this process."""
    import torch
    from torch.nn import functional

    from structops.studies.network import build, optimizers
    from structops.torch.coord_check import measure

    start, variant = time.perf_counter(), check.variant
    records, forecasts = [], []
    for seed in check.seeds:
        measured, said = measure(
            lambda width: build(variant.structure, width, check.expansion),
            check.width,
            seed,
            batches(seed, check.steps),
            functional.cross_entropy,
            lambda model: optimizers(model, variant.made, check.rate, check.expansion),
            check.steps,
            replace(variant.made, structure_aware=True),
            torch.from_numpy(digits().test_x),
        )
        records += [asdict(record) for record in measured]
        forecasts = [asdict(forecast) for forecast in said]
    return {"records": records, "forecasts": forecasts, "seconds": time.perf_counter() - start}


# ------------------------------------------------------------------------------------------------------------ reporting


def reports_of(results: Results) -> dict[Variant, CoordReport]:
    """The report of every variant of which all widths are there."""
    from structops.torch.coord_report import CoordReport, Forecast, Record

    def read(kind: Any, rows: list[dict[str, Any]]) -> list[Any]:
        return [kind(**{name: math.nan if value is None else value for name, value in row.items()}) for row in rows]

    widths = {check.width for check in results}
    parts: dict[Variant, dict[int, Any]] = {}
    for check, result in results.items():
        parts.setdefault(check.variant, {})[check.width] = (check, result)
    reports = {}
    for variant, found in parts.items():
        if found.keys() != widths or len(widths) < 2:
            continue
        ordered = [found[width] for width in sorted(widths)]
        records = tuple(record for _, result in ordered for record in read(Record, result["records"]))
        forecasts = tuple(forecast for _, result in ordered for forecast in read(Forecast, result["forecasts"]))
        reports[variant] = CoordReport(records, forecasts, ordered[0][0].steps)
    return dict(sorted(reports.items(), key=lambda pair: list(RATES).index(pair[0].optimizer)))


def worst(report: CoordReport) -> CoordRow:
    """The hidden layer whose features drift most."""
    return max(report.hidden, key=lambda row: abs(row.feature.value) if math.isfinite(row.feature.value) else math.inf)


def slopes_table(reports: dict[Variant, CoordReport]) -> Table:
    """One row a variant: the hidden layer that drifts most, and where to look."""
    rows = []
    for variant, report in reports.items():
        row = worst(report)
        verdict = "ok" if report.ok else f"{row.verdict}: {report.culprit}"
        numbers = (str(row.feature), row.layer, str(row.own), f"{row.predicted:+.2f}", verdict)
        rows.append((variant.optimizer, variant.structure, variant.rule, *numbers))
    columns = ("optimizer", "structure", "rule", "feature change", "of layer", "own change", "predicted", "verdict")
    return Table("Powers of width with which changes grow", columns, tuple(rows))


def layers_table(reports: dict[Variant, CoordReport]) -> Table:
    """One row a variant, one column a hidden layer: the powers of its feature change; and the steepest own change."""
    rows = []
    for variant, report in reports.items():
        own = max(report.hidden, key=lambda row: abs(row.own.value) if math.isfinite(row.own.value) else math.inf)
        changes = (str(row.feature) for row in report.hidden)
        steepest = worst(report)
        verdict = "ok" if report.ok else steepest.verdict
        names = (variant.optimizer, variant.structure, variant.rule)
        rows.append((*names, *changes, str(own.own), f"{steepest.predicted:+.2f}", verdict))
    layers = tuple(row.layer.removeprefix("blocks.") for row in next(iter(reports.values())).hidden)
    columns = ("optimizer", "structure", "rule", *layers, "own, worst", "predicted", "verdict")
    return Table("Powers of width, layer by layer", columns, tuple(rows))


def findings(reports: dict[Variant, CoordReport]) -> list[Finding]:
    """What figure 2a of the paper shows, of the network trained by Adam."""
    found = []
    for variant, report in reports.items():
        if variant.optimizer != "adam" or variant.rule not in ("paper", "naive"):
            continue
        row = worst(report)
        here = f"steepest power {row.feature} ({row.layer})"
        if variant.rule == "paper":
            claim = f"{variant.structure}: with the paper's rule features change alike at all widths"
            found.append(Finding(claim, "§4.2, Fig. 2a", here, report.ok))
        elif variant.structure in ("btt", "kron"):
            claim = f"{variant.structure}: with the naive rule they fall like width^-0.34"
            found.append(Finding(claim, "§4.2, Fig. 2a", here, not report.ok and row.feature.value < 0))
    return found


def figure(reports: dict[Variant, CoordReport]) -> Any:
    """Change of features of the last hidden layer over width: a panel an optimiser, a colour a structure."""
    chosen = list(dict.fromkeys(variant.optimizer for variant in reports))
    structures = list(dict.fromkeys(variant.structure for variant in reports))
    lines = dict(zip(RULES, ("-", "-.", ":", "--"), strict=True))
    layer = ""
    with figures.canvas(len(chosen)) as (result, panels):
        for optimizer, panel in zip(chosen, panels, strict=True):
            ticks: set[int] = set()
            for variant, report in reports.items():
                if variant.optimizer != optimizer:
                    continue
                layer = report.hidden[-1].layer
                widths, means = report.means(layer, "", "feature")
                look = figures.look(structures, variant.structure) | {"linestyle": lines[variant.rule]}
                panel.plot(widths, means, **look)
                ticks |= {int(width) for width in widths}
            panel.set(xscale="log", yscale="log", xlabel="width", title=optimizer)
            panel.set_xticks(sorted(ticks), labels=[str(tick) for tick in sorted(ticks)])
            panel.minorticks_off()
        panels[0].set_ylabel(f"change of features, {layer}")
        for structure in structures:
            panels[-1].plot([], [], label=structure, **(figures.look(structures, structure) | {"linestyle": "-"}))
        for rule, line in lines.items():
            if any(variant.rule == rule for variant in reports):
                panels[-1].plot([], [], color="0.4", linestyle=line, label=f"rule: {rule}")
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return result
