"""The results of the studies in docs/assets/studies: they are whole, and tables, findings and trainings come again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from structops.studies.commands import STUDIES
from structops.studies.lab.config import read_config
from structops.studies.lab.store import Store

pytestmark = pytest.mark.torch
FOLDERS = sorted(
    path.parent for path in Path(__file__).resolve().parent.parent.glob("docs/assets/studies/*/config.yaml")
)


def read(folder: Path) -> tuple[Any, dict[Any, dict[str, Any]]]:
    """The study of a folder, and the results of all its trainings."""
    facts = json.loads((folder / "facts.json").read_text())
    (kind,) = (study for study in STUDIES if study.name == facts["study"])
    study: Any = read_config(kind, folder / "config.yaml")
    if study.facts().get("sha256") != facts["data"].get("sha256"):
        pytest.skip("the text of this Python is another one")
    store = Store(folder)
    results = {run: store.get(run) for run in study.runs()}
    assert None not in results.values()
    return study, results  # type: ignore[return-value]


def test_every_study_has_results() -> None:
    names = [json.loads((folder / "facts.json").read_text())["study"] for folder in FOLDERS]
    assert set(names) == {study.name for study in STUDIES}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_and_findings_come_again(folder: Path) -> None:
    study, results = read(folder)
    report = study.report(results)
    for name, table in {**report.tables, "findings": report.finding_table}.items():
        assert (folder / f"{name}.md").read_text(encoding="utf-8") == table.to_markdown(), name
    for name in report.figures:
        assert {(folder / f"{name}.{kind}").exists() for kind in ("svg", "png")} == {True}


@pytest.mark.parametrize("name", ["mlp", "tables"])
def test_a_training_comes_again(name: str) -> None:
    """On another processor sums round differently, so that not all digits agree."""
    from structops.studies.trainer import Job, train

    (folder,) = (folder for folder in FOLDERS if folder.name == name)
    _, results = read(folder)
    run, kept = min(results.items(), key=lambda pair: pair[1]["seconds"])
    again = train(Job(run))
    assert (again["macs"], again["num_params"], again["steps"]) == (kept["macs"], kept["num_params"], kept["steps"])
    assert math.isclose(again["train_loss"], kept["train_loss"], rel_tol=0.05)
    assert abs(again["test_error"] - kept["test_error"]) < 0.02
