"""Every structure, at every size of `structops.testing`, on both libraries: it is its matrix and keeps the laws."""

from __future__ import annotations

import functools
import itertools
import operator as py
from typing import Any

import numpy as np
import pytest

import structops as so
from structops import _cola
from structops.testing import (
    BACKENDS,
    CASES,
    CHECKS,
    DTYPES,
    REFERENCES,
    Case,
    assert_close,
    assert_operator_valid,
    dot_test,
    operator_cases,
    representatives,
    to_backend,
    to_numpy,
)
from structops.testing.arrays import dtype_of, name_of, normal
from structops.testing.cases import leaves, with_leaf
from structops.testing.checks import (
    check_adjoint,
    check_dense,
    check_left_products,
    check_right_products,
    draw_like,
    norm,
)

ALL = operator_cases()
SPECIAL = [case for case in ALL if case.tags & {"nested", "padded"}]
FEW = [*representatives(), *SPECIAL]  # JAX compiles every shape anew, which costs more than all else here


def each(cases: list[Case], name: str = "case") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, cases, ids=str)


def generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(len(str(case)))


# -------------------------------------------------------------------------------------------------------- the cases


def test_every_registered_structure_has_cases_and_a_reference() -> None:
    assert set(so.OPERATORS) == set(CASES) == set(REFERENCES)
    assert all(CASES.values())


def test_cases_have_names_of_their_own_and_representatives_one_shape() -> None:
    assert len({str(case) for case in ALL}) == len(ALL)
    assert {case.shape for case in representatives()} == {(4, 4)}


def test_each_structure_that_can_be_rectangular_is_so_both_ways() -> None:
    for name in set(so.OPERATORS) - {"Circulant", "Permutation", "Einsum"}:
        kinds = set().union(*(case.tags for case in CASES[name]))
        assert {"wide", "tall", "square"} <= kinds, name


def test_an_operator_of_ones_own_is_tested_in_the_same_way() -> None:
    class Shifted(so.LowRank):
        """A low-rank matrix that gets its product wrong."""

        def _matmat(self, X: Any) -> Any:
            return super()._matmat(X) + 1

    right = Case(so.LowRank, ((4, 2), (2, 3)), reference=lambda left, right: left @ right)
    wrong = Case(Shifted, ((4, 2), (2, 3)), reference=lambda left, right: left @ right)
    assert_operator_valid(*right.build("torch"))
    with pytest.raises(AssertionError, match="off by"):
        assert_operator_valid(*wrong.build("torch"))


# ---------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.torch
@each(ALL)
def test_laws_in_torch(case: Case) -> None:
    assert_operator_valid(*case.build("torch"))


@pytest.mark.jax
@each(FEW)
def test_laws_in_jax(case: Case) -> None:
    assert_operator_valid(*case.build("jax"))


def test_the_names_of_the_laws_say_what_they_check() -> None:
    assert all(check.__doc__ for check in CHECKS)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float64"])
@each(ALL)
def test_laws_in_other_dtypes(case: Case, dtype: str) -> None:
    checks = (check_dense, check_right_products, check_left_products, check_adjoint, dot_test)
    assert_operator_valid(*case.build("torch", dtype), checks=checks)


def matrices_and_products(A: Any, x: Any, X: Any, Y: Any, y: Any) -> Any:
    return A.to_dense(), A @ x, A @ X, Y @ A, A.H @ y, A.T.to_dense()


def assert_matrices_and_products(case: Case, dtype: str) -> None:
    import jax

    A, M = case.build("jax", dtype)
    rng, (rows, cols) = generator(case), M.shape
    x, X, Y, y = (draw_like(A, rng, shape) for shape in ((cols,), (cols, 3), (2, 2, rows), (rows,)))
    received = jax.jit(matrices_and_products)(A, x, X, Y, y)
    u, U, V, v = map(to_numpy, (x, X, Y, y))
    for actual, expected in zip(received, (M, M @ u, M @ U, V @ M, M.conj().T @ v, M.T), strict=True):
        assert actual.dtype == A.dtype
        assert_close(
            actual, expected, scale=norm(M) * max(norm(V.ravel()), norm(U), norm(u), norm(v), 1), what=str(case)
        )


@pytest.mark.jax
@each(ALL)
def test_under_jit_with_the_operator_as_argument(case: Case) -> None:
    assert_matrices_and_products(case, "float64")


@pytest.mark.jax
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float64"])
@each(representatives())
def test_under_jit_in_other_dtypes(case: Case, dtype: str) -> None:
    assert_matrices_and_products(case, dtype)


# ----------------------------------------------------------------------------------------------------- tracing libraries


@pytest.mark.jax
@each(FEW)
def test_jit_returns_operators_and_does_not_trace_again(case: Case) -> None:
    import jax

    traces = []

    @jax.jit
    def transposed(A: Any) -> Any:
        traces.append(A)
        return A.T

    first, second = case.build("jax", seed=0)[0], case.build("jax", seed=1)[0]
    assert type(transposed(first)) is type(first)
    assert_close(transposed(second).to_dense(), second.T.to_dense())
    assert len(traces) == 1


