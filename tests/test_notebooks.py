"""Every notebook runs from top to bottom, on each library that it offers, and is stored with the outputs of a run.

A notebook offers both libraries if a cell chooses one, else it is for torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat, of the extra dev, is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, of the extra dev, is not installed")

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CHOICE = re.compile(r'^BACKEND = "\w+"', re.MULTILINE)

pytestmark = pytest.mark.notebook


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # most of the time in JAX is compiling
    notebook = read(path)
    choices = [cell for cell in code_cells(notebook) if CHOICE.search(cell.source)]
    assert len(choices) <= 1, "one cell chooses the library"
    if not choices and backend != "torch":
        pytest.skip("the notebook is for torch")
    for cell in choices:
        cell.source = CHOICE.sub(f'BACKEND = "{backend}"', cell.source)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(path.parent))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_one_clean_run(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any(output.output_type == "display_data" for output in outputs), "it has pictures"
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_number_is_in_the_title_and_it_ends_with_things_to_try(path: Path) -> None:
    first, *_, last = read(path).cells
    assert first.source.startswith(f"# {int(path.stem.split('_')[0])} · ")
    assert last.source.startswith("## What to try")


def test_they_are_numbered_without_gaps() -> None:
    assert [int(path.stem.split("_")[0]) for path in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))
