"""Pages, tables and pictures that are made from the code when the site is built; plain text, without mkdocs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pictures
import speed_tables
import study_tables

import structops as so
from structops.algebra.closure import LINALG, ROWS, UNARY, closure
from structops.errors import StructureError
from structops.spec import REGISTRY, ChainPlan, Plan, Structure
from structops.studies.algebra import COST_COLUMNS, Growth, Library, cost_cells
from structops.studies.closure import LAZY, cells, found, lazy, short

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((256, 256), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))  # (in, out)

# Reading order in the navigation; a structure that is not listed comes last.
ORDER = (
    *("Dense", "LowRank", "Kron", "TT", "BTT", "Monarch", "BlockDiag", "BLAST", "Einsum"),
    *("Circulant", "Toeplitz", "Convolution", "Permutation", "Diagonal"),
)

# What the pictures of a page show, as specs at 16 x 16; by default the structure with its default arguments.
SHOWN = {
    "low_rank": ("low_rank(rank=3)",),
    "tt": ("tt(rank=2)",),
    "btt": ("btt", "btt(rank=2)", "btt(num_cores=4)"),
    "monarch": ("monarch(blocks=4)", "monarch(blocks=2)"),
    "blast": ("blast(rank=4)",),
    "convolution": ("convolution", "convolution(spatial_shape=(4, 4))"),
}

# What the table of sizes compares; by default the structure with its default arguments.
COUNTED = {
    "low_rank": ("low_rank", "low_rank(params=0.25)"),
    "kron": ("kron", "kron(num_factors=3)"),
    "tt": ("tt", "tt(rank=16)", "tt(rank=2, num_cores=3)"),
    "btt": ("btt", "btt(rank=4)", "btt(blocks=8, rank=16)", "btt(rank=2, num_cores=3)"),
    "monarch": ("monarch", "monarch(blocks=4)"),
    "block_diag": ("block_diag", "block_diag(blocks=16)"),
    "blast": ("blast", "blast(params=0.25)"),
    "convolution": ("convolution", "convolution(kernel_size=9)"),
}


# --------------------------------------------------------------------------------------------------------------- pages


def structures() -> dict[str, type]:
    """Every operator class in reading order."""
    known = [name for name in ORDER if name in so.OPERATORS]
    return {name: so.OPERATORS[name] for name in [*known, *(n for n in so.OPERATORS if n not in known)]}


def spec_of(operator: type) -> type[Structure] | None:
    """The spec in the same file as an operator; permutations and diagonals have none."""
    return next((spec for spec in REGISTRY.values() if spec.__module__ == operator.__module__), None)


def page_of(name: str) -> str:
    """Path of a structure's page: the name of its file."""
    return f"structures/{so.OPERATORS[name].__module__.rpartition('.')[2]}.md"


def generated() -> dict[str, str]:
    """Paths below docs/ and contents of all pages that are made from other files."""
    pages = {
        "index.md": _relocated("README.md"),
        "contributing.md": _relocated("CONTRIBUTING.md"),
        "changelog.md": _relocated("CHANGELOG.md"),
        "LICENSE.txt": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        "structures/index.md": structure_index(),
    }
    return pages | {page_of(name): structure_page(name) for name in structures()}


