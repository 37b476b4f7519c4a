"""Tables, Markdown and a plot of what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from structops.bench.cases import CONTESTANTS, OURS
from structops.bench.clock import Timing
from structops.bench.results import Report, Result, crossovers

ABSENT = "–"
LEGEND = (
    "Numbers of a contestant say how many times longer it takes than the layer of structops: above 1, ours is faster. "
    "They are the median over rounds of the ratio within the round. Best other: the fastest of einsum, compiled einsum "
    "and copying.",
    "dense: `torch.nn.Linear` of the same size. einsum: an einsum a factor, on arrays with an axis a label; compiled "
    "einsum: the same under `torch.compile`. copying: batched products with a transposing copy between them, as in the "
    "research codes. merged: the dense matrix made in advance, forward only; it computes what dense computes, so the "
    "difference between the two is noise. jax, jax einsum: the layer of structops and the einsums under `jax.jit`.",
    "train: forward and backward, with the gradient of the input. All contestants get the same numbers, and agree.",
    "bound: the roofline max(operations / matmul ceiling, bytes / bandwidth ceiling) of products without copies, which "
    "read the input and write the output once, write and read what lies between factors, and read the parameters; in "
    "training three times of each. MAC share: the speed-up over dense relative to the ratio of MACs.",
    "saved: numbers a token that autograd keeps for the backward pass, without the parameters; chain: what the chain "
    "predicts. peak: memory that a step takes beyond what is there before.",
)

Cells = Callable[[Result], Sequence[str]]


@dataclass(frozen=True)
class Sheet:
    """A table; its first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def overview(report: Report) -> list[Sheet]:
    """What fits into a terminal: a table a pass and number format, medians over all cases, and crossovers."""
    found = [_glance(results, which) for which, results in _passes(report.results)]
    return [*found, _summary(report.results), *_crossovers(report.results)]


def details(report: Report) -> list[Sheet]:
    """Three tables a pass and number format: ratios and times of all contestants, and what the machine allows."""
    tables = (_ratios, _times, _limits)
    return [table(results, which) for which, results in _passes(report.results) for table in tables]


