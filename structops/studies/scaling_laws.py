"""Scaling laws: the error of growing networks against what they cost (paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from structops.studies.curves import cheaper, compared, cost_figure, curves, laws_table, named, points_table
from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.runs import Run
from structops.studies.trained import Trained


@dataclass(frozen=True)
class ScalingLaws(Trained):
    """Train networks of growing width, fit error against MACs by a power law, and compare costs at equal error."""

    name: ClassVar[str] = "scaling-laws"
    title: ClassVar[str] = "Scaling laws"

    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = (
        *("dense", "low_rank(params=0.25)", "kron", "tt(rank=4)", "monarch(blocks=4)", "btt"),
    )
    widths: Annotated[
        tuple[int, ...], option(help="Of the dense networks; other structures get widths of equal MACs.")
    ] = (16, 32, 64, 128, 192)

    def runs(self) -> Sequence[Run]:
        """Of every structure, the networks that match the MACs of the dense ones."""
        budgets = [self.network("dense", width).macs for width in self.widths]
        return [run for structure in self.structures for run in self.at_budgets(structure, budgets)]

    def at_budgets(self, structure: str, budgets: Sequence[int]) -> Iterator[Run]:
        """The trainings of one structure; dense networks have the widths that were asked for."""
        for width, budget in zip(self.widths, budgets, strict=True):
            dense = structure == "dense"
            yield from self.of_all_seeds(self.network(structure, width) if dense else self.at_budget(structure, budget))

    def report(self, results: Results) -> Report:
        """Power laws, costs at equal error, and error against MACs, parameters and seconds."""
        tables = {"laws": laws_table(results, self.error), "networks": points_table(results)}
        drawn = {"error": cost_figure(results, ("macs", "num_params", "seconds"), self.error)}
        return Report(tables, drawn, self.findings(results))

    def findings(self, results: Results) -> list[Finding]:
        """What section 4.3 of the paper found of MLPs on CIFAR-10."""
        found = curves(results, "macs", self.error)
        btt, kron, tt, monarch = (named(found, name) for name in ("btt", "kron", "tt", "monarch"))
        claims = [
            compared("BTT has a larger exponent than dense", "§4.3, MLP: .119 vs .104", found, btt, "dense"),
            compared("dense has a larger exponent than Kronecker", "§4.3, MLP: .104 vs .037", found, "dense", kron),
            compared("dense has a larger exponent than TT", "§4.3, MLP: .104 vs .050", found, "dense", tt),
            compared("dense has a larger exponent than Monarch", "§4.3, MLP: .104 vs .095", found, "dense", monarch),
        ]
        for cost, source in (("macs", "§4.3, CIFAR: 1/5 to 1/15"), ("seconds", "§5, CIFAR-100, a GPU: 1/6")):
            what = {"macs": "MACs", "seconds": "seconds"}[cost]
            claim = f"BTT needs fewer {what} than dense at equal error"
            claims.append(cheaper(claim, source, results, self.error, btt, "dense", cost))
        return [claim for claim in claims if claim is not None]
