"""What the house promises: which module may import which, what importing structops loads, and what it exports."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import structops as so
from structops.spec import registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "structops"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Imports run from a later line to an earlier one, or stay inside a package.
LAYERS = (
    {"errors"},
    {"pattern", "modes", "power_law", "einsum_family", "_array", "_files", "_plum"},
    {"program"},
    {"chain"},
    {"contract", "_implicit", "merging", "shards"},
    {"_repairs"},
    {"_cola"},
    {"spec", "operator"},
    {"chain_operator"},
    {"algebra"},
    {"operators"},
    {"projection", "mup"},
    {"sampling", "normalise", "routed", "_progress"},
    {"conversion"},
    {"torch", "jax"},
    {"report"},
    {"studies", "bench", "testing"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Where a library may be imported: in a package of its own, and above.
ABOVE = {"report", "studies", "bench", "testing", "doctor", "cli"}
ALLOWED = {
    "torch": {"torch"} | ABOVE,
    "triton": {"torch"},
    "jax": {"jax"} | ABOVE,
    "jaxlib": {"jax"} | ABOVE,
    "flax": {"jax"} | ABOVE,
    "optax": {"jax"} | ABOVE,
    "equinox": {"jax"} | ABOVE,
    "cola": {"_cola", "_repairs"},
    "plum": {"_plum", "_repairs", "doctor"},  # the doctor looks for the wrong one, which _plum refuses to import
    "matplotlib": ABOVE,
    "sklearn": ABOVE,
    "scipy": ABOVE,
    "typer": ABOVE,
    "rich": ABOVE | {"_progress"},
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # ``from structops import mup`` imports a module, ``from structops.mup import scales`` a name of one.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from ((arg.value, node.lineno) for arg in node.args if isinstance(arg, ast.Constant))


def part(path: Path) -> str:
    """The module or subpackage of structops that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent != PACKAGE or path.name != "__init__.py"], ids=ids
)
def test_imports_run_one_way(path):
    here = part(path)
    for name, line in imports(path):
        library, *rest = name.split(".")
        if library != "structops":
            assert here in ALLOWED.get(library, {here}), f"{path}:{line}: {here} may not import {library}"
            continue
        if rest[0] in ("__version__", here):
            continue
        assert rest[0] in RANK, f"{path}:{line}: {name} is no module of the house; a new one belongs in LAYERS"
        if (here, name) == ("spec", "structops.operators"):
            continue  # the registry: structures add themselves when their files are loaded, and spec sees that they are
        assert RANK[rest[0]] < RANK[here], f"{path}:{line}: {here} imports {rest[0]}, an arrow that runs back up"


def test_every_module_has_a_layer():
    assert {part(path) for path in MODULES} - {"__init__"} <= set(RANK)


def test_algebra_names_no_structure():
    for path in (PACKAGE / "algebra").glob("*.py"):
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert not names & set(so.OPERATORS), path


def test_the_chain_needs_nothing():
    """No arrays: only the standard library, and what is made of it."""
    heart = ("errors", "pattern", "program", "chain")
    for module in heart:
        for name, line in imports(PACKAGE / f"{module}.py"):
            ours = name.split(".")[1] in heart if name.startswith("structops.") else False
            assert ours or name.split(".")[0] in sys.stdlib_module_names | {"__future__"}, f"{module}.py:{line}"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text))


def test_the_house_is_complete():
    files = [
        *(
            "chain.py",
            "contract.py",
            "modes.py",
            "spec.py",
            "operator.py",
            "chain_operator.py",
            "sampling.py",
            "_plum.py",
            "_cola.py",
        ),
        *("cli.py", "doctor.py", "py.typed", "operators/__init__.py", "algebra/__init__.py", "mup/__init__.py"),
        *("torch/__init__.py", "jax/__init__.py", "studies/__init__.py", "testing/__init__.py"),
    ]
    around = [
        *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "dev.py", "pyproject.toml"),
        *("constraints.txt", "mkdocs.yml", ".ci/run", ".pre-commit-config.yaml", "docs", "notebooks"),
    ]
    missing = [name for name in files if not (PACKAGE / name).exists()]
    missing += [name for name in around if not (ROOT / name).exists()]
    assert not missing
    assert os.access(ROOT / ".ci/run", os.X_OK)


# --------------------------------------------------------------------------------------------------------- public names

PUBLIC = [
    *("Dense", "LowRank", "Kron", "TT", "BTT", "Monarch", "BlockDiag", "Circulant", "Toeplitz", "Convolution"),
    *("BLAST", "Einsum", "Permutation", "Diagonal", "Identity", "Zero"),
    *("kron", "num_params", "macs", "flops", "factors", "structure", "random", "mup"),
    *("Chain", "Factor", "Structure", "contract", "OPERATORS"),
    *("BackendError", "DensifyWarning", "PatternError", "ShapeError", "StructureError", "StructureWarning"),
]


