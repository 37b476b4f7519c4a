"""The commands, run as a user runs them."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from structops import cli, doctor
from structops.algebra import closure
from structops.studies import algebra as study
from structops.studies import closure as closure_tables

PROGRAM = [sys.executable, "-m", "structops"]


def run(*arguments, **kwargs):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=300, check=False, **kwargs)


def test_help_lists_the_commands_and_is_light():
    result = run("--help")
    assert result.returncode == 0
    for command in ("demo", "algebra", "study", "bench", "doctor"):
        assert command in result.stdout
    heavy = "('torch', 'jax', 'cola', 'matplotlib')"
    code = f"import structops.cli, structops.studies.closure, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_wrong_arguments_are_refused():
    assert run("demo", "--backend", "numpy").returncode == 2
    assert run("demo", "--epochs", "0").returncode == 2
    assert run("nonsense").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_demo_writes_tables_numbers_and_plots(backend, tmp_path):
    pytest.importorskip(backend, reason=f"needs {backend}")
    small = ("--epochs", "1", "--seeds", "2", "--width", "16", "--structures", "dense; btt", "--out", str(tmp_path))
    result = run("demo", "--backend", backend, *small)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["finished"] == "9 of 9"
    assert data["backend"] == backend
    assert {row["structure"] for row in data["products"]} > {"dense", "btt", "kron", "circulant"}
    for row in data["products"]:
        assert row["error"] < 1e-5
        assert row["microseconds"] > 0
    for row in data["summaries"]:
        assert abs(row["macs"] / row["budget"] - 1) < 0.4
        assert row["label"].split("(")[0].split(",")[0] in result.stdout
    for name in ("curves.png", "error-vs-macs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "demo.json", "error-vs-macs.png"]


@pytest.mark.slow
def test_an_interrupted_demo_keeps_what_was_finished(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch")
    arguments = ("demo", "--epochs", "60", "--width", "16", "--out", str(tmp_path))
    # A suite that runs in the background ignores SIGINT, and so would its children.
    restore = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", restore, *PROGRAM, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not (tmp_path / "demo.json").exists() or '"finished": "0' in (tmp_path / "demo.json").read_text():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    assert "Traceback" not in errors
    data = json.loads((tmp_path / "demo.json").read_text())
    finished, total = map(int, data["finished"].split(" of "))
    assert 1 <= finished == len(data["summaries"]) < total
    assert len(data["products"]) > 10
    assert (tmp_path / "curves.png").exists()


def test_a_command_without_its_extras_names_them(monkeypatch, capsys):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda module: None if module in ("sklearn", "flax") else found(module))
    with pytest.raises(typer.Exit):
        cli._require("jax", "demo")
    assert "pip install 'structops[jax,demo]'" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- algebra


def test_algebra_prints_the_closure_tables_in_a_terminal_of_100_columns():
    result = run("algebra", env={**os.environ, "COLUMNS": "100"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for verb, binary in closure.BINARY.items():
        title = next(line for line in lines if f"{closure_tables.called(verb)}: A in rows" in line)
        assert f"lazy {binary['*', '*']}" in title
        table = lines[lines.index(title) :]
        for name in closure.ROWS:
            row = next(line for line in table if line.split()[:1] == [name])
            assert row.split()[2:] == closure_tables.cells(verb, name)
    unary = lines[lines.index(next(line for line in lines if line.startswith("One operator"))) :]
    for name in closure.ROWS:
        row = next(line for line in unary if line.split()[:1] == [name])
        assert row.split()[1:] == [closure.closure(verb, name) for verb in closure.UNARY]
    direct = lines[lines.index(next(line for line in lines if line.startswith("Linear algebra"))) :]
    for name in closure.ROWS:
        row = next(line for line in direct if line.split()[:1] == [name])
        assert row.split()[1:] == [closure_tables.found(verb, name) for verb in closure.LINALG]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_algebra_measures_every_verb_at_growing_sizes(backend, tmp_path):
    pytest.importorskip(backend, reason=f"needs {backend}")
    # Most of the time in JAX is compiling.
    env = {"COLUMNS": "120", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    small = ("--backend", backend, "--largest", "576", "--out", str(tmp_path / "costs.json"))
    result = run("algebra", "--costs", *small, env={**os.environ, **env})
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "costs.json").read_text())
    assert data["backend"] == backend
    assert data["machine"]["versions"]["cola-ml"] == "0.0.7"
    assert [(row["verb"], row["operands"], row["cost"]) for row in data["rows"]] == [
        (case.verb, case.label, case.cost) for case in study.CASES
    ]
    for row in data["rows"]:
        assert 2 <= len(row["sizes"]) == len(row["seconds"])
        assert row["sizes"][-1] == 576
        assert all(t > 0 for t in row["seconds"])
        assert (row["exponent"] is None) == (row["fitted"] == 0)
    for case in study.CASES:
        assert case.verb in result.stdout
        assert case.operands[0].split("(")[0].split()[0] in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_algebra_refuses_sizes_that_say_nothing():
    assert run("algebra", "--costs", "--largest", "100").returncode == 2


# ------------------------------------------------------------------------------------------------------------- studies


@pytest.mark.slow
def test_coordinate_check_tells_the_naive_rule_from_the_others(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch")
    small = ("--structures", "btt", "--optimizers", "adam;muon", "--rules", "paper;naive", "--widths", "64;256")
    where = ("--seeds", "4", "--out", str(tmp_path))
    result = run("study", "coordinate-check", *small, *where, env={**os.environ, "COLUMNS": "150"})
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "slopes.csv", newline="") as file:
        found = {(row["optimizer"], row["rule"]): row for row in csv.DictReader(file)}
    assert found["adam", "paper"]["verdict"] == found["muon", "paper"]["verdict"] == "ok"
    assert found["adam", "naive"]["verdict"].startswith("drift")
    assert found["adam", "naive"]["predicted"] == "-0.50"
    (line,) = [line for line in result.stdout.splitlines() if "adam" in line and "naive" in line]
    assert "drift" in line
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_lr_landscape_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch")
    small = ("--structures", "btt", "--rules", "paper;naive", "--widths", "16;64", "--lrs=-12:-4:4", "--seeds", "1")
    arguments = ("study", "lr-landscape", *small, "--epochs", "1", "--out", str(tmp_path))
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "12 of 12 trainings are there, 12 were not" in " ".join(first.stdout.split())
    file, whole = tmp_path / "results.jsonl", (tmp_path / "rates.csv").read_text()
    assert len(whole.splitlines()) == 3
    # As if it had been killed while it wrote the last of its lines.
    file.write_text(file.read_text()[:-20])
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert "12 of 12 trainings are there, 1 were not" in " ".join(again.stdout.split())
    assert (tmp_path / "rates.csv").read_text() == whole
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("coordinate-check", "--widths", "64"),
        ("coordinate-check", "--widths", "64;x"),
        ("coordinate-check", "--steps", "0"),
        ("coordinate-check", "--optimizers", "lbfgs"),
        ("coordinate-check", "--rules", "guess"),
        ("coordinate-check", "--structures", "nonsense"),
        ("lr-landscape", "--lrs", "-4"),
        ("lr-landscape", "--lrs", "-4:-2:0"),
        ("lr-landscape", "--rules", "guess"),
    ],
)
def test_studies_refuse_what_they_do_not_know(command, option, value, tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch")
    out = str(tmp_path / "out")
    result = CliRunner().invoke(cli.app, ["study", command, f"{option}={value}", "--out", out])
    assert result.exit_code == 2, result.output
    assert not Path(out).exists()


# ------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_this_installation_healthy():
    result = run("doctor")
    assert result.returncode == 0, result.stdout
    assert "cola-ml 0.0.7" in result.stdout


def test_doctor_names_the_repair_of_a_wrong_plum(tmp_path: Path):
    """A module like plum-dispatch's shadows the fork; the package itself cannot be imported then, the doctor can."""
    (tmp_path / "plum.py").write_text("class Dispatcher:\n    def __call__(self, method=None, precedence=0): ...\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run("doctor", env=env)
    assert result.returncode == 1
    assert "pip install --force-reinstall --no-deps cola-plum-dispatch==0.1.4" in result.stdout
    imported = subprocess.run(
        [sys.executable, "-c", "import structops; structops.Dense"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ImportError" in imported.stderr
    assert "cola-plum-dispatch==0.1.4" in imported.stderr


@pytest.mark.parametrize(
    ("distribution", "version", "repair"),
    [
        ("beartype", "0.23.1", "beartype<0.23"),
        ("cola-ml", "0.0.6", "cola-ml==0.0.7"),
        ("plum-dispatch", "2.5.0", "--no-deps cola-plum-dispatch==0.1.4"),
    ],
)
def test_doctor_names_the_repair_of_wrong_versions(monkeypatch, distribution, version, repair):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: version if name == distribution else real(name))
    console = Console(record=True, width=200, file=io.StringIO())
    assert not doctor.diagnose(console)
    assert repair in console.export_text()


def test_doctor_takes_a_missing_extra_for_no_fault(monkeypatch):
    real = doctor._imports
    monkeypatch.setattr(doctor, "_imports", lambda module: module != "flax" and real(module))
    (finding,) = [finding for finding in doctor.examine() if finding.level == "missing"]
    assert finding.repair == "pip install 'structops[jax]'"
