"""Kron and BlockDiag hold operators, ours and CoLA's: what is asked of the whole is asked of every part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg

import structops as so
from structops import _cola
from structops.testing import assert_operator_valid, to_backend, to_numpy
from structops.testing.arrays import dtype_of, normal
from structops.testing.checks import (
    check_adjoint,
    check_dense,
    check_left_products,
    check_right_products,
    check_strided,
    dot_test,
)

CHECKS = (
    check_dense,
    check_right_products,
    check_left_products,
    check_strided,
    check_adjoint,
    dot_test,
)
WHOLES: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray]]] = {
    "Kron": (so.Kron, np.kron),
    "BlockDiag": (so.BlockDiag, scipy.linalg.block_diag),
}


def stock_operators(backend: str, dtype: str) -> dict[str, tuple[Any, np.ndarray]]:
    """Operators of CoLA, and their matrices."""
    rng = np.random.default_rng(0)
    A, B = (to_backend(normal(rng, shape, dtype), backend, dtype) for shape in ((2, 3), (3, 2)))
    d = to_backend(normal(rng, (3,), dtype), backend, dtype)
    dense, other = _cola.Dense(A), _cola.Dense(B)
    return {
        "Dense": (dense, to_numpy(A)),
        "Diagonal": (_cola.Diagonal(d), np.diag(to_numpy(d))),
        "Product": (_cola.Product(dense, other), to_numpy(A) @ to_numpy(B)),
        "Identity": (_cola.Identity((2, 2), dtype_of(backend, dtype)), np.eye(2)),
        "Transpose": (_cola.Diagonal(d).T, np.diag(to_numpy(d))),
    }


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("kind", stock_operators("torch", "float64"))
@pytest.mark.parametrize("whole", WHOLES)
def test_parts_from_cola(whole: str, kind: str, dtype: str) -> None:
    construct, reference = WHOLES[whole]
    part, M = stock_operators("torch", dtype)[kind]
    ours = so.LowRank(*(to_backend(normal(np.random.default_rng(k), (2, 2), dtype), "torch", dtype) for k in (1, 2)))
    N = to_numpy(ours.left) @ to_numpy(ours.right)
    for A, dense in ((construct(part, ours), reference(M, N)), (construct(ours, part), reference(N, M))):
        assert_operator_valid(A, dense, checks=CHECKS)
        assert so.num_params(A) == so.num_params(part) + so.num_params(ours)
        assert so.macs(A.T) > 0


@pytest.mark.parametrize("whole", WHOLES)
def test_the_dtype_is_that_of_the_parts(whole: str, backend: str) -> None:
    construct, _ = WHOLES[whole]
    double, single = dtype_of(backend, "float64"), dtype_of(backend, "float32")
    perm = to_backend(np.array([1, 0]), backend)
    P, D = so.Permutation(perm, dtype=double), so.Dense(to_backend(np.eye(2), backend, "float32"))
    assert construct(P, P).dtype == double  # not that of the indices
    assert construct(P, D).dtype == double
    assert construct(P, D).to(dtype=single).dtype == single
    assert construct(P, D).to(dtype=single).to_dense().dtype == single
    assert construct(_cola.Diagonal(to_backend(np.ones(2), backend, "float32")), D).to(dtype=double).dtype == double


@pytest.mark.parametrize("whole", WHOLES)
def test_indices_are_no_parameters(whole: str, backend: str) -> None:
    construct, _ = WHOLES[whole]
    P, D = so.Permutation(to_backend(np.arange(3), backend)), so.Dense(to_backend(np.eye(2), backend))
    assert so.num_params(construct(P, D)) == so.num_params(construct(P, D).T) == 4
    assert "; 4 params" in repr(construct(P, D))
    assert so.num_params(construct(D, D)) == 4  # the same array twice


@pytest.mark.parametrize("whole", WHOLES)
def test_there_must_be_an_array(whole: str, backend: str) -> None:
    construct, _ = WHOLES[whole]
    with pytest.raises(so.ShapeError, match="at least one array"):
        construct()
    with pytest.raises(so.ShapeError, match="at least one array"):
        construct(_cola.Identity((2, 2), dtype_of(backend, "float32")))
