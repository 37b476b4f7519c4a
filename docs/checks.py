"""What the build refuses: public names without a page, and links that lead nowhere.  Plain Python, without mkdocs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = Path(__file__).resolve().parent.parent / "structops"
SCHEMES = ("http", "https", "mailto")


# -------------------------------------------------------------------------------------------------------- public names


def public_names(package: Path = PACKAGE) -> dict[str, str]:
    """What users import, as ``structops.torch.plan``, with where it is defined, as ``structops.torch.weights.plan``.

    A name is public where a package imports it as itself, ``from x import y as y``; this is read from the files, so
    that no library has to be there.  Modules are left out.
    """
    found = {}
    for file in sorted(package.rglob("__init__.py*")):
        if "__pycache__" in file.parts or (file.suffix == ".py" and file.with_suffix(".pyi").exists()):
            continue
        here = ".".join((package.name, *file.parent.relative_to(package).parts))
        for name, source in _imports(file, here, renamed=True).items():
            if not name.startswith("_"):
                found[f"{here}.{name}"] = _definition(source, package)
    return {name: source for name, source in found.items() if _file(source, package) is None}


def _imports(file: Path, here: str, renamed: bool) -> dict[str, str]:
    """The names that a file imports, with their sources; with ``renamed`` only those of the form ``y as y``."""
    found = {}
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom):
            above = here.rsplit(".", statement.level - 1)[0] if statement.level else ""
            source = ".".join(filter(None, (above, statement.module)))
            for alias in statement.names:
                if alias.asname == alias.name or not renamed:
                    found[alias.asname or alias.name] = f"{source}.{alias.name}"
    return found


def _file(module: str, package: Path) -> Path | None:
    """The file of a module, or None if that is no module of the package."""
    path = package.parent / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _definition(name: str, package: Path) -> str:
    """Where a name is defined, which may be behind several imports."""
    module, _, attribute = name.rpartition(".")
    file = _file(module, package)
    if file is None or _file(name, package) is not None:
        return name
    here = module if file.name == "__init__.py" else module.rpartition(".")[0]
    source = _imports(file, here, renamed=False).get(attribute)
    return name if source is None else _definition(source, package)


def undocumented(pages: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """The public names for which no page has a line ``::: module.name`` or, for all of a module, ``::: module``."""
    lines = {line for page in pages for line in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    return [name for name, source in names.items() if not {source, source.rpartition(".")[0]} & lines]


# --------------------------------------------------------------------------------------------------------------- links


class _Page(HTMLParser):
    """The targets of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value or "")
            elif name in ("href", "src") and value is not None:
                self.links.append(value)


def broken_links(site: Path) -> Iterator[str]:
    """Every link of the built pages that leads nowhere: a missing file or anchor, or an address that is none.

    Addresses outside are only looked at, never opened.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        root = site if path.name == "404.html" else path.parent  # served for any address, so its links begin with /
        for link in dict.fromkeys(page.links):
            if problem := _problem(link, path, root, site, pages):
                yield f"{path.relative_to(site)}: {link}: {problem}"


def _problem(link: str, path: Path, root: Path, site: Path, pages: Mapping[Path, _Page]) -> str:
    """What is wrong with a link, or nothing."""
    try:
        parts = urlsplit(link)
    except ValueError as error:
        return str(error)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        good = parts.scheme in SCHEMES and (parts.scheme == "mailto" or "." in parts.netloc) and " " not in link
        return "" if good else "no address"
    target = path
    if parts.path:
        within = unquote(parts.path)
        target = (site / within.lstrip("/") if within.startswith("/") else root / within).resolve()
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            return "no such file"
    if parts.fragment and target in pages:
        known = pages[target].ids
        return "" if {parts.fragment, unquote(parts.fragment)} & known else "no such place on the page"
    return ""
