"""The commands, run as a user runs them."""

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

from structops import cli, doctor

PROGRAM = [sys.executable, "-m", "structops"]


def run(*arguments, **kwargs):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=300, check=False, **kwargs)


def test_help_lists_the_commands_and_is_light():
    result = run("--help")
    assert result.returncode == 0
    assert "demo" in result.stdout
    assert "doctor" in result.stdout
    code = "import structops.cli, sys; print([m for m in ('torch', 'jax', 'cola', 'matplotlib') if m in sys.modules])"
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
