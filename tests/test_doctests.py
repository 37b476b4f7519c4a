"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import structops

MODULES = sorted(module.name for module in pkgutil.walk_packages(structops.__path__, "structops."))
EXTRAS = ("torch", "jax", "flax", "optax", "equinox", "sklearn", "matplotlib", "scipy")


def examples(name: str) -> list[doctest.DocTest]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = [extra for extra in EXTRAS if importlib.util.find_spec(extra) is None]
        if not missing:
            raise
        pytest.skip(f"{name} needs an extra ({', '.join(missing)} missing): {error}")
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_of_docstrings(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        source = "".join(example.source for example in test.examples)
        for extra in EXTRAS:
            if f"{extra}." in source:
                pytest.importorskip(extra)
        output: list[str] = []
        runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)


def test_the_examples_were_found():
    """As many as there are structures, at the least."""
    found = [test.name for name in ("structops.chain", "structops.spec", "structops.modes") for test in examples(name)]
    assert found == ["structops.chain.Chain", "structops.spec.structure", "structops.modes.modes"]