@pytest.mark.torch
@each(FEW)
def test_products_compile_as_one_graph(case: Case) -> None:
    import torch

    torch._dynamo.reset()  # it stops after some recompilations of one function
    A, M = case.build("torch", "float32")
    X = draw_like(A, generator(case), (M.shape[1], 3))
    Y = draw_like(A, generator(case), (2, M.shape[0]))
    right = torch.compile(lambda A, X: A._matmat(X), fullgraph=True, backend="eager")
    left = torch.compile(lambda A, X: A._rmatmat(X), fullgraph=True, backend="eager")
    assert_close(right(A, X), M @ to_numpy(X), scale=norm(M) * norm(X))
    assert_close(left(A, Y), to_numpy(Y) @ M, scale=norm(M) * norm(Y))


def directional_derivatives(case: Case, arguments: Any, directions: list[Any]) -> list[np.ndarray | None]:
    """The matrix is affine in each of its arrays, so its derivative along v is M(v) - M(0); None for indices."""
    result: list[np.ndarray | None] = []
    for k, (leaf, v) in enumerate(zip(leaves(arguments), directions, strict=True)):
        if to_numpy(leaf).dtype.kind in "iu":
            result.append(None)
        else:
            result.append(case.dense(with_leaf(arguments, k, v)) - case.dense(with_leaf(arguments, k, 0 * leaf)))
    return result


@functools.cache
def gradient_problem(case_name: str, backend: str) -> Any:
    case = next(case for case in ALL if str(case) == case_name)
    rng = generator(case)
    arguments = case.draw(rng, backend)
    rows, cols = case.shape
    x, y = (to_backend(normal(rng, (size,)), backend) for size in (cols, rows))
    directions = [to_backend(normal(rng, tuple(leaf.shape)), backend) for leaf in leaves(arguments)]
    wanted = [
        None if D is None else to_numpy(y) @ D @ to_numpy(x)
        for D in directional_derivatives(case, arguments, directions)
    ]
    return case, arguments, x, y, directions, wanted


def assert_gradients(gradients: list[Any], directions: list[Any], wanted: list[Any]) -> None:
    for gradient, v, expected in zip(gradients, directions, wanted, strict=True):
        if expected is not None:
            G, V = to_numpy(gradient), to_numpy(v)
            assert_close(np.vdot(G, V), expected, scale=norm(G.ravel()) * norm(V.ravel()) + 1, dtype="float64")


@pytest.mark.torch
@pytest.mark.parametrize("side", ["A @ x", "y @ A", "to_dense"])
@each(ALL)
def test_gradients_of_every_array_in_torch(case: Case, side: str) -> None:
    import torch

    case, arguments, x, y, directions, wanted = gradient_problem(str(case), "torch")
    free = [leaf.requires_grad_() for leaf in leaves(arguments) if leaf.is_floating_point()]
    if not free:
        pytest.skip("an operator without parameters")
    A = case.operator(arguments)
    loss = {"A @ x": lambda: y @ (A @ x), "y @ A": lambda: (y @ A) @ x, "to_dense": lambda: y @ A.to_dense() @ x}[
        side
    ]()
    # Toeplitz ignores the head of its row, alone of all numbers: then the row of a matrix of one column has no gradient.
    gradients = iter(torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True))
    assert_gradients([None if D is None else next(gradients) for D in wanted], directions, wanted)


@pytest.mark.jax
@each(FEW)
def test_gradients_of_every_array_in_jax(case: Case) -> None:
    import jax

    case, arguments, x, y, directions, wanted = gradient_problem(str(case), "jax")
    free = [k for k, D in enumerate(wanted) if D is not None]
    if not free:
        pytest.skip("an operator without parameters")

    def both(arrays: list[Any]) -> Any:
        filled = arguments
        for k, array in zip(free, arrays, strict=True):
            filled = with_leaf(filled, k, array)
        A = case.operator(filled)
        return (y @ (A @ x) + (y @ A) @ x) / 2

    gradients = jax.jit(jax.grad(both))([leaves(arguments)[k] for k in free])
    assert_gradients(gradients, [directions[k] for k in free], [wanted[k] for k in free])


@pytest.mark.jax
def test_the_gradient_of_an_operator_is_an_operator() -> None:
    import jax

    A, _ = representatives()[0].build("jax")
    G = jax.grad(lambda A: A[1, 2])(A)
    assert type(G) is type(A)


@pytest.mark.torch
@each(ALL)
def test_vmap_in_torch(case: Case) -> None:
    import torch

    first, second = (case.draw(np.random.default_rng(seed), "torch") for seed in (0, 1))
    stacked = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), first, second)
    x = to_backend(normal(generator(case), (2, case.shape[1])), "torch")
    result = torch.func.vmap(lambda arguments, x: case.operator(arguments) @ x)(stacked, x)
    for y, arguments, u in zip(result, (first, second), to_numpy(x), strict=True):
        M = case.dense(arguments)
        assert_close(y, M @ u, scale=norm(M) * norm(u))


@pytest.mark.jax
@each(FEW)
def test_vmap_in_jax(case: Case) -> None:
    import jax

    first, second = (case.draw(np.random.default_rng(seed), "jax") for seed in (0, 1))
    stacked = jax.tree.map(lambda *parts: jax.numpy.stack(parts), first, second)
    operators = jax.vmap(case.operator)(stacked)  # operators of batched arrays
    x = to_backend(normal(generator(case), (2, case.shape[1])), "jax")
    result = jax.jit(jax.vmap(py.matmul))(operators, x)
    for y, arguments, u in zip(result, (first, second), to_numpy(x), strict=True):
        M = case.dense(arguments)
        assert_close(y, M @ u, scale=norm(M) * norm(u))
