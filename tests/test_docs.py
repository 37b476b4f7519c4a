"""The documentation: its code runs, every structure and public name is in it, and it builds where mkdocs is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest import mock

import markdown_examples
import pytest

import structops as so
from structops.algebra import closure
from structops.spec import REGISTRY
from structops.studies import algebra as study
from structops.studies import closure as tables

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if "assets" not in path.parts)
WITH_CODE = [path for path in WRITTEN if any(block.language == "python" for block in markdown_examples.blocks(path))]
SECTIONS = ("Definition", "Args", "Raises", "Shapes", "Cost", "Numerics", "References", "Example")

sys.path.insert(0, str(DOCS))
import checks  # noqa: E402
import pages  # noqa: E402
import pictures  # noqa: E402

# ------------------------------------------------------------------------------------------------------- written pages


@pytest.mark.torch
@pytest.mark.jax
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(path: Path) -> None:
    with mock.patch.dict(REGISTRY):  # a page may register a structure
        markdown_examples.run(path)


@pytest.mark.torch
def test_every_written_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.(?:md|ipynb)", navigation))
    made = {page for page in pages.generated() if page.endswith(".md")}
    made -= {pages.page_of(name) for name in so.OPERATORS}  # docs/hooks.py lists these
    written = {path.relative_to(DOCS).as_posix() for path in WRITTEN}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == written | made | notebooks


def test_inserts_are_known() -> None:
    for path in WRITTEN:
        filled = pages.filled(path.read_text(encoding="utf-8"))
        assert "<!--" not in filled


def test_an_unknown_insert_is_an_error() -> None:
    with pytest.raises(ValueError, match="no insert 'scale'; these exist: scales"):
        pages.filled("<!-- scale: btt -->")


def test_the_page_of_the_algebra_has_the_tables_of_the_code() -> None:
    page = pages.filled((DOCS / "concepts" / "algebra.md").read_text(encoding="utf-8"))
    for verb in closure.BINARY:
        for name in closure.ROWS:
            assert f"| `{name}` | " + " | ".join(tables.cells(verb, name)) + " |" in page
    for name in closure.ROWS:
        assert (
            f"| `{name}` | " + " | ".join(f"`{closure.closure(verb, name)}`" for verb in closure.UNARY) + " |" in page
        )


def test_the_measured_costs_are_those_of_the_cases() -> None:
    """After a change of the cases: ``structops algebra --costs --out docs/assets/algebra/costs.json``."""
    data = json.loads((DOCS / "assets" / "algebra" / "costs.json").read_text(encoding="utf-8"))
    measured = [(row["verb"], row["operands"], row["cost"]) for row in data["rows"]]
    assert measured == [(case.verb, case.label, case.cost) for case in study.CASES]


# ----------------------------------------------------------------------------------------------------- structure pages


@pytest.mark.torch
@pytest.mark.parametrize("name", so.OPERATORS)
def test_a_structure_has_a_page(name: str) -> None:
    page = pages.generated()[pages.page_of(name)]
    operator = so.OPERATORS[name]
    assert f"::: {operator.__module__}.{name}" in page
    assert "<svg" in page
    if spec := pages.spec_of(operator):
        assert f"`{spec.name}`" in page or f"`{spec.name}(" in page
        assert "| 1,024 → 1,024 |" in page
        assert re.search(r"^\| `.*` \| (exact|quasi|local) \| .+ \|$", page, re.MULTILINE)
        assert "## Training scales" in page


@pytest.mark.parametrize("name", so.OPERATORS)
def test_a_structure_has_all_sections_in_its_docstring(name: str) -> None:
    sections = pages.sections(so.OPERATORS[name])
    assert [section for section in SECTIONS if not sections.get(section)] == []


@pytest.mark.parametrize("name", so.OPERATORS)
def test_the_file_of_a_structure_says_what_it_is(name: str) -> None:
    assert pages.summary(sys.modules[so.OPERATORS[name].__module__]).endswith(".")


def test_every_argument_of_a_spec_has_a_meaning() -> None:
    for operator in so.OPERATORS.values():
        if spec := pages.spec_of(operator):
            assert "|  |" not in pages.argument_table(spec)


# ------------------------------------------------------------------------------------------------------------ pictures

DRAWN = [
    text
    for operator in so.OPERATORS.values()
    for text in pages.shown(operator)
    if text not in so.OPERATORS and isinstance(pages.plan_of(text, 16, 16), pages.ChainPlan)
]


@pytest.mark.parametrize("text", DRAWN)
def test_the_picture_of_a_factor_has_a_cell_for_every_multiplication(text: str) -> None:
    chain = pages.plan_of(text, 16, 16).chain
    matrices = pictures.factor_matrices(chain)
    for matrix, factor in zip(matrices, chain.factors, strict=True):
        assert len(matrix.cells) == factor.macs
        assert len({hue for hue, _ in matrix.cells.values()}) == factor.blocks
    widths = [matrix.cols for matrix in matrices] + [matrices[-1].rows]
    assert widths == [chain.padded_in, *chain.intermediate_widths, chain.padded_out]


@pytest.mark.torch
@pytest.mark.parametrize("text", DRAWN)
def test_the_picture_of_a_matrix_is_empty_where_the_matrix_is_zero(text: str) -> None:
    import torch

    matrices = pictures.factor_matrices(pages.plan_of(text, 16, 16).chain)
    drawn = set(pictures.product(matrices, 16, 16).cells)
    dense = so.random(text, (16, 16), generator=torch.Generator().manual_seed(0)).to_dense()
    assert drawn == {(i, j) for i, j in dense.nonzero().tolist()}


@pytest.mark.torch
def test_pictures_are_well_formed() -> None:
    texts = [text for operator in so.OPERATORS.values() for text in pages.shown(operator)]
    for picture in (part for text in texts for part in pages.drawings(text)):
        assert ET.fromstring(picture).find("figcaption") is not None
        assert "\n" not in picture, "Markdown ends a block of HTML at an empty line"


# ----------------------------------------------------------------------------------------------------------------- API


def test_every_documented_object_exists() -> None:
    names = [name for path in WRITTEN for name in re.findall(r"^::: (\S+)", path.read_text(encoding="utf-8"), re.M)]
    assert names
    for name in names:
        if name.split(".")[1] in ("torch", "jax") and importlib.util.find_spec(name.split(".")[1]) is None:
            continue
        module, _, attribute = name.rpartition(".")
        if name != "structops.errors":
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_public_name_has_a_page() -> None:
    names = checks.public_names()
    assert {"structops.BTT", "structops.torch.plan", "structops.jax.plan", "structops.mup.scales"} <= set(names)
    assert {"structops.projection.fit", "structops.testing.Case", "structops.torch.distributed.save"} <= set(names)
    assert names["structops.torch.plan"] == "structops.torch.weights.plan"
    assert names["structops.BTT"] == "structops.operators.btt.BTT"
    texts = [path.read_text(encoding="utf-8") for path in WRITTEN]
    texts += [f"::: {operator.__module__}.{name}" for name, operator in so.OPERATORS.items()]  # pages of their own
    assert checks.undocumented(texts, names) == []


def test_the_packages_export_what_the_check_of_names_reads() -> None:
    names = [name for name in checks.public_names() if name.count(".") == 1]
    assert {f"structops.{name}" for name in dir(so) if not isinstance(getattr(so, name), types.ModuleType)} >= set(
        names
    )


def test_a_public_name_without_a_page_is_found(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "__init__.py").write_text("from new.a import f as f\nfrom new.a import g as g\nimport os\n")
    (tmp_path / "new" / "a.py").write_text("from new.b import g\n\ndef f(): ...\n")
    (tmp_path / "new" / "b.py").write_text("def g(): ...\n")
    names = checks.public_names(tmp_path / "new")
    assert names == {"new.f": "new.a.f", "new.g": "new.b.g"}
    assert checks.undocumented(["# A\n\n::: new.a.f\n"], names) == ["new.g"]
    assert checks.undocumented(["::: new.a.f", "::: new.b"], names) == []


@pytest.mark.torch
@pytest.mark.jax
def test_the_page_of_backends_has_what_only_one_of_them_has() -> None:
    page = (DOCS / "concepts" / "backends.md").read_text(encoding="utf-8")
    _, torch_only, jax_only = re.split(r"^\| only in `structops\.\w+` .*$", page, flags=re.MULTILINE)
    names = {package: set(_exported(package)) for package in ("torch", "jax")}
    assert [name for name in sorted(names["torch"] - names["jax"]) if f"`{name}`" not in torch_only] == []
    assert [name for name in sorted(names["jax"] - names["torch"]) if f"`{name}`" not in jax_only] == []


def _exported(package: str) -> list[str]:
    prefix = f"structops.{package}."
    return [name.removeprefix(prefix) for name in checks.public_names() if re.fullmatch(rf"{prefix}\w+", name)]


# --------------------------------------------------------------------------------------------------------------- links


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    links = ("b.html", "b.html#here", "#top", "https://a.org/x", "data:image/png;base64,AA", "mailto:a@b.org")
    broken = ("c.html", "b.html#there", "sub/", "http://", "htp://a.org", "c.png")
    text = "".join(f'<a href="{link}"></a>' for link in (*links, *broken[:-1]))
    (tmp_path / "a.html").write_text(f'<p id="top">{text}<img src="{broken[-1]}"></p>')
    (tmp_path / "b.html").write_text('<p id="here"><a href="a.html"></a></p>')
    assert [line.split(": ")[1] for line in checks.broken_links(tmp_path)] == list(broken)


def test_links_of_notebooks_become_links_of_the_site() -> None:
    links = ("04_x.ipynb", "../docs/concepts/mup.md#rule", "../CONTRIBUTING.md", "https://a.org/b.md")
    there = ("04_x.html", "../concepts/mup.html#rule", "../contributing.html", "https://a.org/b.md")
    before, after = (" ".join(f'<a href="{link}">' for link in part) for part in (links, there))
    assert pages.notebook_links(before) == after


# -------------------------------------------------------------------------------------------------------- contributing


def test_files_that_contributors_are_pointed_to_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"`([\w./-]+\.(?:pyi?|md|toml|txt)|[\w/]+/)`", text)
    assert "structops/operators/blast.py" in files
    beside = ROOT / "structops" / "operators"
    assert [f for f in files if f != "site/" and not (ROOT / f).exists() and not (beside / f).exists()] == []


def test_commands_that_contributors_are_given_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"make (\w+)", text)) & set(re.findall(r"\w+", (ROOT / "dev.py").read_text()))
    assert {"test", "demo", "docs", "format"} <= commands
    assert set(re.findall(r"dev\.py (\w+)", text)) <= commands


def test_the_worked_example_is_done_as_the_checklist_says() -> None:
    lines = {
        "structops/operators/__init__.py": "import BLAST as BLAST",
        "structops/__init__.pyi": "import BLAST as BLAST",
        "structops/testing/references.py": '"BLAST": blast',
        "structops/testing/cases.py": '"BLAST": [',
        "README.md": "`BLAST`",
    }
    for file, line in lines.items():
        assert line in (ROOT / file).read_text(encoding="utf-8"), file


# --------------------------------------------------------------------------------------------------------------- build


def test_the_fonts_of_formulas_are_here() -> None:
    folder = DOCS / "assets" / "katex"
    fonts = re.findall(r"url\((fonts/[\w-]+\.woff2)\)", (folder / "katex.min.css").read_text(encoding="utf-8"))
    assert fonts
    assert [font for font in fonts if not (folder / font).is_file()] == []
    assert (folder / "LICENSE").is_file()


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is not installed; `make docs`")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    for page in tmp_path.rglob("*.html"):
        assert fetched.findall(page.read_text(encoding="utf-8")) == [], page.name
