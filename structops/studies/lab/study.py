"""A study: settings that name trainings, and a report that is made of their results."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.console import Console
from rich.markup import escape

from structops.errors import StructureError
from structops.report import machine, write_json, write_text
from structops.studies.lab import figures, ranks
from structops.studies.lab.config import option, write_config
from structops.studies.lab.pool import import_all, run_all
from structops.studies.lab.store import Store, locked
from structops.studies.lab.tables import Table

ANSWERS = {True: "yes", False: "no", None: "cannot be told"}
COLORS = {True: "green", False: "red", None: "yellow"}
Result = dict[str, Any]
Results = Mapping[Any, Result]


@dataclass(frozen=True)
class Execution:
    """How a study is run, which changes no result.

    Attributes:
        out: Folder of everything that it leaves.
        workers: Processes; 0 for one a core.
        executor: One of `pool.EXECUTORS`.
        imports: Modules to import first, with semicolons between them.
        only_report: Whether nothing is trained, and the report is of the results that are there.
    """

    out: Annotated[Path, option(help="Folder of results; with the same folder a study goes on where it was.")] = Path(
        "structops-study"
    )
    workers: Annotated[int, option(min=0, help="Trainings at once, each with a thread; 0 for one a core.")] = 0
    executor: Annotated[str, option(help="local, or ray for a cluster that Ray manages.")] = "local"
    imports: Annotated[
        str, option("--import", help="Modules that register structures of yours, with semicolons between them.")
    ] = ""
    only_report: Annotated[bool, option("--only-report", help="Train nothing; report what is there.")] = False


@dataclass(frozen=True)
class Finding:
    """What the paper found, and whether it is seen here.

    Attributes:
        claim: In words.
        source: Where the paper says so.
        here: The numbers of this study.
        appears: Whether they agree; None where they cannot tell.
    """

    claim: str
    source: str
    here: str
    appears: bool | None

    @property
    def text(self) -> str:
        """In a line."""
        return f"{self.claim}: {self.here} (paper {self.source})"


@dataclass(frozen=True)
class Report:
    """What a study says.

    Attributes:
        tables: By the name of their files; the terminal shows the first one.
        figures: Matplotlib figures by the name of their files.
        findings: Of the paper.
    """

    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()

    @property
    def finding_table(self) -> Table:
        """The findings as a table."""
        rows = tuple((one.claim, one.source, one.here, ANSWERS[one.appears]) for one in self.findings)
        return Table("The paper's findings", ("finding", "source", "here", "appears"), rows)


@dataclass(frozen=True)
class Work:
    """How the runs of a study are done.

    Attributes:
        train: From what ``prepare`` gives to a result; of a module, so that another process finds it.
        describe: A few words on a run.
        prepare: What ``train`` gets for a run and the folder; by default the run.
        forget: Called with a run and the folder once its result is on disk: its checkpoint can go.
        divisible: Whether ``train`` shares one training among the processes of ``torchrun``.
    """

    train: Callable[[Any], Result]
    describe: Callable[[Any], str]
    prepare: Callable[[Any, Path], Any] = lambda run, folder: run
    forget: Callable[[Any, Path], None] = lambda run, folder: None
    divisible: bool = False


class Study(ABC):
    """Settings of a study, a frozen dataclass with an `option` for every field."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def runs(self) -> Sequence[Any]:
        """The trainings, each a frozen dataclass; those that are equal are done once."""

    @abstractmethod
    def work(self) -> Work:
        """How they are done; libraries that compute are imported here, and not before."""

    def facts(self) -> dict[str, Any]:
        """What a report should say of the data, such as a checksum."""
        return {}

    @abstractmethod
    def report(self, results: Results) -> Report:
        """Tables, figures and findings of the trainings that ended."""


