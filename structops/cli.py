"""The command ``structops``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

app = typer.Typer(
    name="structops",
    help="Structured matrices as linear operators, and layers that train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class Studies(TyperGroup):
    """The group of ``structops study``, which is imported when it is looked at."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All of them."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them."""
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        if not self.commands:
            from structops.studies.commands import commands

            for command in typer.main.get_group(commands(console, _study, _require)).commands.values():
                self.add_command(command)


study = typer.Typer(
    help="The experiments of the paper, on data that ship with packages or your own.",
    no_args_is_help=True,
    cls=Studies,
)
app.add_typer(study, name="study")
console = Console()


class Backend(StrEnum):
    """The two libraries."""

    torch = "torch"
    jax = "jax"


@app.command()
def demo(
    backend: Annotated[Backend, typer.Option(help="Library that computes.")] = Backend.torch,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    width: Annotated[int, typer.Option(min=16, help="Width of the middle dense network.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 30,
    structures: Annotated[str, typer.Option(help="Structures to train, separated by semicolons; all by default.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the plots and the numbers.")] = Path("structops-demo"),
) -> None:
    """Compare structures: products at one size, then residual MLPs on handwritten digits at equal MACs."""
    _require(backend.value, "demo")
    from structops.studies.demo import STRUCTURES
    from structops.studies.demo import demo as run

    chosen = [spec.strip() for spec in structures.split(";")] if structures else list(STRUCTURES)
    if unknown := [spec for spec in chosen if spec not in STRUCTURES]:
        raise typer.BadParameter(f"{', '.join(unknown)} not among {'; '.join(STRUCTURES)}", param_hint="--structures")
    try:
        run(
            structures=chosen,
            backend=backend.value,
            seed=seed,
            seeds=seeds,
            width=width,
            epochs=epochs,
            out=out,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; what was finished is on disk")
        raise typer.Exit(130) from None


@app.command()
def algebra(
    costs: Annotated[bool, typer.Option("--costs", help="Time the verbs and fit how they grow with the size.")] = False,
    backend: Annotated[Backend, typer.Option(help="Library that computes; with --costs.")] = Backend.torch,
    largest: Annotated[
        int | None,
        typer.Option(min=576, help="Largest number of rows, with --costs; 2^22 in torch, 576 in JAX, which compiles."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the numbers, JSON; with --costs.")] = None,
) -> None:
    """Print which structure A @ B, A + B, kron(A, B) and the like have; or, with --costs, what they cost."""
    if not costs:
        from structops.studies.closure import closure_tables

        for table in closure_tables():
            console.print(table)
        return
    _require(backend.value)
    from structops.studies.algebra import costs as run

    try:
        rows = largest or (2**22 if backend is Backend.torch else 576)
        run(backend=backend.value, largest=rows, out=out, console=console)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; the table has what was finished")
        raise typer.Exit(130) from None


@app.command()
def bench(
    shapes: Annotated[
        str, typer.Option(help="Sizes, 1024 or input x output 4096x14336, separated by semicolons.")
    ] = "",
    structures: Annotated[str, typer.Option(help="Specs, separated by semicolons; six by default.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of vectors that are multiplied at once.")] = "",
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, float16 and float64.")] = "",
    device: Annotated[str, typer.Option(help="Device of torch, such as cpu or cuda.")] = "cpu",
    passes: Annotated[str, typer.Option(help="Of forward and train, which is forward and backward.")] = "",
    contestants: Annotated[str, typer.Option(help="What to compare with; all by default.")] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help="Timings of every contestant.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    seed: Annotated[int, typer.Option(help="Of all numbers.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Small defaults, for a first impression.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for tables, plot and numbers.")] = Path("structops-bench"),
) -> None:
    """How fast is a structured layer beside a dense one, and beside other ways to compute the same?"""
    _require("torch", "demo")
    from dataclasses import replace

    from structops.bench import cases
    from structops.bench.contestant import DisagreementError
    from structops.bench.run import report as run
    from structops.errors import BackendError

    base = cases.Settings().quick() if quick else cases.Settings()
    chosen = {
        "shapes": _shapes(shapes),
        "structures": tuple(_names(structures)),
        "tokens": tuple(sorted(set(_numbers(tokens, "--tokens")))) if tokens else (),
        "dtypes": _some_of(dtype, cases.BYTES, "--dtype"),
        "passes": _some_of(passes, cases.PASSES, "--passes"),
        "contestants": _some_of(contestants, cases.CONTESTANTS, "--contestants"),
        "repeats": repeats,
    }
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value}
    settings = replace(base, **given, device=device, threads=threads, seed=seed)
    try:
        _study(lambda: run(settings, out, console))
    except DisagreementError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(1) from None
    except BackendError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


@app.command()
def doctor() -> None:
    """Check the installation; exit with 1 and the repair command where something is wrong."""
    from structops.doctor import diagnose

    if not diagnose(console):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    """The parts between semicolons."""
    return [part.strip() for part in text.split(";") if part.strip()]


def _numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Different whole positive numbers between semicolons or commas.

    Raises:
        BadParameter: One is none, or there are too few.
    """
    try:
        values = [int(part) for part in _names(text.replace(",", ";"))]
    except ValueError:
        values = []
    if len(set(values)) < least or min(values) < 1:
        raise typer.BadParameter(f"expected {least} or more positive whole numbers, got {text!r}", param_hint=option)
    return values


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of input and output sizes from ``1024;4096x14336``.

    Raises:
        BadParameter: A part is neither a size nor two.
    """
    found = []
    for part in _names(text.replace(",", ";")):
        sizes = part.lower().split("x")
        if len(sizes) > 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
            message = f"expected sizes such as 1024 or 4096x14336 (input x output), got {part!r}"
            raise typer.BadParameter(message, param_hint="--shapes")
        found.append((int(sizes[0]), int(sizes[-1])))
    return tuple(dict.fromkeys(found))


def _some_of(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """The names between semicolons or commas.

    Raises:
        BadParameter: One is unknown.
    """
    names = _names(text.replace(",", ";"))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)} not among {'; '.join(known)}", param_hint=option)
    return tuple(dict.fromkeys(names))


def _study(run: Callable[[], Any]) -> None:
    """Run a study; a wrong name or wrong data end with 2, an interrupt with 130, what is not installed with 1."""
    from structops.errors import CheckpointError, DataError, ShapeError, StructureError
    from structops.studies.lab.pool import WorkerError

    try:
        run()
    except (DataError, ShapeError, StructureError) as error:
        raise typer.BadParameter(str(error)) from None
    except (CheckpointError, ImportError, WorkerError) as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; what was finished is on disk")
        raise typer.Exit(130) from None


def _require(*extras: str) -> None:
    """End with the command that installs what a command needs, if it is not there."""
    from structops.doctor import EXTRAS

    absent = [extra for extra in extras if any(find_spec(module) is None for module in EXTRAS[extra])]
    if absent:
        console.print(
            f"This command needs more than is installed:\n    pip install 'structops[{','.join(absent)}]'", markup=False
        )
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()
