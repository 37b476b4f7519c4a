"""What the pages of the studies show of the results in docs/assets/studies, and the counts of the paper's models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from structops.studies.counts import counts_table

ASSETS = Path(__file__).resolve().parent / "assets" / "studies"


def inserts() -> dict[str, Callable[..., str]]:
    """What a page asks for by name."""
    return {"study": table, "study_facts": facts, "paper_counts": lambda: counts_table().to_markdown()}


def table(folder: str, name: str) -> str:
    """A table that a study wrote."""
    return (ASSETS / folder / f"{name}.md").read_text(encoding="utf-8")


def facts(folder: str) -> str:
    """The command of a study, what it took and where it ran."""
    data = json.loads((ASSETS / folder / "facts.json").read_text(encoding="utf-8"))
    where, count = data["machine"], f"{data['seconds of training']:,}"
    return (
        f"```bash\n{data['command']}\n```\n\n"
        f"{data['trainings']} trainings, {count} seconds of training, {data['at once']} at a time "
        f"with a thread each, on {data['cores']} {where['machine']} cores; torch {where['versions']['torch']}, Python "
        f"{where['python']}. All settings are in `docs/assets/studies/{folder}/config.yaml`, all results in "
        f"`results.jsonl` beside it.\n"
    )
