"""Kronecker products: chains of matrices, and not of operators."""

from __future__ import annotations

import numpy as np
import pytest

import structops as so
from structops import _cola
from structops.testing import to_backend, to_numpy

pytestmark = pytest.mark.torch


def matrix(*shape: int) -> object:
    return to_backend(np.random.default_rng(sum(shape)).standard_normal(shape), "torch")


def test_matrices_make_a_chain_and_operators_do_not() -> None:
    A, B = matrix(2, 3), matrix(4, 5)
    assert so.Kron(A, B).chain.pattern == "cd, bd, ac -> ab"
    assert so.Kron(A, B).T.chain == so.Kron(A, B).chain.T
    assert so.Kron(A, so.Dense(B)).is_chain
    nested = so.Kron(A, so.LowRank(matrix(4, 2), matrix(2, 5)))
    assert not nested.is_chain
    with pytest.raises(TypeError, match="no single chain"):
        _ = nested.chain


def test_the_matrix_is_contiguous_where_that_of_a_factor_is_strided() -> None:
    import torch

    K = so.Kron(so.Toeplitz(torch.ones(1), torch.ones(2)), torch.ones(2, 1))
    assert K.to_dense().stride() == K.T.to_dense().stride() == (2, 1)


def test_factors_are_in_order_of_application_and_the_last_is_applied_first() -> None:
    K = so.Kron(matrix(2, 3), matrix(4, 5))
    assert [f.shape for f in so.factors(K)] == [(4, 5), (2, 3)]
    assert [(f.fan_in, f.fan_out, f.sharing) for f in so.factors(K)] == [(5, 4, 3), (3, 2, 4)]
    parts = so.Kron(so.LowRank(matrix(2, 1), matrix(1, 3)), matrix(4, 5))
    assert [(f.fan_in, f.fan_out) for f in so.factors(parts)] == [(5, 4), (3, 1), (1, 2)]


def test_it_is_a_kronecker_product_for_the_rules_of_cola() -> None:
    import cola

    A, B = (so.Dense(to_backend(M, "torch")) for M in (np.diag([1.0, 2.0]), np.array([[3.0, 1], [0, 1]])))
    K = so.Kron(A, B)
    assert isinstance(K, _cola.Kronecker)
    x = to_backend(np.arange(4.0), "torch")
    assert np.allclose(to_numpy(cola.linalg.inv(K) @ x), np.linalg.solve(to_numpy(K.to_dense()), to_numpy(x)))
    assert np.allclose(to_numpy(cola.linalg.logdet(K)), np.linalg.slogdet(to_numpy(K.to_dense()))[1])


def test_multiplicities_of_block_diag_must_fit() -> None:
    A = matrix(2, 3)
    for counts in ((1,), (1, 2, 3), (0, 1), (-1, 1)):
        with pytest.raises(so.ShapeError, match="multiplicities of at least 1"):
            so.BlockDiag(A, A, multiplicities=counts)


def test_the_repr_of_many_blocks_is_short() -> None:
    assert len(repr(so.BlockDiag(*[matrix(2, 3)] * 100))) < 150


def test_kron_of_structures_and_matrices_is_a_kron():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    a, b, c = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3), (4, 2), (2, 2)))
    flat = so.kron(so.kron(a, b), c)
    assert type(flat) is so.Kron
    assert [tuple(M.shape) for M in flat.Ms] == [(2, 3), (4, 2), (2, 2)]
    np.testing.assert_allclose(flat.to_dense(), np.kron(np.kron(a, b), c), atol=1e-12)
    mixed = so.kron(so.Kron(a, b).T, so.Circulant(c[0]))
    assert type(mixed) is so.Kron
    assert so.macs(so.Kron(a, b).T) == so.macs(so.Kron(a, b))
    np.testing.assert_allclose(mixed.to_dense(), np.kron(np.kron(a, b).T, so.Circulant(c[0]).to_dense()), atol=1e-12)
    with pytest.raises(so.BackendError, match="from_numpy"):
        so.kron(np.eye(2), np.eye(2))
