"""Properties of operators of any structure and size: hypothesis draws these and a seed, never numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import structops as so
from structops import _cola
from structops.testing import (
    CASES,
    Case,
    assert_close,
    assert_operator_valid,
    dot_test,
    representatives,
    to_backend,
    to_numpy,
)
from structops.testing.arrays import normal
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


# ----------------------------------------------------------------------------------------------- properties, inferred

ALL = (_cola.SelfAdjoint, _cola.PSD, _cola.Stiefel, _cola.Unitary)


def dense(seed: int = 0, dtype: str = "float64", size: int = 3) -> Any:
    """A matrix that has no properties."""
    return so.Dense(to_backend(normal(np.random.default_rng(seed), (size, size), dtype), "torch", dtype))


def assert_properties(A: Any, *expected: type) -> None:
    """Exactly these hold, of A and of its transposes; those that they imply are expected, too."""
    implied = {p for p in ALL if any(issubclass(q, p) for q in expected)}
    assert {p for p in ALL if A.isa(p)} == implied
    for B in (A.T, A.H):
        assert {p for p in ALL if B.isa(p)} == {
            p for p in implied if p is not _cola.Stiefel or _cola.Unitary in implied
        }


@pytest.mark.torch
@pytest.mark.parametrize("declared", ALL)
def test_kron_and_block_diag_have_what_all_parts_have(declared: Any) -> None:
    A, B, plain = declared(dense(0)), declared(dense(1, size=2)), dense(2)
    for whole in (so.Kron(A, B), so.kron(A, B), so.BlockDiag(A, B), so.BlockDiag(A, B, multiplicities=(2, 1))):
        assert whole.isa(declared)
    assert_properties(so.kron(A, plain))
    assert_properties(so.BlockDiag(plain, A))
    assert not so.Kron(A, B).with_leaves((plain, plain)).isa(declared)


@pytest.mark.torch
def test_properties_of_scaled_operators() -> None:
    psd, unitary, hermitian = _cola.PSD(dense(0)), _cola.Unitary(dense(1)), _cola.SelfAdjoint(dense(2))
    assert_properties(2 * psd, _cola.PSD)
    assert_properties(psd / 2, _cola.PSD)
    assert_properties(-2 * psd, _cola.SelfAdjoint)
    assert_properties(2j * psd)
    assert_properties(-hermitian, _cola.SelfAdjoint)
    assert_properties(3 * unitary)
    assert_properties(-unitary, _cola.Unitary)
    assert_properties(1j * unitary, _cola.Unitary)
    number = to_backend(np.array(2.0), "torch")
    assert_properties(number * psd, _cola.SelfAdjoint)  # the sign of an array is not looked at
    assert_properties(number * unitary)
    assert_properties(0 * dense(0), _cola.PSD)


@pytest.mark.torch
def test_properties_of_sums() -> None:
    psd, other, hermitian = _cola.PSD(dense(0)), _cola.PSD(dense(1)), _cola.SelfAdjoint(dense(2))
    unitary = _cola.Unitary(dense(3))
    lazy = _cola.PSD(so.Circulant(to_backend(np.array([3.0, 1, 1]), "torch")))
    for second in (other, lazy):  # merged, and not
        assert_properties(psd + second, _cola.PSD)
        assert_properties(psd - second, _cola.SelfAdjoint)
        assert_properties(psd + second + hermitian, _cola.SelfAdjoint)
        assert_properties(second + dense(4))
        assert_properties(second + unitary)
    assert_properties(unitary + unitary)
    assert_properties(psd + so.Identity(3, like=psd.A), _cola.PSD)
    assert_properties(psd + so.Zero(3, 3, like=psd.A), _cola.PSD)


@pytest.mark.torch
def test_properties_of_products() -> None:
    unitary, other = _cola.Unitary(dense(0)), _cola.Unitary(so.Circulant(to_backend(np.eye(3)[1], "torch")))
    permutation = so.Permutation(to_backend(np.array([2, 0, 1]), "torch"), dtype=unitary.dtype)
    assert_properties(unitary @ other, _cola.Unitary)
    assert_properties(other @ permutation, _cola.Unitary)
    assert_properties(unitary @ dense(1))
    assert_properties(_cola.PSD(dense(0)) @ _cola.PSD(dense(1)))  # not even self-adjoint
    assert_properties(_cola.SelfAdjoint(dense(0)) @ other)


@pytest.mark.torch
@pytest.mark.parametrize(
    "case", [*representatives(), *CASES["TT"][1:3], CASES["LowRank"][1], CASES["Toeplitz"][1]], ids=str
)
def test_a_transpose_times_its_operator_is_psd_where_it_is_real(case: Case) -> None:
    for dtype, holds in (("float64", True), ("complex128", False)):
        A, _ = case.build("torch", dtype)
        for gram in (A.T @ A, A @ A.T):
            is_permutation = isinstance(A, so.Permutation)  # real in any dtype, and unitary
            assert gram.isa(_cola.PSD) == gram.isa(_cola.SelfAdjoint) == (holds and not is_permutation)
        assert not (A.T @ case.build("torch", dtype, seed=1)[0]).isa(_cola.PSD)


@pytest.mark.torch
@given(st.data(), seeds())
def test_inferred_properties_are_true(data: st.DataObject, seed: int) -> None:
    """Whatever an expression claims, its matrix is."""
    rng = np.random.default_rng(seed)
    n = data.draw(st.integers(1, 3))

    def part() -> Any:
        dtype = data.draw(dtypes("float64", "complex128"))
        M = normal(rng, (n, n), dtype)
        Q, _ = np.linalg.qr(M)
        A = {"plain": M, "self-adjoint": M + M.conj().T, "psd": M @ M.conj().T, "unitary": Q}
        declare = {"self-adjoint": _cola.SelfAdjoint, "psd": _cola.PSD, "unitary": _cola.Unitary}
        kind = data.draw(st.sampled_from([*A, "identity", "permutation", "diagonal"]))
        if kind == "identity":
            return so.Identity(n, like=to_backend(M, "torch"))
        if kind == "permutation":
            return so.Permutation(to_backend(rng.permutation(n), "torch"), dtype=to_backend(M, "torch").dtype)
        if kind == "diagonal":
            return so.Diagonal(to_backend(M[0], "torch"))
        return declare.get(kind, lambda B: B)(so.Dense(to_backend(A[kind], "torch")))

    A, B = part(), part()
    c = data.draw(st.sampled_from([2, -1, -0.5, 1j, 2j, 0]))
    verb = data.draw(st.sampled_from(["@", "+", "-", "*", "kron", "BlockDiag", "gram", "H", "T", "sandwich"]))
    C = {
        "@": lambda: A @ B,
        "+": lambda: A + B,
        "-": lambda: A - B,
        "*": lambda: c * A,
        "kron": lambda: so.kron(A, B),
        "BlockDiag": lambda: so.BlockDiag(A, B),
        "gram": lambda: A.T @ A,
        "H": lambda: (A @ B).H,
        "T": lambda: (A + c * B).T,
        "sandwich": lambda: A.H @ B @ A,
    }[verb]()
    M = to_numpy(C.to_dense())
    limit = 1e-10 * (1 + norm(M))
    if C.isa(_cola.SelfAdjoint):
        assert norm(M - M.conj().T) <= limit
    if C.isa(_cola.PSD):
        assert np.linalg.eigvalsh(M).min() >= -limit
    if C.isa(_cola.Stiefel):
        assert norm(M.conj().T @ M - np.eye(len(M))) <= limit
