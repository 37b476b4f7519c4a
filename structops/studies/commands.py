"""The commands ``structops study ...``: one line a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.console import Console

from structops.errors import StructureError
from structops.studies.compute_per_dimension import ComputePerDimension, Memory
from structops.studies.coordinate_check import CoordinateCheck
from structops.studies.einsum_points import EinsumPoints
from structops.studies.lab.config import command
from structops.studies.lab.study import Execution, Study, conduct
from structops.studies.lr_landscape import LrLandscape
from structops.studies.models import MODELS
from structops.studies.placement import Placement
from structops.studies.scaling_laws import ScalingLaws
from structops.studies.weight_norm import WeightNorm

STUDIES: tuple[type[Study], ...] = (
    CoordinateCheck,
    LrLandscape,
    ScalingLaws,
    ComputePerDimension,
    Memory,
    Placement,
    WeightNorm,
    EinsumPoints,
)


def counts(
    console: Console, model: str, structure: str, width: int, depth: int | None, where: str, sizes: tuple[str, ...]
) -> None:
    """Print the paper's models beside its figures, or the layers of one model.

    Raises:
        StructureError: The model, a structure or a size is unknown.
    """
    from structops.studies.counts import counts_table, layer_table

    if not model:
        console.print(counts_table().to_rich())
        return
    if model not in MODELS:
        raise StructureError(f"model {model!r} not among {', '.join(MODELS)}")
    given: dict[str, Any] = {} if depth is None else {"depth": depth}
    given |= {"where": where} if where else {}
    known = [field.name for field in fields(MODELS[model])]
    for size in sizes:
        name, _, value = (part.strip() for part in size.partition("="))
        if name not in known or not value.isdecimal():
            raise StructureError(f"expected name=number with a name of {', '.join(known)}, got {size!r}")
        given[name] = int(value)
    console.print(layer_table(MODELS[model](structure, width, **given)).to_rich())


def commands(console: Console, guard: Callable[[Callable[[], Any]], None], require: Callable[..., None]) -> typer.Typer:
    """All commands.

    Args:
        console: Where tables and the progress go.
        guard: Runs a function and turns its errors into those of the command line.
        require: Ends with the command that installs extras, if they are not there.
    """
    app = typer.Typer()
    for study in STUDIES:

        def run(settings: Study, execution: Execution) -> None:
            require("torch", "demo", "studies")
            guard(lambda: conduct(settings, execution, console))

        app.command(study.name)(command(study, run, Execution))

    @app.command("counts")
    def count(
        model: Annotated[str, typer.Option(help="mlp, vit or gpt; the models of the paper without it.")] = "",
        structure: Annotated[str, typer.Option(help="Of the structured layers.")] = "dense",
        width: Annotated[int, typer.Option(min=1, help="Of the residual stream.")] = 64,
        depth: Annotated[int | None, typer.Option(min=0, help="Blocks.")] = None,
        where: Annotated[str, typer.Option(help="Structured layers, as for scaling-laws.")] = "",
        sizes: Annotated[str, typer.Option(help="Further sizes: classes=100; heads=8.")] = "",
    ) -> None:
        """MACs, parameters and stored numbers of the paper's models beside its figures, or of a model of yours."""
        parts = tuple(part.strip() for part in sizes.split(";") if part.strip())
        guard(lambda: counts(console, model, structure, width, depth, where, parts))

    return app