def _passes(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The results of every pass and number format."""
    return [(f"{run}, {dtype}", rs) for (dtype, run), rs in _by(results, lambda r: (r.case.dtype, r.case.run))]


def _by(results: Sequence[Result], key: Callable[[Result], Any]) -> Iterator[tuple[Any, list[Result]]]:
    """Results with the same key, in order of keys."""
    for value, members in groupby(sorted(results, key=key), key):
        yield value, list(members)


def _sheet(title: str, columns: Sequence[str], results: Sequence[Result], cells: Cells) -> Sheet:
    """A table with a row a case."""
    rows = tuple((r.case.structure, r.case.shape, str(r.case.tokens), *cells(r)) for r in results)
    return Sheet(title, ("structure", "shape", "tokens", *columns), rows)


def _glance(results: Sequence[Result], which: str) -> Sheet:
    def cells(r: Result) -> list[str]:
        other = f"{_number(r.speedup(r.rival))} {r.rival.split()[0]}" if r.rival else ABSENT
        return [_number(1e3 * r.ours.median), _number(r.speedup("dense")), other, _percent(r.of_bound), _mac_share(r)]

    columns = ("ms", "dense", "best other", "of bound", "MAC share")
    return _sheet(f"{which}: time of structops, and of others relative to it", columns, results, cells)


def _present(results: Sequence[Result]) -> list[str]:
    """The contestants of a table."""
    return [name for name in CONTESTANTS if any(name in r.timings for r in results)]


def _ratios(results: Sequence[Result], which: str) -> Sheet:
    others = [name for name in _present(results) if name != OURS]
    title = f"{which}: times relative to structops"
    return _sheet(title, others, results, lambda r: [_number(r.speedup(name)) for name in others])


def _times(results: Sequence[Result], which: str) -> Sheet:
    names = _present(results)
    title = f"{which}: milliseconds, median / best"
    return _sheet(title, names, results, lambda r: [_milliseconds(r.timings.get(name)) for name in names])


def _milliseconds(timing: Timing | None) -> str:
    return ABSENT if timing is None else f"{_number(1e3 * timing.median)} / {_number(1e3 * timing.best)}"


def _limits(results: Sequence[Result], which: str) -> Sheet:
    columns: dict[str, Callable[[Result], str]] = {
        "MACs, dense / ours": lambda r: _number(r.case.mac_ratio),
        "times faster than dense": lambda r: _number(r.speedup("dense")),
        "MAC share": _mac_share,
        "bound, ms": lambda r: _number(1e3 * r.bound),
        "of bound": lambda r: _percent(r.of_bound),
        "of matmul": lambda r: _percent(r.of_matmul),
        "of bandwidth": lambda r: _percent(r.of_bandwidth),
    }
    if any(r.saved(OURS) is not None for r in results):
        columns["saved"] = lambda r: _whole(r.saved(OURS))
        columns["chain"] = lambda r: _whole(r.predicted_saved)
    if any("peak" in r.memory[OURS] for r in results):
        columns["peak, MB"] = lambda r: _number(r.memory[OURS]["peak"] / 1e6)
        columns["dense peak, MB"] = lambda r: _number(r.memory.get("dense", {}).get("peak", math.nan) / 1e6)
    title = f"{which}: what the machine allows"
    return _sheet(title, list(columns), results, lambda r: [cell(r) for cell in columns.values()])


def _summary(results: Sequence[Result]) -> Sheet:
    """Over all cases of a pass: the time of every contestant relative to ours, in the middle and at both ends."""
    passes = _passes(results)
    rows: dict[str, Callable[[Result], float | None]] = {
        "best other": lambda r: r.speedup(r.rival),
        "best other, fastest round": lambda r: r.best_rival_speedup,
    }
    rows |= {name: partial(Result.speedup, name=name) for name in _present(results) if name != OURS}
    cells = {name: [_spread([ratio(r) for r in members]) for _, members in passes] for name, ratio in rows.items()}
    columns = ("time relative to structops", *(which for which, _ in passes))
    shown = tuple((name, *spreads) for name, spreads in cells.items() if set(spreads) != {ABSENT})
    return Sheet("Over all cases: median (least to most)", columns, shown)


def _spread(ratios: Sequence[float | None]) -> str:
    present = [ratio for ratio in ratios if ratio is not None]
    if not present:
        return ABSENT
    return f"{_number(statistics.median(present))} ({_number(min(present))} to {_number(max(present))})"


def _crossovers(results: Sequence[Result]) -> list[Sheet]:
    rows = []
    for over, against, size, group in crossovers(results):
        at = group["shape"] if over == "tokens" else f"{group['tokens']} tokens"
        rows.append((group["structure"], f"{group['run']}, {group['dtype']}", against, at, f"{over} {size}"))
    columns = ("structure", "pass", "faster than", "at", "from")
    return [Sheet("From which size on structops is faster", columns, tuple(rows))] if rows else []


def facts(report: Report) -> list[str]:
    """What a reader of the tables has to know: the machine, the ceilings, who is missing and why."""
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    device = "" if machine["device"] == "cpu" else f" and {machine['device']}"
    lines = [
        f"{machine['cpu']} ({machine['instructions']}, {machine['threads']} threads of torch){device}; {versions}.",
        f"{len(report.results)} of {report.total} cases, {settings.repeats} rounds each.",
    ]
    lines += [
        f"Ceilings in {dtype}: {limits.flops / 1e9:,.0f} GFLOP/s of a large matrix product, "
        f"{limits.bandwidth / 1e9:,.1f} GB/s of a large copy."
        for dtype, limits in report.ceilings.items()
    ]
    lines += report.notes
    lines += [f"Skipped: {skip.shape}, {skip.reason}." for skip in report.skipped]
    lines += _grouped((f"Without {name}: {why}", r) for r in report.results for name, why in r.absent.items())
    return lines + list(dict.fromkeys(f"{r.case.warning}." for r in report.results if r.case.warning))


def _grouped(found: Iterable[tuple[str, Result]]) -> list[str]:
    """A line for everything that is said of several cases, with the first of them and the number of others."""
    cases: dict[str, list[str]] = {}
    for text, result in found:
        cases.setdefault(text, []).append(result.case.label)
    more = {text: f" and {len(labels) - 1} more" if len(labels) > 1 else "" for text, labels in cases.items()}
    return [f"{text} ({labels[0]}{more[text]})." for text, labels in cases.items()]


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = ["# How fast, measured by `structops bench`", "\n".join(f"- {line}" for line in facts(report))]
    for sheet in (*overview(report), *details(report)):
        lines = [_row(sheet.columns), "|" + "---|" + "---:|" * (len(sheet.columns) - 1), *map(_row, sheet.rows)]
        parts += [f"## {sheet.title}", "\n".join(lines)]
    parts += ["## How to read this", "\n".join(f"- {line}" for line in LEGEND)]
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or math.isnan(value):
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mac_share(result: Result) -> str:
    return _percent(result.mac_share)


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0%}"


def _whole(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


# ----------------------------------------------------------------------------------------------------------- the plot


def figure(report: Report) -> Any:
    """Speed-up over dense against width, a line a structure: a row a pass and number format, a column a token count."""
    from matplotlib.figure import Figure

    results = [r for r in report.results if "dense" in r.timings]
    passes, tokens = _passes(results), sorted({r.case.tokens for r in results})
    widths = sorted({round(r.case.width) for r in results})
    colours = {spec: f"C{k}" for k, spec in enumerate(dict.fromkeys(r.case.structure for r in results))}
    size = (5 * len(tokens) + 2.5, 4 * len(passes))
    made = Figure(figsize=size if results else (6, 2), layout="constrained")
    axes = made.subplots(max(len(passes), 1), max(len(tokens), 1), squeeze=False, sharey=True)
    for row, (which, members) in zip(axes, passes, strict=False):
        for axis, number in zip(row, tokens, strict=True):
            _draw(axis, [r for r in members if r.case.tokens == number], colours)
            axis.set_title(f"{which}, {number:,} tokens")
            axis.set_xticks(widths, [f"{width:,}" for width in widths])
            axis.minorticks_off()
        row[0].set_ylabel("times faster than dense")
    made.legend(handles=_handles(results, colours), loc="outside right upper", frameon=False)
    return made


def _draw(axis: Any, results: Sequence[Result], colours: dict[str, str]) -> None:
    """The lines of one panel: measured, and dashed what the MACs would allow; other shapes than square as dots."""
    axis.set(xscale="log", yscale="log", xlabel="width (root of in x out)")
    axis.axhline(1, color="grey", linewidth=1)
    for spec, members in _by(results, lambda r: r.case.structure):
        square = sorted((r for r in members if r.case.is_square), key=lambda r: r.case.width)
        other = [r for r in members if not r.case.is_square]
        style = {"color": colours[spec]}
        axis.plot([r.case.width for r in square], [r.speedup("dense") for r in square], marker="o", **style)
        axis.plot([r.case.width for r in square], [r.case.mac_ratio for r in square], linestyle="--", lw=1, **style)
        axis.plot([r.case.width for r in other], [r.speedup("dense") for r in other], "o", fillstyle="none", **style)
    ends = axis.get_ylim()
    powers = range(math.floor(math.log2(ends[0])), math.ceil(math.log2(ends[1])) + 1)
    axis.set_yticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    axis.grid(alpha=0.3)


def _handles(results: Sequence[Result], colours: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, marker="o", label=spec) for spec, colour in colours.items()]
    lines.append(Line2D([], [], color="black", linestyle="--", lw=1, label="ratio of MACs"))
    if not all(r.case.is_square for r in results):
        lines.append(Line2D([], [], color="black", marker="o", ls="", fillstyle="none", label="not square"))
    return lines
