"""Properties of operators of any structure and size: hypothesis draws these and a seed, never numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import structops as so
from structops.testing import Case, assert_close, assert_operator_valid, dot_test, to_numpy
from structops.testing.checks import (
    check_adjoint,
    check_counts,
    check_dense,
    check_left_products,
    check_repr,
    check_right_products,
    draw_like,
    norm,
)
from structops.testing.strategies import SIMPLE, dtypes, operator_cases, seeds

PRODUCTS = (check_dense, check_right_products, check_left_products, check_adjoint, dot_test)
FEWER = max(1, settings().max_examples // 6)  # JAX compiles each example anew


def build(case: Case, backend: str, dtype: str, seed: int) -> tuple[Any, np.ndarray]:
    """The operator and its matrix, unless sums cancel so far that rounding shows."""
    assume(case.cancellation(case.draw(np.random.default_rng(seed), backend, dtype)) < 30)
    return case.build(backend, dtype, seed)


def test_every_registered_structure_is_drawn() -> None:
    assert {*SIMPLE, "Kron", "BlockDiag"} == set(so.OPERATORS)


@pytest.mark.torch
@pytest.mark.parametrize("name", so.OPERATORS)
@given(data=st.data())
def test_an_operator_is_its_matrix(name: str, data: st.DataObject) -> None:
    case, dtype, seed = data.draw(operator_cases(name)), data.draw(dtypes()), data.draw(seeds())
    assert_operator_valid(*build(case, "torch", dtype, seed), seed=seed, checks=PRODUCTS)


@pytest.mark.torch
@given(operator_cases(), seeds())
def test_an_operator_keeps_all_laws(case: Case, seed: int) -> None:
    assert_operator_valid(*build(case, "torch", "float64", seed), seed=seed)


@pytest.mark.jax
@settings(max_examples=FEWER)
@given(operator_cases(), dtypes("float32", "complex64", "bfloat16"), seeds())
def test_an_operator_is_its_matrix_in_jax(case: Case, dtype: str, seed: int) -> None:
    import jax

    A, M = build(case, "jax", dtype, seed)
    rng = np.random.default_rng(seed)
    x, y = draw_like(A, rng, (M.shape[1],)), draw_like(A, rng, (M.shape[0],))
    dense, right, left = jax.jit(lambda A, x, y: (A.to_dense(), A @ x, y @ A))(A, x, y)
    assert_close(dense, M, scale=norm(M))
    assert_close(right, M @ to_numpy(x), scale=norm(M) * norm(x))
    assert_close(left, to_numpy(y) @ M, scale=norm(M) * norm(y))
    for check in (check_repr, check_counts):
        check(A, M)


@pytest.mark.torch
@given(operator_cases("Einsum", "TT", "BTT", "Monarch", "BLAST", "LowRank"), seeds())
def test_counts_and_ranks_of_chains(case: Case, seed: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    A, M = case.build("torch", seed=seed)
    x = draw_like(A, np.random.default_rng(seed), (M.shape[1],))
    with FlopCounterMode(display=False) as counter:
        A @ x
    assert counter.get_total_flops() == so.flops(A)
    assert so.macs(A.T) == so.macs(A)
    assert so.num_params(A) == sum(array.numel() for array in A.arrays)
    assert np.linalg.matrix_rank(M) <= A.chain.rank_bound


@pytest.mark.torch
@given(operator_cases(), st.data())
def test_slices_are_those_of_the_matrix(case: Case, data: st.DataObject) -> None:
    A, M = case.build("torch")
    index = tuple(data.draw(st.slices(size)) for size in M.shape)
    part = M[index]
    if part.size and all(s.step is None or s.step > 0 for s in index):  # torch has no negative steps
        assert_close(A[index].to_dense(), part, scale=norm(M))
