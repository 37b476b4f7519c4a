"""Where structures pay: in attention, in the feed-forward networks, or in all layers (paper, section 4.2, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from structops.errors import StructureError
from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.models.sizes import WHERE
from structops.studies.rates import below, by_rate, lowest, report_of, shown
from structops.studies.runs import Run
from structops.studies.trained import Trained

RULES = {"paper": True, "naive": False}  # whether rates follow the factors' shapes


@dataclass(frozen=True)
class Placement(Trained):
    """Train transformers with structures in attention, in feed-forward networks and in both, at several rates.

    All have the MACs of the dense network.
    """

    name: ClassVar[str] = "placement"
    title: ClassVar[str] = "Structures in attention, in feed-forward networks, in both"
    FIXED: ClassVar[tuple[str, ...]] = ("lr", "where")

    model: Annotated[str, option(help="vit or gpt.")] = "vit"
    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = ("dense", "btt")
    places: Annotated[tuple[str, ...], option(help="Of attention, ffn, hidden and all_but_head.")] = (
        *("attention", "ffn", "hidden"),
    )
    rules: Annotated[tuple[str, ...], option(help="Of learning rates: paper, naive.")] = ("paper", "naive")
    lrs: Annotated[tuple[float, ...], option(help="Learning rates.")] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    widths: Annotated[tuple[int, ...], option(help="Of the dense network, whose MACs others match.")] = (48,)
    depth: Annotated[int, option(min=0, help="Blocks of the network.")] = 2
    epochs: Annotated[int, option(min=1, help="Passes over the training data.")] = 6

    def __post_init__(self) -> None:
        """Check names."""
        super().__post_init__()
        if len(self.widths) != 1:
            raise StructureError(f"placement compares networks of one budget: give one width, got {self.widths}")
        for names, known in ((self.places, WHERE), (self.rules, RULES)):
            if unknown := [name for name in names if name not in known]:
                raise StructureError(f"{', '.join(unknown)} not among {', '.join(known)}")

    def runs(self) -> Sequence[Run]:
        """A dense network, and one a structure, place and rule, at every rate."""
        budget = self.network("dense", self.widths[0])
        variants = []
        for structure in self.structures:
            if structure == "dense":
                variants.append((budget, True))
                continue
            for place in self.places:
                model = self.at_budget(structure, budget.macs, where=place)
                variants += [(model, RULES[rule]) for rule in self.rules]
        return [
            run
            for model, aware in variants
            for lr in self.lrs
            for run in self.of_all_seeds(model, replace(self.recipe, lr=lr, structure_aware=aware))
        ]

    def report(self, results: Results) -> Report:
        """Errors over rates, a panel a place."""
        return report_of(results, self.error, key_of, ("layers", "structure and rule"), self.findings(results))

    def findings(self, results: Results) -> list[Finding]:
        """What section 4.2 of the paper found of CIFAR-10."""
        found = by_rate(results, self.error, key_of)
        claims = []
        for structure in self.structures:
            for place in self.places:
                aware, naive = (lowest(found, (place, f"{structure}, {rule}")) for rule in RULES)
                if aware is not None and naive is not None:
                    source = "§4.2, Fig. 3: .173 and .237" if (structure, place) == ("btt", "ffn") else "§4.2"
                    claim = f"{structure} in {place}: the paper's rates end lower than naive ones, both tuned"
                    claims.append(Finding(claim, source, shown((aware, naive)), below(aware, naive)))
        return claims


def key_of(run: Run) -> tuple[str, str]:
    """The panel and the curve of a training."""
    if run.model.structure == "dense":
        return "dense", "dense"
    rule = next(name for name, aware in RULES.items() if aware is run.recipe.structure_aware)
    return run.model.where, f"{run.model.structure}, {rule}"
