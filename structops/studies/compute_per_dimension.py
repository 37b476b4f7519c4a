"""How many MACs per feature should a structured layer have: its rank, blocks and cores (paper, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from structops.studies.curves import cheaper, cost_figure, grouped, laws_table, points_table
from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.lab.tables import Table
from structops.studies.models.layers import cost
from structops.studies.scaling_laws import ScalingLaws

SIDE = 1024  # width at which the compute per dimension of a structure is given


@dataclass(frozen=True)
class ComputePerDimension(ScalingLaws):
    """Train several ranks, blocks and cores at equal MACs: few MACs per feature in wide networks, or many in narrow?"""

    name: ClassVar[str] = "compute-per-dimension"
    title: ClassVar[str] = "Compute per dimension"

    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = (
        *("dense", "btt", "btt(rank=2)", "btt(rank=4)", "btt(rank=8)", "btt(num_cores=3)"),
        *("monarch(blocks=2)", "monarch(blocks=4)", "monarch(blocks=8)"),
    )
    widths: Annotated[tuple[int, ...], option(help="Of the dense networks; other structures get equal MACs.")] = (
        *(32, 64, 128),
    )

    def report(self, results: Results) -> Report:
        """Compute per dimension, and error against MACs and stored numbers."""
        tables = {"laws": laws_table(results, self.error), "dimension": xi_table(results)}
        tables["networks"] = points_table(results)
        drawn = {"error": cost_figure(results, ("macs", "activations"), self.error, lines=False)}
        return Report(tables, drawn, self.findings(results))

    def findings(self, results: Results) -> list[Finding]:
        """What section 5 of the paper found of CIFAR-10."""
        asked = (
            (
                "Few MACs per dimension spend MACs better: rank 1",
                "§5, Fig. 5",
                "btt",
                "btt(rank=8)",
                "macs",
            ),
            ("BTT is better per MAC than dense", "§5, Fig. 5", "btt", "dense", "macs"),
            ("Many MACs per dimension spend memory better", "§5, Fig. 6", "btt(rank=8)", "btt", "activations"),
            ("Dense is better per stored number than BTT", "§5, Fig. 6", "dense", "btt", "activations"),
            ("Two cores spend MACs better than three", "§5, Fig. 11", "btt", "btt(num_cores=3)", "macs"),
            (
                "Monarch: 8 blocks are better than 2",
                "§5, Fig. 5",
                "monarch(blocks=8)",
                "monarch(blocks=2)",
                "macs",
            ),
        )
        found = [
            cheaper(claim, source, results, self.error, one, other, cost) for claim, source, one, other, cost in asked
        ]
        return [finding for finding in found if finding is not None]


@dataclass(frozen=True)
class Memory(ComputePerDimension):
    """Train structures at equal MACs, and compare what training keeps in memory for equal error."""

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "Memory against error"

    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = (
        *("dense", "btt", "btt(rank=8)", "monarch(blocks=4)", "low_rank(params=0.25)"),
    )

    def report(self, results: Results) -> Report:
        """Bytes of a training, and error against stored numbers and parameters."""
        tables = {"memory": self.memory_table(results), "laws": laws_table(results, self.error)}
        drawn = {"error": cost_figure(results, ("activations", "num_params", "macs"), self.error, lines=False)}
        return Report(tables, drawn, self.findings(results))

    def memory_table(self, results: Results) -> Table:
        """What a training step keeps in float32: four numbers a parameter for Adam, and a batch of activations."""
        rows = []
        for name, networks in grouped(results).items():
            for model, found in networks.items():
                state, kept = 16 * model.all_params, 4 * self.batch * model.activations
                error = sum(math.inf if row[self.error] is None else row[self.error] for row in found) / len(found)
                rows.append((name, model.width, error, state, kept, state + kept))
        columns = ("structure", "width", "error", "parameters, gradients, Adam", "activations of a batch", "together")
        return Table("Bytes of training in float32", columns, tuple(rows))


def xi_table(results: Results) -> Table:
    """MACs of a square layer divided by its width, and its parameters relative to dense."""
    rows = []
    for name in grouped(results):
        one = cost(name, SIDE, SIDE)
        rows.append((name, one.macs / SIDE, one.num_params / SIDE**2, sum(one.widths) / SIDE))
    columns = ("structure", "ξ = MACs / width", "parameters / dense", "stored / width")
    return Table(f"Compute per dimension of a layer of {SIDE} features", columns, tuple(rows))
