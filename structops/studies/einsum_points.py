"""Points of the two-factor family and mixtures of experts on the same plots (arXiv 2410.02117)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from structops.einsum_family import POINTS
from structops.errors import StructureError
from structops.power_law import Fit
from structops.studies.curves import cheaper, cost_figure, curves, laws_table, points_table
from structops.studies.lab.config import option
from structops.studies.lab.frontier import Curve
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.lab.tables import Table
from structops.studies.runs import Run
from structops.studies.scaling_laws import ScalingLaws

MIXTURE = "routed(structure=btt, experts=8, top_k=2)"
SAME = ("dense", "monarch")  # structures beside the points, and another name of the point btt
KNOWN = tuple(name for name in POINTS if name not in SAME)
CLOSE = 0.05  # relative differences of error below it are "nearly indistinguishable"


@dataclass(frozen=True)
class EinsumPoints(ScalingLaws):
    """Train points of the two-factor family, by sharing ω, rank ψ and compute ν, and mixtures over the rank axis."""

    name: ClassVar[str] = "einsum"
    title: ClassVar[str] = "Points of the Einsum family, and BTT-MoE"

    structures: Annotated[tuple[str, ...], option(help="Structures and mixtures beside the points.")] = (
        *("dense", MIXTURE),
    )
    points: Annotated[tuple[str, ...], option(help=f"Of {', '.join(KNOWN)}.")] = (
        *("low_rank", "low_rank_btt", "kron", "tt", "generic", "unbalanced_btt", "btt"),
    )
    widths: Annotated[tuple[int, ...], option(help="Of the dense networks; others get equal MACs.")] = (32, 64, 128)

    def __post_init__(self) -> None:
        """Check names."""
        super().__post_init__()
        if unknown := [name for name in self.points if name not in KNOWN]:
            raise StructureError(f"{', '.join(unknown)} not among {', '.join(KNOWN)}")

    def runs(self) -> Sequence[Run]:
        """The structures, and the points as specs."""
        budgets = [self.network("dense", width).macs for width in self.widths]
        specs = [*self.structures, *(spec_of(name) for name in self.points)]
        return [run for spec in specs for run in self.at_budgets(spec, budgets)]

    def report(self, results: Results) -> Report:
        """The taxonomy beside the power laws, and error against MACs."""
        laws = laws_table(results, self.error, label=label_of)
        found = curves(results, "macs", self.error, label_of)
        tables = {"laws": laws, "taxonomy": taxonomy_table(found), "networks": points_table(results, label_of)}
        drawn = {"error": cost_figure(results, ("macs", "num_params"), self.error, label_of, lines=False)}
        return Report(tables, drawn, self.findings(results))

    def findings(self, results: Results) -> list[Finding]:
        """What the follow-up found of compute-optimal language models, here at a fixed number of steps."""
        claims = []
        worse = {"kron": "ω = 1/2", "generic": "ω = 1/4", "low_rank": "ψ = 1/2", "low_rank_btt": "ψ = 1/2"}
        for name, why in worse.items():
            claim = f"sharing and low ranks spend MACs worse: {name} ({why}) after btt (ω = 0, ψ = 1)"
            pair = ("θ btt", f"θ {name}")
            claims.append(cheaper(claim, "2410.02117 §4", results, self.error, *pair, "macs", label_of))
        found = curves(results, "macs", self.error, label_of)
        for name in ("θ btt", "θ unbalanced_btt"):
            if name in found and "dense" in found:
                gap = largest_gap(found[name], found["dense"])
                claim = f"full rank without sharing is like dense at equal MACs: {name}"
                here = "no equal MACs" if gap is None else f"errors differ by at most {gap:.0%}"
                claims.append(Finding(claim, "2410.02117 §4", here, None if gap is None else gap < CLOSE))
        claim = "BTT-MoE spends MACs better than dense"
        claims.append(cheaper(claim, "2410.02117 §5", results, self.error, MIXTURE, "dense", "macs", label_of))
        claim = "BTT-MoE spends MACs better than BTT"
        claims.append(cheaper(claim, "2410.02117 §5", results, self.error, MIXTURE, "θ btt", "macs", label_of))
        return [finding for finding in claims if finding is not None]


def spec_of(point: str) -> str:
    """The spec of a named point."""
    return f"einsum(theta={tuple(POINTS[point])})"


def label_of(run: Run) -> str:
    """The name of the point after a θ, or the structure."""
    names = {spec_of(name): f"θ {name}" for name in KNOWN}
    return names.get(run.model.structure, run.model.structure)


def largest_gap(curve: Curve, other: Curve) -> float | None:
    """The largest relative difference of errors at equal cost; None where the curves do not overlap."""
    pairs = [(point.error, other.error_at(point.cost)) for point in curve.points]
    gaps = [abs(error / theirs - 1) for error, theirs in pairs if theirs is not None]
    return max(gaps, default=None)


def taxonomy_table(found: dict[str, Curve]) -> Table:
    """ω, ψ and ν of the points, their exponents α and lowest errors."""
    rows = []
    for name, curve in found.items():
        law: Fit | None = curve.law
        point = POINTS.get(name.removeprefix("θ "))
        exponents = (point.omega, point.psi, point.nu) if point else (None, None, None)
        rows.append((name, *exponents, -law.exponent if law else None, curve.best.error if curve.best else None))
    return Table("Taxonomy", ("structure", "ω", "ψ", "ν", "α", "lowest error"), tuple(rows))
