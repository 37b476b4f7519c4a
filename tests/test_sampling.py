"""`so.random`: operators with an explicit seed and the paper's standard deviations."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import numpy as np
import pytest

import structops as so
from structops.errors import BackendError, ShapeError, StructureError
from structops.mup import init_std
from structops.sampling import draw
from structops.spec import registry


def seed(backend: str, number: int = 0) -> dict[str, Any]:
    if backend == "torch":
        return {"generator": importlib.import_module("torch").Generator().manual_seed(number)}
    return {"key": importlib.import_module("jax").random.key(number)}


def values(operator: Any) -> list[np.ndarray]:
    return [np.asarray(array) for array in operator.arrays_flat()]


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_structure_can_be_drawn(backend, name):
    operator = so.random(name, (16, 16), **seed(backend))
    assert operator.shape == (16, 16)
    assert so.num_params(operator) == so.structure(name).plan(16, 16).num_params
    assert all(np.isfinite(array).all() for array in values(operator))
    assert np.abs(np.asarray(operator.to_dense())).max() > 0


def test_the_seed_decides(backend):
    first, again, other = (values(so.random("btt(rank=2)", (20, 12), **seed(backend, n))) for n in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.torch
def test_a_generator_goes_on_and_the_global_one_is_left_alone():
    torch = pytest.importorskip("torch")
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    first, second = (so.random("dense", (4, 4), generator=generator) for _ in range(2))
    assert not first.A.equal(second.A)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("spec", ["dense", "low_rank(rank=40)", "btt(rank=3)", "monarch(blocks=8)", "toeplitz"])
def test_factors_are_independent_and_gaussian_with_the_papers_std(backend, spec):
    plan = so.structure(spec).plan(900, 400)
    drawn = [np.asarray(array, dtype=np.float64).ravel() for array in draw(plan, **seed(backend))]
    for array, factor, shape in zip(drawn, plan.factors, plan.stored_shapes, strict=True):
        assert array.size == math.prod(shape)
        z, n = array / init_std(factor), array.size
        assert abs(z.mean()) < 5 / math.sqrt(n)
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
        assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for one, other in itertools.pairwise(drawn):
        n = min(one.size, other.size)
        assert abs(np.corrcoef(one[:n], other[:n])[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
def test_dtype_given_and_taken_from_an_array(backend, dtype):
    module = importlib.import_module("torch" if backend == "torch" else "jax.numpy")
    wanted = getattr(module, dtype)
    like = module.ones(3, dtype=wanted)
    for options in ({"dtype": wanted}, {"like": like}):
        operator = so.random("btt", (12, 10), **options, **seed(backend))
        assert operator.dtype == like.dtype
    other = so.random("btt", (12, 10), like=like, dtype=module.float32, **seed(backend))
    assert "float32" in str(other.dtype)
    if dtype == "complex64":
        assert np.abs(np.asarray(operator.to_dense()).imag).max() > 0


@pytest.mark.torch
def test_device_of_an_array():
    torch = pytest.importorskip("torch")
    like = torch.empty(2, device="meta", dtype=torch.float64)
    operator = so.random("btt", (12, 10), like=like, generator=torch.Generator().manual_seed(0))
    assert operator.arrays_flat()[0].dtype == torch.float64
    operator = so.random("btt", (12, 10), device="meta", generator=torch.Generator().manual_seed(0))
    assert operator.arrays_flat()[0].device.type == "meta"


@pytest.mark.jax
def test_under_jit_and_vmap():
    jax = pytest.importorskip("jax")

    def matrix(key):
        return so.random("btt(rank=2)", (12, 10), key=key).to_dense()

    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(jax.jit(matrix)(keys[0]), matrix(keys[0]), rtol=1e-5, atol=1e-6)
    assert jax.vmap(matrix)(keys).shape == (3, 12, 10)


def test_a_seed_must_be_given(backend):
    with pytest.raises(BackendError, match=r"generator=.*key="):
        so.random("dense", (4, 4))
    both = {**seed(backend), "generator" if backend == "jax" else "key": 0}
    with pytest.raises(BackendError, match=r"generator=.*key="):
        so.random("dense", (4, 4), **both)
    with pytest.raises(BackendError):
        so.random("dense", (4, 4), **{"generator" if backend == "torch" else "key": 0})


@pytest.mark.torch
@pytest.mark.jax
def test_like_of_the_other_library():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    for like, given in ((torch.ones(1), seed("jax")), (jnp.ones(1), seed("torch"))):
        with pytest.raises(BackendError, match=r"torch.*jax|jax.*torch"):
            so.random("dense", (4, 4), like=like, **given)


def test_shapes_that_cannot_be(backend):
    with pytest.raises(StructureError, match="btt"):
        so.random("btt(blocks=5)", (4, 4), **seed(backend))
    with pytest.raises(StructureError, match="out_features"):
        so.random("btt", (0, 4), **seed(backend))
    for wrong in ((4,), (4, 4, 4), 4):
        with pytest.raises(ShapeError, match="out_features, in_features"):
            so.random("btt", wrong, **seed(backend))
