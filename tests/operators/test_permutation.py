"""Permutations: what is one, which way it goes, and what dtype has."""

from __future__ import annotations

import numpy as np
import pytest

import structops as so
from structops import _cola
from structops.testing import to_backend, to_numpy
from structops.testing.arrays import dtype_of


def test_it_gathers(backend: str) -> None:
    perm, x = np.array([2, 0, 3, 1]), np.array([10.0, 20.0, 30.0, 40.0])
    P = so.Permutation(to_backend(perm, backend))
    assert np.array_equal(to_numpy(P @ to_backend(x, backend)), x[perm])
    assert np.array_equal(to_numpy(P.T @ to_backend(x[perm], backend)), x)
    assert P.isa(_cola.Unitary)
    assert P.T.isa(_cola.Unitary)


@pytest.mark.parametrize("perm", [[0, 0, 1], [0, 1, 3], [-1, 0, 1], [1, 2, 3]])
def test_what_is_no_permutation(perm: list[int], backend: str) -> None:
    with pytest.raises(so.ShapeError, match=r"each of 0 \.\.\. 2 once"):
        so.Permutation(to_backend(np.array(perm), backend))


@pytest.mark.parametrize("array", [np.array([0.0, 1.0]), np.array([False, True]), np.array([0j, 1])])
def test_what_is_no_index(array: np.ndarray, backend: str) -> None:
    with pytest.raises(so.BackendError, match="integers"):
        so.Permutation(to_backend(array, backend))


def test_the_dtype_is_the_default_or_the_one_that_is_given(backend: str) -> None:
    perm = to_backend(np.arange(3), backend)
    default = dtype_of(backend, "float32" if backend == "torch" else "float64")  # the tests run JAX with x64
    assert so.Permutation(perm).dtype == default
    half = so.Permutation(perm, dtype=dtype_of(backend, "bfloat16"))
    assert half.dtype == half.T.dtype == half.H.dtype == half.to_dense().dtype == dtype_of(backend, "bfloat16")
    assert half.perm.dtype == perm.dtype


def test_there_is_nothing_to_train(backend: str) -> None:
    P = so.Permutation(to_backend(np.arange(3), backend))
    assert (so.num_params(P), so.macs(P), so.factors(P)) == (0, 0, ())
