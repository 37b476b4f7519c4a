"""The framework of the studies: settings, results, processes, power laws, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from structops.errors import StructureError
from structops.studies.lab import figures
from structops.studies.lab.config import command, option, read_config, write_config
from structops.studies.lab.frontier import Curve, Point, Ratio, cost_ratio, hull
from structops.studies.lab.pool import WorkerError, run_all
from structops.studies.lab.store import Store, append_line, locked, read_lines
from structops.studies.lab.study import Execution, Finding, Report, Study, Work, conduct
from structops.studies.lab.tables import Table

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Attributes:
        hidden: What the command does not say.
    """

    specs: Annotated[tuple[str, ...], option(help="Specs.")] = ("dense", "btt(rank=2, blocks=4)")
    widths: Annotated[tuple[int, ...], option("--widths", "--width", help="Widths.")] = (8, 16)
    rate: Annotated[float, option(min=0, help="A rate.")] = 0.5
    noisy: Annotated[bool, option("--noisy", help="A switch.")] = False


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command(Settings, lambda settings: typer.echo(repr(settings))))
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


# ------------------------------------------------------------------------------------------------------------- settings


def test_options_are_the_fields() -> None:
    assert invoke().output.strip() == repr(Settings())
    given_ = invoke("--specs", "kron; tt(rank=2)", "--widths", "4;9", "--rate", "0.25", "--noisy")
    assert given_.output.strip() == repr(Settings(("kron", "tt(rank=2)"), (4, 9), 0.25, True))
    for name in ("--widths", "--width"):
        assert invoke(name, "4,9").output.strip() == repr(Settings(widths=(4, 9)))
    said = invoke("--help").output
    assert "Settings of a test." in said
    assert "What the command" not in said
    assert "dense; btt(rank=2," in said


