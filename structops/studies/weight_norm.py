"""What the cap on factors does: errors over learning rates with it and without (paper, sections 2 and 4.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from structops.studies.lab.config import option
from structops.studies.lab.study import Finding, Report, Results
from structops.studies.rates import below, by_rate, report_of, shown
from structops.studies.runs import Run
from structops.studies.trained import DATA, Trained

WITHOUT, WITH = "as they are", "capped"


@dataclass(frozen=True)
class WeightNorm(Trained):
    """Train networks with the factors capped and not, at rates up to those at which training breaks."""

    name: ClassVar[str] = "weight-norm"
    title: ClassVar[str] = "Weight normalisation"
    FIXED: ClassVar[tuple[str, ...]] = ("lr", "weight_norm")

    model: Annotated[str, option(help="mlp, vit or gpt.")] = "gpt"
    data: Annotated[str, option(help=DATA)] = "pydoc"
    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = (
        *("dense", "btt", "btt(rank=4)"),
    )
    lrs: Annotated[tuple[float, ...], option(help="Learning rates.")] = (3e-3, 1e-2, 3e-2, 1e-1)
    widths: Annotated[tuple[int, ...], option(help="Of all networks.")] = (144,)
    depth: Annotated[int, option(min=0, help="Blocks of the network.")] = 2
    where: Annotated[str, option(help="Structured layers: all, all_but_head, hidden, attention or ffn.")] = "hidden"
    steps: Annotated[int, option(min=0, help="Steps, in place of epochs.")] = 200
    batch: Annotated[int, option(min=1, help="Examples per step.")] = 16
    error: Annotated[str, option(help="What is reported: train_error, test_error, train_loss or test_loss.")] = (
        "test_loss"
    )

    def runs(self) -> Sequence[Run]:
        """A dense network, and structured ones with and without the cap, at every rate."""
        models = [
            self.network(structure, width, weight_norm=norm)
            for structure in self.structures
            for width in self.widths
            for norm in ((False,) if structure == "dense" else (False, True))
        ]
        return [
            run for model in models for lr in self.lrs for run in self.of_all_seeds(model, replace(self.recipe, lr=lr))
        ]

    def report(self, results: Results) -> Report:
        """Errors over rates, a panel a structure."""
        return report_of(results, self.error, key_of, ("structure", "factors"), self.findings(results))

    def findings(self, results: Results) -> list[Finding]:
        """What the paper says of its transformers."""
        found = by_rate(results, self.error, key_of)
        claims = []
        for structure in self.structures:
            plain, capped = ((structure, how) for how in (WITHOUT, WITH))
            if plain not in found or capped not in found:
                continue
            shared = sorted(found[plain].keys() & found[capped].keys())
            above = [lr for lr in shared if lr > min(found[plain], key=lambda rate: found[plain][rate])]
            if above:
                pair = tuple(sum(found[key][lr] for lr in above) / len(above) for key in (capped, plain))
                claim = f"{structure}: above its best rate the network with the cap ends lower (mean over rates)"
                claims.append(Finding(claim, "§2: training is stable with it", shown(pair), below(*pair)))
            best = tuple(min(found[key].values()) for key in (capped, plain))
            claim = f"{structure}: the cap costs nothing at the best rate"
            appears = below(*best) is not False if math.isfinite(min(best)) else None
            claims.append(Finding(claim, "§4.4: used in all transformers", shown(best), appears))
        return claims


def key_of(run: Run) -> tuple[str, str]:
    """The panel and the curve of a training."""
    return run.model.structure, WITH if run.model.weight_norm else WITHOUT
