"""The demonstration: structures side by side, and what the paper claims of them, on real digits in minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from structops.report import machine, table, write_figure, write_json
from structops.studies.data import digits
from structops.studies.lab.pool import run_all
from structops.studies.mlp import MLP, width_for
from structops.studies.products import ProductRow, product_rows
from structops.studies.training import Recipe, Result

TOKENS = 256
SIZES = (0.5, 1.0, 1.25)  # widths of the dense network relative to the one asked for; the others match its MACs
STRUCTURES = ("dense", "low_rank", "kron", "monarch(blocks=4)", "tt(rank=4)", "btt")
NAIVE = ("kron", "btt")  # again, with the learning rate of the dense layer


@dataclass(frozen=True)
class Job:
    """A network to train from several seeds; ``budget`` is the MACs of the dense network that it is compared with."""

    budget: int
    sizes: MLP
    recipe: Recipe
    seeds: tuple[int, ...]
    backend: str

    @property
    def label(self) -> str:
        """The structure, and whether its learning rate is naive."""
        return self.sizes.structure + ("" if self.recipe.structure_aware else ", naive LR")


@dataclass(frozen=True)
class Run:
    """A job that has ended: a result a seed, and the mean time of a training."""

    job: Job
    results: list[Result]
    seconds: float

    @property
    def summary(self) -> Summary:
        """Means over seeds."""
        losses = [result.train_loss for result in self.results]
        return Summary(
            budget=self.job.budget,
            label=self.job.label,
            width=self.job.sizes.width,
            num_params=self.job.sizes.num_params,
            macs=self.job.sizes.macs,
            train_loss=statistics.mean(losses),
            train_loss_std=statistics.stdev(losses) if len(losses) > 1 else 0.0,
            accuracy=statistics.mean(result.accuracy for result in self.results),
            seconds=self.seconds,
            seeds=len(losses),
        )


@dataclass(frozen=True)
class Summary:
    """The trainings of one network over seeds.

    Attributes:
        budget: MACs of the dense network that it is compared with.
        label: Structure, and whether the learning rate is naive.
        width: Of the residual stream.
        num_params: Parameters of all layers.
        macs: Multiply-accumulates per image.
        train_loss: Mean over seeds of the mean over the last three epochs.
        train_loss_std: Standard deviation over seeds.
        accuracy: Mean test accuracy.
        seconds: Mean time of a training.
        seeds: Number of seeds.
    """

    budget: int
    label: str
    width: int
    num_params: int
    macs: int
    train_loss: float
    train_loss_std: float
    accuracy: float
    seconds: float
    seeds: int


def jobs(
    backend: str, width: int, epochs: int, seeds: Sequence[int], structures: Sequence[str] = STRUCTURES
) -> list[Job]:
    """All trainings: every structure at the MACs of dense networks of three widths."""
    recipe = Recipe(epochs=epochs)
    naive = replace(recipe, structure_aware=False)
    listed = []
    for scale in SIZES:
        budget = MLP("dense", max(8, 4 * round(scale * width / 4))).macs
        variants = [(spec, recipe) for spec in structures]
        variants += [(spec, naive) for spec in NAIVE if spec in structures]
        for spec, how in variants:
            listed.append(Job(budget, MLP(spec, width_for(spec, budget)), how, tuple(seeds), backend))
    return listed


def run_job(job: Job) -> Run:
    """Train a network from all its seeds in this process."""
    if job.backend == "torch":
        from structops.studies.torch_mlp import train
    else:
        from structops.studies.jax_mlp import train
    start = time.perf_counter()
    results = train(job.sizes, job.recipe, digits(), job.seeds)
    return Run(job, results, (time.perf_counter() - start) / len(job.seeds))


def demo(
    *,
    backend: str,
    seed: int,
    width: int,
    epochs: int,
    seeds: int,
    out: Path,
    console: Console,
    structures: Sequence[str] = STRUCTURES,
) -> list[Summary]:
    """Run the demonstration; write ``demo.json``, ``curves.png`` and ``error-vs-macs.png`` into ``out``.

    An interrupt leaves the files with what was finished, and is raised again.
    """
    todo = jobs(backend, width, epochs, range(seed, seed + seeds), structures)
    products: list[ProductRow] = []
    runs: list[Run] = []
    summaries: list[Summary] = []

    def save() -> None:
        write_json(out / "demo.json", _data(products, runs, todo))

    try:
        for row in _measure(backend, 8 * width, seed, console):
            products.append(row)
            save()
        console.print(_product_table(products, backend, 8 * width))
        for run in _run_all(todo, console):
            runs.append(run)
            save()
    finally:
        if runs:
            summaries = summarise(runs)
            write_figure(out / "curves.png", curves(runs))
            write_figure(out / "error-vs-macs.png", error_versus_macs(summaries))
            console.print(_summary_table(summaries, epochs))
        console.print(
            f"{len(runs)} of {len(todo)} networks; in {out}: {', '.join(sorted(p.name for p in out.glob('*.*')))}"
        )
    return summaries


# -------------------------------------------------------------------------------------------------------------- running


def _run_all(todo: Sequence[Job], console: Console) -> Iterator[Run]:
    """The jobs as they end, a process a core, each with one thread: faster than one job on all cores."""
    longest_first = sorted(todo, key=lambda job: -job.budget)  # so that no core idles at the end
    ended = run_all(
        run_job, longest_first, console=console, describe=lambda job: f"{job.label}, width {job.sizes.width}"
    )
    for _, run in ended:
        yield run


# ------------------------------------------------------------------------------------------------------------ reporting


def _measure(backend: str, size: int, seed: int, console: Console) -> Iterator[ProductRow]:
    with console.status(f"products of structures at {size}x{size}") as status:
        for row in product_rows(size, TOKENS, backend, seed):
            status.update(f"products of structures at {size}x{size}: {row.structure}")
            yield row


def _product_table(rows: Sequence[ProductRow], backend: str, size: int) -> Any:
    dense = next(row for row in rows if row.structure == "dense")
    columns = ("structure", "params", "MACs", "of dense", "error", "µs", "of dense")
    cells = [
        (
            row.structure,
            f"{row.num_params:,}",
            f"{row.macs:,}",
            f"{row.ratio:.3g}",
            f"{row.error:.1e}",
            f"{row.microseconds:,.0f}",
            f"{row.microseconds / dense.microseconds:.2f}",
        )
        for row in rows
    ]
    return table(f"Structures at {size}x{size}, {TOKENS} vectors ({backend}, float32)", columns, cells)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """The summaries by budget and then in the order of `STRUCTURES`."""
    return sorted((run.summary for run in runs), key=lambda row: (row.budget, _order(row.label)))


def _order(label: str) -> int:
    labels = [*STRUCTURES, *(f"{spec}, naive LR" for spec in NAIVE)]
    return labels.index(label)


def _summary_table(summaries: Sequence[Summary], epochs: int) -> Any:
    seeds = max(row.seeds for row in summaries)
    title = f"Residual MLPs on 8x8 digits at equal MACs: {epochs} epochs, {seeds} seed(s)"
    result = table(title, ("layers", "width", "params", "MACs", "train loss", "±", "test", "s"), [])
    for row, following in zip(summaries, [*summaries[1:], None], strict=True):
        result.add_row(
            row.label,
            str(row.width),
            f"{row.num_params / 1000:,.1f}k",
            f"{row.macs / 1000:,.1f}k",
            f"{row.train_loss:.4f}",
            f"{row.train_loss_std:.4f}",
            f"{row.accuracy:.1%}",
            f"{row.seconds:.1f}",
            end_section=following is None or following.budget != row.budget,
        )
    return result


def _data(products: Sequence[ProductRow], runs: Sequence[Run], todo: Sequence[Job]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "backend": todo[0].backend,
        "recipe": asdict(todo[0].recipe),
        "finished": f"{len(runs)} of {len(todo)}",
        "products": [asdict(row) for row in products],
        "summaries": [asdict(row) for row in summarise(runs)],
        "runs": [
            {
                "budget": run.job.budget,
                "label": run.job.label,
                "width": run.job.sizes.width,
                "seed": seed,
                **asdict(result),
            }
            for run in sorted(runs, key=lambda run: (run.job.budget, _order(run.job.label)))
            for seed, result in zip(run.job.seeds, run.results, strict=True)
        ],
    }


def _style(label: str) -> dict[str, Any]:
    spec = next(known for known in STRUCTURES if label.startswith(known))
    dashed = label.endswith("naive LR")
    return {"color": f"C{STRUCTURES.index(spec)}", "linestyle": "--" if dashed else "-", "label": label}


def curves(runs: Sequence[Run]) -> Any:
    """Training loss over epochs, a panel a MACs budget, averaged over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    budgets = sorted({run.job.budget for run in runs})
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        for label in sorted({run.job.label for run in runs if run.job.budget == budget}, key=_order):
            (run,) = (run for run in runs if (run.job.budget, run.job.label) == (budget, label))
            mean = [statistics.mean(losses) for losses in zip(*(r.losses for r in run.results), strict=True)]
            panel.plot(range(1, len(mean) + 1), mean, **_style(label))
        panel.set(yscale="log", xlabel="epoch", title=f"at the {budget / 1000:,.0f}k MACs of dense")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def error_versus_macs(summaries: Sequence[Summary]) -> Any:
    """Training loss and test error against MACs, a line a structure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label in dict.fromkeys(row.label for row in summaries):
        rows = [row for row in summaries if row.label == label]
        macs = [row.macs for row in rows]
        style = {**_style(label), "marker": "o"}
        left.errorbar(
            macs, [row.train_loss for row in rows], yerr=[row.train_loss_std for row in rows], capsize=3, **style
        )
        right.plot(macs, [100 * (1 - row.accuracy) for row in rows], **style)
    left.set(xscale="log", yscale="log", xlabel="MACs per image", ylabel="training loss", title="Training loss")
    right.set(xscale="log", xlabel="MACs per image", ylabel="test error (%)", title="Test error")
    for panel in (left, right):
        panel.grid(alpha=0.3, which="both")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
