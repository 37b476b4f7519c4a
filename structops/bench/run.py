"""Run the cases, one after the other, in this process."""

from __future__ import annotations

import os
import platform
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from structops.bench import ceilings
from structops.bench.cases import OURS, Case, Settings, cases_of
from structops.bench.clock import alternate
from structops.bench.contestant import Absent, Contestant, check_agreement
from structops.bench.contestants import WAYS, Problem, check_device, torch_contestant, waiting
from structops.bench.report import facts, figure, markdown, overview
from structops.bench.results import Report, Result
from structops.bench.roofline import Ceilings
from structops.report import machine, table, write_figure, write_json, write_text

BUSY = 0.25  # programs a core that already run before


def report(settings: Settings, out: Path, console: Console) -> None:
    """Measure all cases into a folder: the numbers after every case, tables and plot at the end or at an interrupt.

    Args:
        settings: What to measure.
        out: Folder for ``bench.json``, ``bench.md`` and ``bench.png``.
        console: Where progress and tables are shown.

    Raises:
        StructureError: A structure is unknown, or none can have any of the shapes.
        BackendError: The device does not exist.
        DisagreementError: A contestant computes something else than the others.
    """
    found: Report | None = None
    try:
        for found in bench(settings, machine(), console):
            write_json(out / "bench.json", found.data())
    finally:
        if found:
            for sheet in overview(found):
                console.print(table(sheet.title, sheet.columns, sheet.rows))
            for line in facts(found):
                console.print(f"- {line}", markup=False, highlight=False)
            write_text(out / "bench.md", markdown(found))
            write_figure(out / "bench.png", figure(found))
            console.print(f"in {out}: bench.json, bench.md, bench.png")


def bench(settings: Settings, known: dict[str, Any], console: Console) -> Iterator[Report]:
    """Measure all cases; after each the report with what is there so far, always the same object.

    Args:
        settings: What to measure.
        known: What is known of the machine; what concerns torch is added.
        console: Where progress is shown.

    Raises:
        StructureError: A structure is unknown, or none can have any of the shapes.
        BackendError: The device does not exist.
        DisagreementError: A contestant computes something else than the others.
    """
    cases, skipped = cases_of(settings)
    check_device(settings.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    show = Progress(*columns, console=console, transient=True)
    with _threads(settings.threads), _interrupts() as interrupts, show as progress:
        found = Report(settings, {**known, **_torch_machine(settings.device)}, len(cases), skipped)
        found.notes += _notes(settings, found.machine)
        bar = progress.add_task("ceilings", total=len(cases))
        for dtype in settings.dtypes:
            found.ceilings[dtype] = ceilings.measure(dtype, settings.device)
        for case in cases:
            progress.update(bar, description=case.label)
            found.results.append(run_case(case, settings, found.ceilings[case.dtype]))
            progress.advance(bar)
            yield found
            if interrupts:
                raise KeyboardInterrupt


def run_case(case: Case, settings: Settings, limits: Ceilings) -> Result:
    """Build the contestants, check that they agree, and time them in turn."""
    contestants, absent = _contestants(case, settings)
    errors = check_agreement(contestants, case.dtype)
    timings = alternate(
        {contestant.name: contestant.step for contestant in contestants},
        repeats=settings.repeats,
        min_seconds=settings.min_seconds,
        wait=waiting(case.device),
    )
    memory = {contestant.name: contestant.memory() for contestant in contestants}
    return Result(case, limits, timings, errors, memory, absent)


def _contestants(case: Case, settings: Settings) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can take part, and why the others cannot."""
    problem = Problem.of(case, settings.seed)
    chosen = [name for name in settings.contestants if name != "merged" or case.run == "forward"]
    present, absent = [], {}
    for name in dict.fromkeys((OURS, *chosen)):
        try:
            present.append(_contestant(name, problem))
        except Absent as reason:
            absent[name] = str(reason)
    return present, absent


def _contestant(name: str, problem: Problem) -> Contestant:
    if name in WAYS:
        return torch_contestant(name, problem)
    if find_spec("jax") is None or find_spec("flax") is None:
        raise Absent("JAX is not installed, or Flax is not")
    from structops.bench.jax_contestants import jax_contestant

    return jax_contestant(name, problem.case, problem.numbers())


def _notes(settings: Settings, machine: dict[str, Any]) -> list[str]:
    """What a reader of the numbers has to know."""
    notes = []
    if (machine["load"] or 0) > BUSY * machine["cores"]:
        notes.append(
            f"The machine was busy at the start: {machine['load']:.1f} programs were running on {machine['cores']} "
            "cores. Times of several threads then say little, and ratios not much more; --threads 1 suffers less."
        )
    if any(name.startswith("jax") for name in settings.contestants) and settings.threads:
        notes.append("JAX takes threads of its own, as many as there are cores; --threads does not limit it.")
    return notes


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts so far: one that comes while JAX is called by the garbage collector raises nothing."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield seen  # others see to interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# -------------------------------------------------------------------------------------------------------- the machine


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """As many threads of torch, afterwards as many as before."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_machine(device: str) -> dict[str, Any]:
    """The processor, the device, the threads, and how busy the machine was."""
    return {
        "cpu": _cpu(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()
