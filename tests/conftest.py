"""What all tests share: hypothesis profiles, JAX in double precision, and skips where a library is missing."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest

BACKENDS = {"torch": "PyTorch", "jax": "JAX"}
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in BACKENDS}

# `ci` repeats the same examples in every run; `fuzz` looks for new ones for as long as one likes.
hypothesis.settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if INSTALLED["jax"]:
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling tiny programs is most of what tests wait for
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a library that is not installed, and those that need an accelerator where there is none."""
    for item in items:
        for name, title in BACKENDS.items():
            if item.get_closest_marker(name) and not INSTALLED[name]:
                item.add_marker(pytest.mark.skip(reason=f"{title} is not installed"))
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def has_gpu() -> bool:
    """Whether PyTorch sees a CUDA device."""
    if not INSTALLED["torch"]:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each library in turn."""
    return request.param
