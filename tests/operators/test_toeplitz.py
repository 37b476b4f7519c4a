"""Toeplitz and circulant matrices: the head that is ignored, transposes, and the lengths of FFTs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import structops as so
from structops.operators.toeplitz import fast_length
from structops.testing import assert_close, to_backend, to_numpy


def test_the_head_of_the_row_is_ignored(backend: str) -> None:
    column, row = to_backend(np.array([1.0, 2.0, 3.0]), backend), to_backend(np.array([99.0, 5.0]), backend)
    A = so.Toeplitz(column, row)
    assert_close(A.to_dense(), [[1, 5], [2, 1], [3, 2]], scale=100)
    assert so.num_params(A) == 4


def test_columns_and_rows_of_a_transpose(backend: str) -> None:
    rng = np.random.default_rng(0)
    column, row = (to_backend(rng.standard_normal(n), backend) for n in (4, 3))
    for A in (so.Toeplitz(column, row), so.Toeplitz(column, row).T, so.Circulant(column), so.Circulant(column).T):
        assert_close(A.first_column, to_numpy(A.to_dense())[:, 0], scale=10)
        if isinstance(A, so.Toeplitz):
            expected = scipy.linalg.toeplitz(to_numpy(A.first_column), to_numpy(A.first_row))
            assert_close(A.to_dense(), expected, scale=10)


def test_fast_lengths_are_the_next_with_small_prime_factors() -> None:
    smooth = [n for n in range(1, 500) if 30**9 % n == 0]  # no prime factor above 5
    for n in range(1, 400):
        assert fast_length(n) == min(k for k in smooth if k >= n)


@pytest.mark.torch
def test_large_products_are_as_accurate_as_their_dtype() -> None:
    rng = np.random.default_rng(0)
    c, r, x = (rng.standard_normal(n) for n in (700, 500, 500))
    A = so.Toeplitz(*(to_backend(v, "torch", "float32") for v in (c, r)))
    M = scipy.linalg.toeplitz(*map(to_numpy, (A.column, A.row)))
    u = to_backend(x, "torch", "float32")
    assert_close(A @ u, M @ to_numpy(u), scale=float(np.linalg.norm(M, 2) * np.linalg.norm(x)) / 10)