def _relocated(name: str) -> str:
    """A file of the root as a page: links to files of the repository become links to pages."""
    content = (ROOT / name).read_text(encoding="utf-8")
    content = re.sub(r"\]\(docs/", "](", content)
    for file, page in (
        ("README.md", "index.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("CHANGELOG.md", "changelog.md"),
        ("LICENSE", "LICENSE.txt"),
    ):
        content = content.replace(f"]({file}", f"]({page}")
    return content


def notebook_links(html: str) -> str:
    """The links of a notebook, to other notebooks and to ../docs, as links between pages of the site."""
    html = re.sub(r'href="(?:\.\./docs/)([\w/]+)\.md', r'href="../\1.html', html)
    html = re.sub(r'href="\.\./(CONTRIBUTING|CHANGELOG)\.md', lambda found: f'href="../{found[1].lower()}.html', html)
    return re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', html)


def structure_page(name: str) -> str:
    """One structure: pictures, the docstring, the spec and its arguments, counts and scales."""
    operator = so.OPERATORS[name]
    spec = spec_of(operator)
    parts = [f"# {name}", summary(inspect.getmodule(operator))]
    parts += [picture for k, text in enumerate(shown(operator)) for picture in drawings(text, explain=not k)]
    parts += [f"## `so.{constructor(operator)}`", _directive(operator, members=_attributes(operator))]
    if spec is None:
        parts += ["## Spec", "There is none: no layer is made of this operator alone."]
        return "\n\n".join(parts) + "\n"
    texts = COUNTED.get(spec.name, (spec.name,))
    parts += [
        "## Spec",
        f"What `so.structure`, `so.random` and the layers take: `{signature(spec)}`.",
        _prose(spec),
        argument_table(spec),
        "## Sizes",
        "Parameters and multiply-accumulates (MACs) per vector, and their share of those of the dense matrix.",
        "*Between* is the number of values per vector that one factor hands to the next, *rank* the bound on the "
        "matrix rank that the sizes set."
        if isinstance(plan_of(shown(operator)[0], 16, 16), ChainPlan)
        else "",
        *(size_table(text) for text in texts),
        "## Projection",
        "What `structurize` and `so.projection.fit` know about the member that they find for a matrix; "
        "[how](../concepts/projection.md).",
        projection_table(shown(operator)),
        "## Training scales",
        "Standard deviation of the initial values, and the learning rate relative to the dense layer that is replaced, "
        "for Adam and its relatives; [what they mean](../concepts/mup.md).",
        *(scale_table(texts[0], *sizes) for sizes in ((1024, 1024), (1024, 4096)) if works(texts[0], *sizes)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def structure_index() -> str:
    """All structures: the table, and a small picture of each."""
    cards = []
    for name, operator in structures().items():
        picture = pictures.thumbnail(parts_of(shown(operator)[0]), name)
        link = page_of(name).removeprefix("structures/").replace(".md", ".html")
        cards.append(f'<a class="card" href="{link}">{picture}<span>{name}</span></a>')
    return "\n\n".join(
        (
            "# Structures",
            "Each picture is a 16 × 16 matrix, taken apart into its factors where it has any; the one on the right is "
            "applied first. Cells of one block, or of one parameter, share a colour.",
            f'<div class="cards">{"".join(cards)}</div>',
            "## One size side by side",
            "A square layer of 1,024 features with the default arguments of every spec.",
            comparison_table("1024", "1024"),
            "## Which contains which",
            "The following hold entry by entry: `Kron` is a `TT` of rank 1; "
            "every `TT` is a `BTT` of the same rank whose cores repeat over the blocks; `Monarch` with √d blocks is a "
            "`BTT` of rank 1, and with any b that divides its block height a `BTT` of a higher rank; `LowRank` and "
            "`Dense` are `BTT`s with modes of size 1; all of them are `Einsum`s. `Circulant` is the `Toeplitz` matrix "
            "and the circular `Convolution` whose diagonals wrap around.",
        )
    )


# --------------------------------------------------------------------------------------------------------------- parts


def summary(item: Any) -> str:
    """The first line of a docstring."""
    return inspect.getdoc(item).partition("\n")[0]


def sections(operator: type) -> dict[str, str]:
    """The parts of a docstring by their headings: ``Definition``, ``Cost``, ``Args``, ``Raises``, ``Example``, ..."""
    pattern = r"^(?:\*\*(\w+)\.\*\*|(\w+):$)"
    head, *pieces = re.split(pattern, inspect.getdoc(operator), flags=re.MULTILINE)
    titles = [bold or plain for bold, plain in zip(pieces[::3], pieces[1::3], strict=True)]
    return {"": head} | dict(zip(titles, map(str.strip, pieces[2::3]), strict=True))


def constructor(operator: type) -> str:
    """``BTT(cores)``: the class with the names of its arguments."""
    given = inspect.signature(operator.__init__).parameters.values()
    bare = (parameter.replace(annotation=inspect.Parameter.empty) for parameter in given if parameter.name != "self")
    return f"{operator.__name__}({', '.join(map(str, bare))})"


def _attributes(operator: type) -> list[str]:
    """Public attributes and constructors that the file of the structure itself defines."""
    own = vars(operator)
    kinds = (property, classmethod, staticmethod)
    hidden = {"shape", "textbook_shapes", "is_chain", "from_factors", "core_shapes", "dtype"}
    return [name for name in own if not name.startswith("_") and name not in hidden and isinstance(own[name], kinds)]


def _directive(item: Any, members: Iterable[str] = ()) -> str:
    """The documentation of a class as mkdocstrings renders it."""
    options = f"members: [{', '.join(members)}]" if members else "members: false"
    return (
        f"::: {item.__module__}.{item.__name__}\n    options:\n      heading_level: 3\n      {options}\n"
        "      inherited_members: false\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        "      show_bases: false"
    )


def signature(spec: type[Structure]) -> str:
    """``btt(rank=None, ...)``: the spec with its defaults."""
    arguments = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(spec))
    return f"{spec.name}({arguments})" if arguments else spec.name


def _prose(spec: type[Structure]) -> str:
    """What the docstring of a spec says beside its arguments, without the repeated signature."""
    head = re.split(r"^Args:", inspect.getdoc(spec), flags=re.MULTILINE)[0].strip()
    after_colon = re.sub(r"^``.*?``[^:;]*[:;]\s*", "", head, count=1)
    if after_colon == head or after_colon.startswith("see "):
        return ""
    return after_colon[0].upper() + after_colon[1:]


def argument_table(spec: type[Structure]) -> str:
    """The arguments of a spec with defaults and meanings, those of its base classes included."""
    meanings: dict[str, str] = {}
    for cls in reversed(spec.__mro__):
        if issubclass(cls, Structure) and "__doc__" in vars(cls):
            meanings |= _arguments(inspect.getdoc(cls))
    rows = [(f"`{f.name}`", f"`{f.default!r}`", meanings[f.name]) for f in dataclasses.fields(spec)]
    return table(("argument", "default", "meaning"), rows) if rows else ""


def _arguments(docstring: str) -> dict[str, str]:
    """Names and texts of the section ``Args:``."""
    _, found, rest = docstring.partition("Args:\n")
    if not found:
        return {}
    block = re.split(r"\n\n", rest, maxsplit=1)[0]
    items = re.findall(r"^ {4}\*{0,2}(\w+): (.*(?:\n {5,}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def plan_of(text: str, in_features: int, out_features: int) -> Plan:
    """A spec at a size; its warnings are for users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.StructureWarning)
        return so.structure(text).plan(in_features, out_features)


def works(text: str, in_features: int, out_features: int) -> bool:
    """Whether a spec can have these sizes."""
    try:
        plan_of(text, in_features, out_features)
    except StructureError:
        return False
    return True


def size_table(text: str) -> str:
    """Counts of one spec at several sizes."""
    rows = []
    for in_features, out_features in SIZES:
        if not works(text, in_features, out_features):
            continue
        plan = plan_of(text, in_features, out_features)
        dense = in_features * out_features
        chain = plan.chain if isinstance(plan, ChainPlan) else None
        rows.append(
            (
                f"{in_features:,} → {out_features:,}",
                f"{plan.num_params:,}",
                share(plan.num_params, dense),
                f"{plan.macs:,}",
                share(plan.macs, dense),
                " → ".join(f"{width:,}" for width in chain.intermediate_widths) if chain else "",
                f"{chain.rank_bound:,}" if chain else "",
            )
        )
    head = ("in → out", "parameters", "share", "MACs", "share", "between", "rank")
    keep = [k for k in range(len(head)) if any(row[k] for row in rows)]
    return f"`{text}`\n\n" + table([head[k] for k in keep], [[row[k] for k in keep] for row in rows], "lr" + "r" * 5)


def share(part: int, whole: int) -> str:
    """A percentage with three significant digits."""
    percentage = 100 * part / whole
    return f"{percentage:.3g} %" if percentage >= 0.001 else "< 0.001 %"


def projection_table(texts: Iterable[str]) -> str:
    """How near the projection onto each of some specs comes, found by projecting a small matrix."""
    import torch

    W = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = []
    for text in texts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", so.StructureWarning)
            fit = so.projection.fit(W, text)
        rows.append((f"`{text}`", fit.optimality, fit.reason))
    return table(("spec", "optimum", "why"), rows)


def scale_table(text: str, *sizes: str | int) -> str:
    """Init and learning-rate scales of one spec at one size."""
    in_features, out_features = map(int, sizes)
    rows = [
        (
            f"`{row.factor.name}`",
            f"{row.factor.blocks:,}",
            f"{row.factor.fan_in:,}",
            f"{row.factor.fan_out:,}",
            f"{row.factor.sharing:,}",
            f"{row.init_std:.4g}",
            f"{row.lr_scale:.4g}",
        )
        for row in so.mup.scales(plan_of(text, in_features, out_features))
    ]
    head = ("factor", "blocks", "fan-in", "fan-out", "sharing", "init std", "learning rate ×")
    return f"`{text}`, {in_features:,} → {out_features:,}\n\n" + table(head, rows, "l" + "r" * 6)


def comparison_table(*sizes: str | int) -> str:
    """All structures at one size, with their default arguments."""
    in_features, out_features = map(int, sizes)
    rows = []
    for name, operator in structures().items():
        spec = spec_of(operator)
        if spec is None or not works(spec.name, in_features, out_features):
            continue
        plan, dense = plan_of(spec.name, in_features, out_features), in_features * out_features
        page = page_of(name).removeprefix("structures/")
        rows.append(
            (
                f"[{name}]({page})",
                f"`{spec.name}`",
                f"{plan.num_params:,}",
                share(plan.num_params, dense),
                f"{plan.macs:,}",
                share(plan.macs, dense),
                reuse(plan),
            )
        )
    return table(
        ("operator", "spec", "parameters", "share", "MACs", "share", "a parameter is used"), rows, "ll" + "r" * 5
    )


def reuse(plan: Plan) -> str:
    """How often a parameter is used per vector."""
    times = {factor.sharing for factor in plan.factors}
    return "once" if times == {1} else " or ".join(f"{t:,} times" for t in sorted(times))


def scales_overview() -> str:
    """The learning-rate multiples of common shapes, structure by structure."""
    shapes = ((1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
    specs = (
        "dense",
        "low_rank",
        "kron",
        "monarch(blocks=4)",
        "monarch",
        "tt(rank=16)",
        "btt",
        "btt(rank=4)",
        "btt(blocks=8, rank=16)",
    )
    rows = []
    for text in specs:
        row = [f"`{text}`"]
        for shape in shapes:
            scales = so.mup.scales(plan_of(text, *shape))
            row.append("<br>".join(f"{scale.init_std:.3g} · {scale.lr_scale:.3g}×" for scale in scales))
        rows.append(row)
    return table(("spec", *(f"{i:,} → {o:,}" for i, o in shapes)), rows, "lrrrr")


def closure_table(verb: str = "") -> str:
    """What a verb makes of which structures: of two with abbreviations, without a verb all verbs of one."""
    if not verb:
        rows = [(f"`{name}`", *(f"`{closure(verb, name)}`" for verb in UNARY)) for name in ROWS]
        names = (f"`A.{verb}`" if verb.isalpha() else f"`{verb} A`" for verb in UNARY)
        return table(("A", *names), rows)
    key = ", ".join(f"{short(name)} `{name}`" for name in ROWS)
    rows = [(f"`{name}`", *cells(verb, name)) for name in ROWS]
    return table(("A, B", *map(short, ROWS)), rows) + f"\n\n{LAZY} a lazy `{lazy(verb)}`; {key}."


def linalg_table() -> str:
    """What linear algebra finds in the structure of one operator."""
    rows = [(f"`{name}`", *(found(verb, name) for verb in LINALG)) for name in ROWS]
    return table(("A", *(f"`{verb}`" for verb in LINALG)), rows)


def costs_table() -> str:
    """The measured growth of all verbs, from the numbers that ``structops algebra --costs --out`` wrote."""
    data = json.loads((ROOT / "docs" / "assets" / "algebra" / "costs.json").read_text(encoding="utf-8"))
    rows = [cost_cells(Growth(**row)) for row in data["rows"]]
    cells = [(f"`{verb}`", f"`{operands}`", *rest) for verb, operands, *rest in rows]
    where, library = data["machine"], data["backend"]
    words = (
        f"Measured with {library} {where['versions'][library]} in float32 on {Library(library).threads} of "
        f"a {where['machine']} machine with {where['cores']} cores that others used, too."
    )
    return table(COST_COLUMNS, cells, "llrrlr") + f"\n\n{words}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    """A Markdown table; ``align`` has an l or r a column."""
    head = list(head)
    marks = [{"r": "---:"}.get(side, "---") for side in align.ljust(len(head), "l")[: len(head)]]
    lines = [head, marks, *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------------------ pictures


def shown(operator: type) -> tuple[str, ...]:
    """What the page of a structure draws: specs, or the name of an operator without one."""
    spec = spec_of(operator)
    return (operator.__name__,) if spec is None else SHOWN.get(spec.name, (spec.name,))


def drawings(text: str, explain: bool = True) -> list[str]:
    """The pictures of one spec at 16 x 16: its factors as matrices and, for a chain, as wires."""
    if text in so.OPERATORS:
        return [figure(pictures.equation([matrix_of(text)], text), f"A {text.lower()} matrix of 16 features.")]
    plan = plan_of(text, 16, 16)
    if not isinstance(plan, ChainPlan):
        words = f"`{text}` at 16 × 16. Cells of one colour hold the same parameter."
        return [figure(pictures.equation([matrix_of(text)], text), words)]
    return chain_drawings(plan.chain, f"`{text}` at 16 × 16", explain)


def chain_drawings(chain: so.Chain, title: str, explain: bool = True) -> list[str]:
    """The pictures of a chain: its factors as matrices, and as wires."""
    factors, wires = title, f"The chain `{chain.pattern}`"
    if explain:
        factors += (
            ". The factor on the right is applied first. A colour is a block of parameters; a block that is used again "
            "shows the same colour again."
        )
        wires += (
            ", from left to right. At a factor, labels that end are contracted, labels that begin are emitted, labels "
            "with dots are its blocks, and labels that pass without dots share it."
        )
    return [
        figure(pictures.equation(_factorised(chain), f"the factors of {chain.pattern}"), factors),
        figure(pictures.wires(chain), wires),
    ]


def parts_of(text: str) -> list[pictures.Matrix]:
    """The factors of a spec at 16 x 16, the last applied first, or its matrix where it has none."""
    plan = None if text in so.OPERATORS else plan_of(text, 16, 16)
    if isinstance(plan, ChainPlan):
        return pictures.factor_matrices(plan.chain)[::-1]
    return [matrix_of(text)]


def _factorised(chain: so.Chain) -> list[pictures.Matrix]:
    matrices = pictures.factor_matrices(chain)
    return [pictures.product(matrices, *chain.shape), *reversed(matrices)]


def matrix_of(text: str) -> pictures.Matrix:
    """One matrix of a structure: its entries, or where they are parameters themselves, which parameter."""
    import torch

    if text in so.OPERATORS:
        numbers = {"Permutation": [(5 * i + 3) % 16 for i in range(16)], "Diagonal": range(1, 17)}[text]
        dense = so.OPERATORS[text](torch.tensor(list(numbers))).to_dense().int()
        return pictures.from_indices(dense.tolist(), int(dense.max()))
    plan = plan_of(text, 16, 16)
    if isinstance(plan, ChainPlan):
        return _factorised(plan.chain)[0]
    numbers, start = [], 1
    for shape in plan.stored_shapes:
        count = int(torch.tensor(shape).prod())
        numbers.append(torch.arange(start, start + count, dtype=torch.float64).reshape(shape))
        start += count
    return pictures.from_indices(plan.operator(numbers).to_dense().round().int().tolist(), start - 1)


def figure(svg: str, caption: str) -> str:
    """A picture with a caption, as one block of HTML."""
    words = re.sub(r"`([^`]*)`", r"<code>\1</code>", caption)
    return f"<figure>{svg}<figcaption>{words}</figcaption></figure>"


def _example(pattern: str) -> so.Chain:
    """A pattern with all sizes 4 but for the rank s, which is 2."""
    return so.Chain(pattern, {label: 2 if label == "s" else 4 for label in pattern if label.isalpha()})


# What a line ``<!-- name: argument; argument -->`` of a page is replaced by.
INSERTS: dict[str, Callable[..., str]] = {
    "scales": scale_table,
    "scales_overview": scales_overview,
    "sizes": size_table,
    "comparison": comparison_table,
    "closure": closure_table,
    "linalg": linalg_table,
    "costs": costs_table,
    "factors": lambda pattern, explain="": chain_drawings(_example(pattern), f"`{pattern}`", bool(explain))[0],
    "wires": lambda pattern, explain="": chain_drawings(_example(pattern), f"`{pattern}`", bool(explain))[1],
    **speed_tables.inserts(table),
    **study_tables.inserts(),
}


def filled(markdown: str) -> str:
    """A page with every line ``<!-- scales: btt; 1024; 4096 -->`` replaced by what `INSERTS` makes of it.

    Raises:
        ValueError: A line asks for what `INSERTS` does not have.
    """

    def insert(match: re.Match[str]) -> str:
        name, arguments = match["name"], match["arguments"] or ""
        if name not in INSERTS:
            raise ValueError(f"no insert {name!r}; these exist: {', '.join(INSERTS)}")
        return INSERTS[name](*filter(None, arguments.split("; ")))

    return re.sub(r"^<!-- (?P<name>\w+)(?:: (?P<arguments>.*))? -->$", insert, markdown, flags=re.MULTILINE)