@given(
    st.builds(
        Settings,
        specs=st.lists(st.sampled_from(["dense", "btt(rank=2)", "kron"]), min_size=1).map(tuple),
        widths=st.lists(st.integers(1, 10**9), min_size=1).map(tuple),
        rate=st.floats(0, 1e9),
        noisy=st.booleans(),
    )
)
def test_a_file_of_settings_gives_them_back(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    write_config(settings, path)
    assert read_config(Settings, path) == settings


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("widths: [32, 64]\nrate: 0.125\n")
    assert invoke("--config", str(path), "--rate", "2").output.strip() == repr(Settings(widths=(32, 64), rate=2.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("width: 3", "width not among specs, widths, rate, noisy"),
        ("rate: -1", "greater than or equal to 0"),
        ("widths: [1.5]", "expected one or more of type int"),
        ("widths: []", "expected one or more of type int"),
        ("- 3", "expected `name: value` lines, got list"),
        ("rate: [", "cannot be read"),
        ("rate: !!python/object:os.system {}", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(StructureError, match=r"(?s).*" + said.replace("(", r"\(")):
        read_config(Settings, path)
    assert invoke("--config", str(path)).exit_code == 2


def test_no_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="cannot be read"):
        read_config(Settings, tmp_path / "none.yaml")


# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Run:
    number: int
    name: str = "run"


def test_results_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(Run(1), {"loss": math.inf, "curve": [1.0, math.nan]})
    again = Store(tmp_path)
    assert again.get(Run(1)) == store.get(Run(1)) == {"loss": None, "curve": [1.0, None]}
    assert again.get(Run(2)) is None
    assert again.get(Run(1, "other")) is None


def test_equal_settings_are_one_run(tmp_path: Path) -> None:
    Store(tmp_path).add(Run(1), {"loss": 1.0})
    assert Store(tmp_path).get(Run(1.0)) == {"loss": 1.0}  # type: ignore[arg-type]
    assert Store(tmp_path).get(Run(1.5)) is None  # type: ignore[arg-type]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(Run(1), {"loss": 1.0})
    store.add(Run(2), {"loss": 2.0})
    whole = store.path.read_bytes()
    for end in range(len(whole)):
        store.path.write_bytes(whole[:end])
        lines = [row for _, row in read_lines(store.path)]
        assert len(lines) == whole[:end].count(b"\n")
        Store(tmp_path).add(Run(3), {"loss": 3.0})
        assert Store(tmp_path).get(Run(3)) == {"loss": 3.0}
        assert sum(1 for _ in read_lines(store.path)) == len(lines) + 1


def test_other_lines_are_refused(tmp_path: Path) -> None:
    append_line(tmp_path / "results.jsonl", {"width": 3})
    with pytest.raises(StructureError, match="line 1: expected a run and its result"):
        Store(tmp_path)
    (tmp_path / "results.jsonl").write_text("no json\n")
    with pytest.raises(StructureError, match="line 1: not a result, as it is no JSON"):
        Store(tmp_path)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom structops.studies.lab.store import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n    pass"
    )
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process writes to" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ processes


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def run(jobs: list[int], **how: Any) -> dict[int, int]:
    return dict(run_all(square, jobs, console=QUIET, describe=str, **how))


@pytest.mark.torch
def test_jobs_run_here_or_in_processes() -> None:
    expected = {number: number**2 for number in range(5)}
    assert run(list(expected), workers=0) == run(list(expected), workers=2) == expected
    assert run([], workers=2) == {}


@pytest.mark.torch
def test_an_error_of_a_job_is_raised_here() -> None:
    for workers in (0, 2):
        with pytest.raises(ValueError, match="-3 is negative"):
            run([1, -3], workers=workers)


@pytest.mark.torch
def test_a_killed_worker_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(WorkerError, match="run this again"):
        run([13, 2], workers=2)


def test_an_unknown_executor() -> None:
    with pytest.raises(StructureError, match="'slurm' not among local, ray"):
        run([1], executor="slurm")


# ----------------------------------------------------------------------------------------------------------- power laws


@given(st.floats(-2, 2), st.floats(0.1, 10), st.lists(st.integers(1, 10**6), min_size=3, max_size=8, unique=True))
def test_a_power_law_is_found(exponent: float, coefficient: float, costs: list[int]) -> None:
    curve = Curve.of("any", [Point(c, coefficient * c**exponent, 0, 0) for c in costs])
    assert curve.law is not None
    assert math.isclose(curve.law.exponent, exponent, abs_tol=1e-6)
    assert math.isclose(curve.law(costs[0]), coefficient * costs[0] ** exponent, rel_tol=1e-6)


def test_the_standard_error_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, noise = np.arange(1.0, 9.0), rng.normal(size=8)
    curve = Curve.of(
        "any", [Point(np.exp(a), np.exp(-0.1 * a + 0.05 * b), 0, 0) for a, b in zip(x, noise, strict=True)]
    )
    design = np.stack([x, np.ones(8)], 1)
    y = -0.1 * x + 0.05 * noise
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = np.sum((y - design @ solution) ** 2) / 6
    expected = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    assert curve.law is not None
    assert math.isclose(curve.law.exponent, solution[0], rel_tol=1e-9)
    assert math.isclose(curve.law.error, expected, rel_tol=1e-9)


def test_the_ratio_of_costs_at_equal_error() -> None:
    reference = Curve.of("dense", [Point(c, c**-0.1, 0, 0) for c in (10, 100, 1000)])
    better = Curve.of("btt", [Point(c / 5, c**-0.1, 0, 0) for c in (10, 100, 1000)])
    assert cost_ratio(better, reference) == Ratio(pytest.approx(1 / 5))
    assert cost_ratio(reference, better) == Ratio(pytest.approx(5))
    # The curve that falls further is read where the other one ends.
    longer = Curve.of("btt", [Point(c / 5, c**-0.1, 0, 0) for c in (10, 100, 1000, 10_000)])
    assert cost_ratio(longer, reference) == Ratio(pytest.approx(1 / 5))
    assert cost_ratio(Curve("none", ()), reference) is None
    # A curve that starts below the lowest error of the other one has only a bound.
    worse = Curve.of("kron", [Point(c, 1.0, 0, 0) for c in (10, 100)])
    assert cost_ratio(worse, reference) == Ratio(1.0, "≥")
    assert cost_ratio(reference, worse) == Ratio(1.0, "≤")
    assert str(Ratio(54.61, "≥")) == "≥ 54.6"


def test_a_training_that_diverged_is_no_point() -> None:
    assert Point.of([1, 1], [0.5, math.inf]) is None
    assert Point.of([4, 4], [0.1, 0.4]) == Point(4, pytest.approx(0.2), 0.1, 0.4)


def test_the_hull_is_convex_and_below() -> None:
    points = [Point(c, e, e, e) for c, e in ((1, 1), (10, 0.9), (100, 0.2), (1000, 0.19), (10_000, 0.3), (5, 2))]
    assert [point.cost for point in hull(points)] == [1, 100, 1000]


# --------------------------------------------------------------------------------------------------- tables and figures


def test_a_table_three_times() -> None:
    table = Table("T", ("what", "n", "x", "ok"), (("a", 12345, 0.123456, True), ("b", 1, None, False)))
    assert table.to_csv() == "what,n,x,ok\na,12345,0.123456,True\nb,1,,False\n"
    assert table.to_markdown().splitlines()[2:] == ["| a | 12,345 | 0.123 | yes |", "| b | 1 | – | no |"]
    assert table.to_rich().row_count == 2


def test_a_figure_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with figures.canvas(2, sharey=True) as (figure, panels):
            panels[0].plot([1, 2], [3, 4], **figures.look(["x", "y"], "y"))
        figures.write(figure, tmp_path / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_labels_look_different() -> None:
    labels = [str(k) for k in range(84)]
    looks = {tuple(figures.look(labels, label).values()) for label in labels}
    assert len(looks) == len(labels)


# -------------------------------------------------------------------------------------------------------------- a study


@dataclass(frozen=True)
class Squares(Study):
    """Squares of numbers."""

    name = "squares"
    title = "Squares"
    numbers: Annotated[tuple[int, ...], option(help="Numbers.")] = (1, 2, 3)

    def runs(self) -> list[Run]:
        return [Run(number) for number in (*self.numbers, self.numbers[0])]

    def work(self) -> Work:
        return Work(slowly, str, prepare=lambda run, folder: (run, folder))

    def report(self, results: Any) -> Report:
        rows = tuple((run.number, result["square"]) for run, result in results.items())
        with figures.canvas() as (figure, (panel,)):
            panel.plot([row[0] for row in rows], [row[1] for row in rows])
        finding = Finding("squares grow", "school", str(rows), True)
        return Report({"squares": Table("Squares", ("n", "n²"), rows)}, {"curve": figure}, [finding])


def slowly(job: tuple[Run, Path]) -> dict[str, float]:
    run, folder = job
    with open(folder / "trained.txt", "a") as file:
        file.write(f"{run.number}\n")
    time.sleep(float(os.environ.get("SLOWLY", 0)))
    return {"square": run.number**2, "seconds": 0.5}


def study(folder: Path, *numbers: int, **how: Any) -> Report:
    execution = Execution(out=folder, workers=how.pop("workers", 1), **how)
    return conduct(Squares(numbers), execution, QUIET)


@pytest.mark.torch
def test_a_study_leaves_everything_and_goes_on(tmp_path: Path) -> None:
    report = study(tmp_path, 1, 2)
    assert report.tables["squares"].rows == ((1, 1), (2, 4))
    left = {path.name for path in tmp_path.iterdir()} - {".lock", "trained.txt"}
    tables = {f"{name}.{kind}" for name in ("squares", "findings") for kind in ("csv", "md")}
    assert left == {"config.yaml", "results.jsonl", "facts.json", "report.md", "curve.svg", "curve.png", *tables}
    study(tmp_path, 2, 3)
    assert (tmp_path / "trained.txt").read_text() == "1\n2\n3\n"
    assert read_config(Squares, tmp_path / "config.yaml") == Squares((2, 3))
    page = (tmp_path / "report.md").read_text()
    assert "![curve](curve.svg)" in page
    assert "| 3 | 9 |" in page
    assert json.loads((tmp_path / "facts.json").read_text())["seconds of training"] == 1


@pytest.mark.torch
def test_a_report_without_training(tmp_path: Path) -> None:
    study(tmp_path, 1)
    report = study(tmp_path, 1, 5, only_report=True)
    assert report.tables["squares"].rows == ((1, 1),)
    assert (tmp_path / "trained.txt").read_text() == "1\n"


@pytest.mark.torch
def test_a_study_that_is_killed_loses_nothing_and_leaves_no_worker(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})\n"
        "from pathlib import Path\nimport test_lab\nif __name__ == '__main__':\n"
        f"    test_lab.study(Path({str(tmp_path)!r}), *range(8))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "SLOWLY": "0.3"}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    store, limit = tmp_path / "results.jsonl", time.monotonic() + 60
    while (not store.exists() or store.read_text().count("\n") < 2) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    ended = store.read_text().count("\n")
    trained = (tmp_path / "trained.txt").read_text().split()
    time.sleep(0.7)
    assert (tmp_path / "trained.txt").read_text().split() == trained, "a worker lives on"
    assert ended >= 2
    study(tmp_path, *range(8))
    again = (tmp_path / "trained.txt").read_text().split()[len(trained) :]
    assert len(again) == 8 - ended
    assert Store(tmp_path).get(Run(7)) == {"square": 49, "seconds": 0.5}
