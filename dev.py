"""Development commands, with nothing but Python: `python dev.py test`.

Each command first makes sure that `.venv` exists and is up to date: it holds structops itself (editable),
PyTorch, JAX and the development tools, in the versions of `constraints.txt`. The Makefile calls this file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)

# Two test processes with a thread each share two cores better than two with two threads each.
TEST_ENV = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
PYTEST = "pytest -q -n 2"
# Outside .venv, because everything else has to work without it; on a GPU, PyTorch brings the version that it needs.
BESIDE = ROOT / ".triton"
TRITON = "triton==3.8.0"
LINT = ("ruff check --quiet .", "ruff format --check --quiet .")

# What `clean` removes, as patterns below the root.
CREATED = (
    ".venv .triton build dist site structops-demo structops-bench structops-study coordinate-check lr-landscape "
    "htmlcov "
    ".coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache **/__pycache__ **/.ipynb_checkpoints"
)


@dataclass(frozen=True)
class Command:
    """Programs of `.venv` that run one after the other until one fails; further arguments go to the last."""

    help: str
    steps: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ("dev",)
    beside: str = ""  # a package for this command alone, without its dependencies, in the folder BESIDE


COMMANDS = {
    "test": Command("lint, check the types and run the tests", (*LINT, "mypy", PYTEST), TEST_ENV),
    "demo": Command("run the demonstration", ("structops demo",)),
    "lint": Command("check style and formatting", LINT),
    "types": Command("check the types", ("mypy",)),
    "format": Command("mend style and formatting", ("ruff check --fix .", "ruff format .")),
    "docs": Command(
        "build the documentation into site/",
        ("mkdocs build --strict",),
        {"NO_MKDOCS_2_WARNING": "1"},
        ("dev", "docs"),
    ),
    "notebooks": Command("run the notebooks", (f"{PYTEST} --nbmake notebooks",), TEST_ENV),
    "fuzz": Command(
        "run the property tests on many more examples",
        (f"{PYTEST} -m hypothesis",),
        {**TEST_ENV, "HYPOTHESIS_PROFILE": "fuzz"},
    ),
    "test-triton": Command(
        "run the tests of the Triton kernels, in Triton's interpreter",
        (f"{PYTEST} tests/on_triton",),
        {**TEST_ENV, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BESIDE)},
        beside=TRITON,
    ),
}


def main(name: str = "help", *arguments: str) -> int:
    """Run one command and return its exit status."""
    if name == "setup":
        setup("dev")
    elif name == "clean":
        clean()
    elif name in COMMANDS:
        return run(COMMANDS[name], arguments)
    elif name in ("help", "-h", "--help"):
        print_help()
    else:
        sys.exit(f"There is no command {name!r}; these exist: help, setup, clean, {', '.join(COMMANDS)}")
    return 0


def run(command: Command, arguments: tuple[str, ...]) -> int:
    """Run the steps of a command; the first status that is not 0 ends it."""
    for extra in command.extras:
        setup(extra)
    if command.beside:
        setup_beside(command.beside)
    env = {**os.environ, **command.env, "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")])}
    for number, step in enumerate(command.steps, start=1):
        program, *rest = shlex.split(step)
        if number == len(command.steps):
            rest += arguments
        print(f"$ {shlex.join([program, *rest])}", flush=True)
        status = subprocess.run([BIN / program, *rest], cwd=ROOT, env=env, check=False).returncode
        if status:
            return status
    return 0


def setup(extra: str) -> None:
    """Install an extra of pyproject.toml into `.venv`, unless its stamp says that this was done.

    The stamp is written last and holds a digest of what was asked for, so that an interrupted installation is
    repeated.
    """
    if sys.version_info < OLDEST_PYTHON:
        oldest, this = (".".join(map(str, version[:2])) for version in (OLDEST_PYTHON, sys.version_info))
        sys.exit(
            f"structops needs Python {oldest} or newer, and {sys.executable} is Python {this}.\n"
            "Name a newer one, for example: make test PYTHON=python3.12, or: python3.12 dev.py test"
        )
    import tomllib  # only now: an older Python has no such module

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [pyproject["build-system"], pyproject["project"], CONSTRAINTS.read_text(encoding="utf-8")]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    stamp = VENV / f".stamp-{extra}"

    usable = is_usable()
    if usable and stamp.exists() and stamp.read_text() == digest:
        return
    start = time.monotonic()
    if not usable:
        build()
    stamp.unlink(missing_ok=True)
    # Only dev installs structops itself: to do so again for the docs would disturb tests that run meanwhile.
    dependencies = pyproject["project"]["optional-dependencies"][extra]
    packages = ["-e", ".[dev]"] if extra == "dev" else dependencies
    print(f"Installing the {extra} packages; the first time takes a minute or more", flush=True)
    install("-c", str(CONSTRAINTS), *packages)
    stamp.write_text(digest)
    print(f"Done in {time.monotonic() - start:.0f} s", flush=True)


def setup_beside(package: str) -> None:
    """Install a package, and nothing else, into `BESIDE`, unless its stamp says that this was done."""
    wanted = "{} for Python {}.{}".format(package, *sys.version_info)
    stamp = BESIDE / ".stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(BESIDE, ignore_errors=True)
    print(f"Installing {package} into {BESIDE.name}, 0.9 GB", flush=True)
    install("--no-deps", "--target", str(BESIDE), package)
    stamp.write_text(wanted)


def install(*arguments: str) -> None:
    """Run pip of `.venv`."""
    pip = [str(BIN / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # a person wants to see progress, a log does not
    further = shlex.split(os.environ.get("PIP_ARGS", ""))
    subprocess.run([*pip, *quiet, *further, *arguments], cwd=ROOT, check=True)


def is_usable() -> bool:
    """Whether `.venv` is whole, was made for this folder and Python version, and its Python finds pip."""
    try:
        lines = (VENV / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        subprocess.run([BIN / "python", "-I", "-c", "import pip"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    same_version = any(line.startswith("version = {}.{}.".format(*sys.version_info)) for line in lines)
    same_folder = any(line.endswith(f" {VENV}") for line in lines)
    return same_version and same_folder


def build() -> None:
    """Make an empty `.venv`, in place of any older one."""
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        sys.exit(
            f"{sys.executable} cannot make virtual environments: its module venv or ensurepip is missing.\n"
            "On Debian and Ubuntu: sudo apt install python3-venv"
        )
    print("Building .venv for Python {}.{}.{}".format(*sys.version_info), flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)


def clean() -> None:
    """Remove what the commands created, `.venv` included."""
    for pattern in CREATED.split():
        for path in list(ROOT.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def print_help() -> None:
    """List the commands."""
    print("Use: make COMMAND [ARGS=...]   or   python dev.py COMMAND [...]\n")
    helps = {name: command.help for name, command in COMMANDS.items()}
    helps["setup"] = "build or update .venv (make .venv); every command above does so by itself"
    helps["clean"] = "remove everything that these commands created, .venv included"
    for name, text in helps.items():
        print(f"  {name:<11} {text}")


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"Failed with status {error.returncode}: {shlex.join(map(str, error.cmd))}")
    except KeyboardInterrupt:
        sys.exit(130)
