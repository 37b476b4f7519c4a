"""The commands ``structops study ...`` of studies that are trainings: one line a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from structops.studies.compute_per_dimension import ComputePerDimension, Memory
from structops.studies.einsum_points import EinsumPoints
from structops.studies.lab.config import command
from structops.studies.lab.study import Execution, Study, conduct
from structops.studies.placement import Placement
from structops.studies.scaling_laws import ScalingLaws
from structops.studies.trained import describe
from structops.studies.weight_norm import WeightNorm

STUDIES: tuple[type[Study], ...] = (ScalingLaws, ComputePerDimension, Memory, Placement, WeightNorm, EinsumPoints)


def conduct_here(study: Study, execution: Execution, console: Console) -> Any:
    """Run a study of trainings in torch."""
    from structops.studies.trainer import Job, forget, train

    return conduct(study, execution, train, console=console, describe=describe, forget=forget, prepare=Job)


def add_to(app: typer.Typer, console: Console, guard: Callable[[Callable[[], Any]], None]) -> None:
    """Add the commands; ``guard`` runs one and turns its errors into those of the command line."""
    for study in STUDIES:

        def run(settings: Study, execution: Execution) -> None:
            guard(lambda: conduct_here(settings, execution, console))

        app.command(study.name)(command(study, run, Execution))