def test_exports():
    assert [name for name in PUBLIC if not hasattr(so, name)] == []
    assert set(PUBLIC) <= set(so.__all__)
    assert set(PUBLIC) <= set(dir(so))
    assert [name for name in so.__all__ if not hasattr(so, name)] == []
    assert so.__version__
    assert callable(so.mup.scales)
    assert callable(so.contract)  # the function, not the module of that name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = so.nothing_like_this


@pytest.mark.parametrize("name", sorted(set(so.__all__) - {"OPERATORS"}))
def test_public_names_and_what_they_offer_are_documented(name):
    thing = getattr(so, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            is_public = not attribute.startswith("_") and (callable(value) or isinstance(value, property))
            if is_public and not inspect.isclass(value) and not isinstance(value, staticmethod):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


SECTIONS = (
    "**Definition.**",
    "Args:",
    "Raises:",
    "**Shapes.**",
    "**Cost.**",
    "**Numerics.**",
    "**References.**",
    "Example:",
)


@pytest.mark.parametrize("name", so.OPERATORS)
def test_every_structure_has_the_sections_of_a_docstring(name):
    doc = inspect.getdoc(so.OPERATORS[name]) or ""
    places = [doc.find(section) for section in SECTIONS]
    assert -1 not in places, [section for section in SECTIONS if section not in doc]
    assert ">>> " in doc[places[-1] :]


def test_every_spec_builds_an_operator_of_its_file():
    for name, spec in registry().items():
        assert (spec.__doc__ or "").startswith(f"``{name}")
        operators = [op for op in so.OPERATORS.values() if op.__module__ == spec.__module__]
        assert len(operators) == 1, name


# ------------------------------------------------------------------------------------------------------------ processes

BLOCK = """
import sys, warnings
warnings.simplefilter("error")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(*parts: str, blocked: tuple[str, ...] = ()) -> None:
    """Run a program in a process of its own, in which some libraries cannot be imported and warnings are errors."""
    code = "\n".join([BLOCK.format(blocked=set(blocked)), *map(textwrap.dedent, parts)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


def test_importing_structops_loads_only_what_it_needs():
    run("""
        import structops as so
        import structops.cli
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"torch", "jax", "cola", "matplotlib", "sklearn", "flax", "optax", "equinox"}, loaded
        chain = so.structure("btt").chain(16, 16)
        so.mup.scales(chain), so.Kron, so.random
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"matplotlib", "sklearn", "flax", "optax", "equinox"}, loaded
    """)


def test_whatever_name_is_used_first_the_rules_are_there():
    for first in ("so.Identity(2, like=one)", "so.Zero(2, 2, like=one)", "so.Diagonal(torch.ones(2))"):
        run(f"""
            import torch
            import structops as so
            one = torch.ones(())
            A = {first}
            assert type(A @ A) is type(A), A @ A
            assert type(A + A).__name__ == {"ScalarMul" if "Identity" in first else first[3:].split("(")[0]!r}, A + A
        """)


USE = """
    import structops as so
    for name in ("dense", "btt", "monarch(blocks=3)", "toeplitz", "convolution"):
        A = so.random(name, (16, 16), **seed)
        x = ones(16)
        close(A @ x, A.to_dense() @ x)
        close(x @ A, A.to_dense().T @ x)
        assert so.macs(A @ A.T) == 2 * so.macs(A), name
    A, B = so.Kron(ones((2, 3)), ones((4, 3))), so.LowRank(ones((8, 2)), ones((2, 9)))
    close((A + 2 * B) @ ones(9), 9 * ones(8) + 36 * ones(8))
    assert so.num_params(A + B) == 6 + 12 + 34
    plan = so.structure("btt(rank=2)").plan(16, 16)
    assert tuple(so.contract(plan.chain, [ones(s) for s in plan.stored_shapes], ones((3, 16))).shape) == (3, 16)
"""


def test_without_torch():
    run(
        """
        import jax, jax.numpy as jnp, numpy as np
        ones, seed = jnp.ones, {"key": jax.random.key(0)}
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
        """,
        USE,
        """
        from structops.jax import StructuredLinear
        try:
            import structops.torch
        except ImportError as error:
            assert "pip install 'structops[torch]'" in str(error), error
        else:
            raise AssertionError
        assert "torch" not in sys.modules
        """,
        blocked=("torch",),
    )


def test_without_jax():
    run(
        """
        import torch
        ones, seed = torch.ones, {"generator": torch.Generator().manual_seed(0)}
        close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        """,
        USE,
        """
        from structops.torch import StructuredLinear
        StructuredLinear(16, 16, "btt")(ones(16))
        try:
            import structops.jax
        except ImportError as error:
            assert "pip install 'structops[jax]'" in str(error), error
        else:
            raise AssertionError
        assert "jax" not in sys.modules
        """,
        blocked=("jax", "jaxlib", "flax", "optax", "equinox"),
    )
