"""The tables of docs/speed.md, from the numbers that ``structops bench --out`` wrote."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structops as so

ASSETS = Path(__file__).resolve().parent / "assets" / "speed"
Table = Callable[..., str]


def load(name: str = "bench") -> dict[str, Any]:
    """One run."""
    return json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))


def inserts(table: Table) -> dict[str, Callable[..., str]]:
    """What the page asks for by name, in tables that ``table`` writes."""
    return {
        "speed_machine": machine,
        "speed_command": command,
        "speed_summary": lambda: summary(table),
        "speed_table": lambda run: cases(table, load(), run),
        "speed_compilers": lambda: compilers(table),
        "speed_crossovers": lambda: crossovers(table),
    }


def machine() -> str:
    """Where the numbers come from."""
    data = load()
    where, limits = data["machine"], data["ceilings"]["float32"]
    return (
        f"{where['cpu']} ({where['instructions']}), {where['threads']} threads, PyTorch {where['versions']['torch']}, "
        f"float32. A large matrix product reaches {limits['flops'] / 1e9:.0f} GFLOP/s, a large copy "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s. Medians of {data['settings']['repeats']} rounds."
    )


def command() -> str:
    """The command that gave the numbers."""
    asked = load()["settings"]
    shapes = ";".join(str(n) if n == m else f"{n}x{m}" for n, m in asked["shapes"])
    lists = {
        "shapes": shapes,
        "structures": ";".join(asked["structures"]),
        "tokens": ";".join(map(str, asked["tokens"])),
        "contestants": ";".join(asked["contestants"]),
    }
    options = " \\\n    ".join(f'--{name} "{value}"' for name, value in lists.items())
    return f"structops bench {options} --repeats {asked['repeats']}"


def summary(table: Table) -> str:
    """The middle and both ends of every ratio, over all cases of a pass."""
    results, rows = load()["results"], []
    for run in ("forward", "train"):
        members = [r for r in results if r["pass"] == run]
        for name in ("copying", "einsum", "dense"):
            rows.append((run, name, *_spread(r["contestants"][name]["ratio"] for r in members)))
        wide = [r for r in members if r["in_features"] >= 2048 and r["structure"] in ("btt", "btt(rank=4)")]
        rows.append((run, "copying, √d blocks, width ≥ 2,048", *_spread(_ratio(r, "copying") for r in wide)))
        few = [r for r in members if "blocks=" in r["structure"]]
        rows.append((run, "copying, 4 and 16 blocks", *_spread(_ratio(r, "copying") for r in few)))
        full = [r for r in members if r["in_features"] >= 2048 and _is_full(r)]
        rows.append((run, "MAC share, width ≥ 2,048, rank · blocks² ≥ width", *_spread(r["mac_share"] for r in full)))
    return table(("pass", "", "median", "least", "most"), rows, "llrrr")


def _is_full(result: dict[str, Any]) -> bool:
    """Whether there is a block tensor-train that can have the rank of the matrix: rank * blocks^2 is its state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.StructureWarning)
        chain = so.structure(result["structure"]).chain(result["in_features"], result["out_features"])
    return result["structure"].startswith("btt") and chain.intermediate_widths[0] >= result["in_features"]


def _ratio(result: dict[str, Any], name: str) -> float:
    return result["contestants"][name]["ratio"]


def _spread(ratios: Iterable[float]) -> tuple[str, str, str]:
    found = list(ratios)
    return tuple(f"{value:.2f}" for value in (statistics.median(found), min(found), max(found)))


def cases(table: Table, data: dict[str, Any], run: str) -> str:
    """Every case of a pass."""
    rows = [
        (
            f"`{r['structure']}`",
            f"{r['in_features']:,}",
            f"{r['tokens']:,}",
            f"{1e3 * r['contestants']['structops']['median']:.3g}",
            *(f"{_ratio(r, name):.2f}" for name in ("dense", "copying", "einsum")),
            f"{r['mac_share']:.0%}",
            f"{r['of_bound']:.0%}",
        )
        for r in data["results"]
        if r["pass"] == run
    ]
    return table(
        ("", "width", "tokens", "ms", "dense", "copying", "einsum", "MAC share", "of roofline"), rows, "lrrrrrrrr"
    )


def compilers(table: Table) -> str:
    """Ratios to compiled contestants."""
    data = load("compilers")
    names = ("copying", "einsum", "compiled einsum", "jax", "jax einsum")
    rows = [
        (
            f"`{r['structure']}`",
            f"{r['in_features']:,}",
            r["pass"],
            *(f"{_ratio(r, name):.2f}" if name in r["contestants"] else "–" for name in names),
        )
        for r in data["results"]
    ]
    words = "1,024 tokens; *jax* is the layer of structops under `jax.jit`."
    return f"{words}\n\n" + table(("", "width", "pass", *names), rows, "lrlrrrrr")


def crossovers(table: Table) -> str:
    """From which width on ours is faster than dense; what already is at the least width is not listed."""
    found = [c for c in load()["crossovers"] if c["over"] == "width"]
    rows = [
        (f"`{c['structure']}`", c["run"], f"{c['tokens']:,}", c["text"].removeprefix("width "))
        for c in found
        if not c["text"].startswith("≤")
    ]
    least = min(n for n, _ in load()["settings"]["shapes"])
    words = f"The other {len(found) - len(rows)} of {len(found)} are faster than dense at width {least} already."
    return table(("", "pass", "tokens", "from width"), rows, "llrr") + f"\n\n{words}"