def conduct(study: Study, execution: Execution, console: Console) -> Report:
    """Run what is not there yet, and write the report.

    Every result is on disk as soon as it is there, and trainings keep checkpoints, so that a study may be ended in any
    way, also by ``kill -9``, and started again.

    Args:
        study: What to do.
        execution: How.
        console: Where tables and the progress go.

    Raises:
        StructureError: The folder is in use, or a study of small trainings is run by ``torchrun``.
    """
    out, start = execution.out.absolute(), time.perf_counter()
    imports = [name.strip() for name in execution.imports.split(";") if name.strip()]
    import_all(imports)
    runs, work = list(dict.fromkeys(study.runs())), study.work()
    if ranks.current().size > 1 and not work.divisible:
        raise StructureError(f"{study.name} has trainings that cannot be divided: run it without torchrun")
    with ranks.joined() as group, locked(out) if group.leads and not execution.only_report else nullcontext():
        store = Store(out)
        todo = group.share([run for run in runs if store.get(run) is None])
        if not execution.only_report:
            if group.leads:
                out.mkdir(parents=True, exist_ok=True)
                write_config(study, out / "config.yaml")
                for run in set(runs) - set(todo):  # a kill between a result and this leaves a checkpoint
                    work.forget(run, out)
            jobs = {work.prepare(run, out): run for run in todo}
            ended = run_all(
                work.train,
                list(jobs),
                console=console if group.leads else Console(quiet=True),
                describe=lambda job: work.describe(jobs[job]),
                # Under torchrun all processes work on one training after the other.
                workers=0 if group.size > 1 else execution.workers or None,
                executor=execution.executor,
                done=len(runs) - len(todo),
                imports=imports,
            )
            for job, result in ended:
                if group.leads:
                    store.add(jobs[job], result)
                    work.forget(jobs[job], out)
        if not group.leads:
            return Report()
        results = {run: found for run in runs if (found := store.get(run)) is not None}
        seconds = time.perf_counter() - start
        console.print(f"{len(results)} of {len(runs)} trainings are there, {len(todo)} were not; {seconds:.0f} s")
        if not results:
            return Report()
        report = study.report(results)
        if (todo and not execution.only_report) or not (out / "facts.json").exists():
            write_json(out / "facts.json", facts_of(study, execution, group.size, results))
        write(report, study, out)
    for table in list(report.tables.values())[:1]:  # a terminal is too narrow for the others
        console.print(table.to_rich())
    for finding in report.findings:
        console.print(
            f"[{COLORS[finding.appears]}]{ANSWERS[finding.appears]}[/]  {escape(finding.text)}", soft_wrap=True
        )
    console.print(f"tables, figures and report.md are in {execution.out}")
    return report


def facts_of(study: Study, execution: Execution, processes: int, results: Results) -> dict[str, Any]:
    """The command, what the trainings took, on what and where they ran."""
    return {
        "study": study.name,
        "command": shlex.join(["structops", *sys.argv[1:]]),
        "trainings": len(results),
        "seconds of training": round(sum(result.get("seconds", 0.0) for result in results.values())),
        "at once": 1 if processes > 1 else execution.workers or os.cpu_count(),
        "processes of each": processes,
        "cores": os.cpu_count(),
        "data": study.facts(),
        "machine": machine(),
    }


def write(report: Report, study: Study, out: Path) -> None:
    """Write tables as CSV and Markdown, figures as SVG and PNG, and a page that shows all of them."""
    tables = {**report.tables, **({"findings": report.finding_table} if report.findings else {})}
    for name, table in tables.items():
        write_text(out / f"{name}.csv", table.to_csv())
        write_text(out / f"{name}.md", table.to_markdown())
    for name, figure in report.figures.items():
        figures.write(figure, out / name)
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    lines = [f"# {study.title}", ""]
    lines += [f"`{facts['command']}` (all settings: `config.yaml`)", ""]
    lines += [f"{facts['trainings']} trainings, {facts['seconds of training']} seconds of training in all.", ""]
    lines += [f"![{name}]({name}.svg)\n" for name in report.figures]
    lines += [f"## {table.title}\n\n{table.to_markdown()}" for table in tables.values()]
    write_text(out / "report.md", "\n".join(lines))
