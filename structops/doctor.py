"""``structops doctor``: what is installed, what is wrong, and the command that repairs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from structops.errors import PLUM_REPAIR

EXTRAS = {
    "torch": ("torch", "safetensors"),
    "jax": ("jax", "flax", "equinox", "optax"),
    "demo": ("sklearn", "matplotlib", "scipy"),
    "studies": ("filelock", "mlxtend", "PIL", "yaml", "tokenizers"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``"ok"``, ``"missing"`` (an extra that is not installed: no fault) or ``"wrong"``.
        text: What was found.
        repair: The command that mends it, if something is missing or wrong.
    """

    level: str
    text: str
    repair: str = ""


def diagnose(console: Console) -> bool:
    """Print the report; true if nothing is wrong."""
    marks = {"ok": "[green]ok     [/]", "missing": "[yellow]missing[/]", "wrong": "[red]wrong  [/]"}
    findings = list(examine())
    for finding in findings:
        console.print(f"{marks[finding.level]} {finding.text}", highlight=False)
        if finding.repair:
            console.print(f"        {finding.repair}", highlight=False, markup=False, soft_wrap=True)
    return all(finding.level != "wrong" for finding in findings)


def examine() -> Iterator[Finding]:
    """All findings, from the base upwards."""
    yield from _plum()
    yield from _beartype()
    yield from _cola()
    for extra, modules in EXTRAS.items():
        yield from _extra(extra, modules)
    if installed("torchvision") and not _imports("torchvision"):
        yield Finding(
            "wrong", "torchvision does not fit this torch and breaks what imports it", "pip uninstall -y torchvision"
        )


def _plum() -> Iterator[Finding]:
    both = installed("plum-dispatch") and installed("cola-plum-dispatch")
    try:
        import plum

        from_fork = "cond" in plum.Dispatcher.__call__.__code__.co_varnames
    except ImportError:
        from_fork = False
    if from_fork and not both:
        yield Finding("ok", f"plum is that of cola-plum-dispatch {installed('cola-plum-dispatch')}")
    elif from_fork:
        yield Finding(
            "wrong", "plum-dispatch is installed beside cola-plum-dispatch; the two own the same files", PLUM_REPAIR
        )
    else:
        yield Finding("wrong", "`import plum` does not give cola-plum-dispatch, which CoLA needs", PLUM_REPAIR)


def _beartype() -> Iterator[Finding]:
    found = installed("beartype")
    if found and tuple(map(int, found.split(".")[:2])) >= (0, 23):
        text = (
            f"beartype {found}: CoLA's dispatch is ambiguous from 0.23 on; structops repairs it, CoLA alone is broken"
        )
        yield Finding("wrong", text, "pip install 'beartype<0.23'")
    else:
        yield Finding("ok", f"beartype {found}")


def _cola() -> Iterator[Finding]:
    found = installed("cola-ml")
    if found == "0.0.7":
        yield Finding("ok", f"cola-ml {found}")
    else:
        yield Finding("wrong", f"cola-ml is {found or 'not installed'}, expected 0.0.7", "pip install cola-ml==0.0.7")


def _extra(extra: str, modules: tuple[str, ...]) -> Iterator[Finding]:
    absent = [module for module in modules if not _imports(module)]
    if absent:
        repair = f"pip install 'structops[{extra}]'"
        yield Finding("missing", f"extra [{extra}]: {', '.join(absent)} not found".replace("[", r"\["), repair)
    else:
        found = ", ".join(
            f"{module} {getattr(importlib.import_module(module), '__version__', '')}" for module in modules
        )
        yield Finding("ok", f"extra [{extra}]: {found}".replace("[", r"\["))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a broken package may raise anything
        return False
    return True


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
