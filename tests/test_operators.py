"""Every structure, at every size of `structops.testing`, on both libraries: it is its matrix and keeps the laws."""

from __future__ import annotations

import functools
import operator as py
import re
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
    installed_backends,
    operator_cases,
    representatives,
    scalar_cases,
    to_backend,
    to_numpy,
)
from structops.testing.arrays import dtype_of, name_of, normal
from structops.testing.cases import leaves, with_leaf
from structops.testing.checks import (
    check_adjoint,
    check_copies,
    check_dense,
    check_left_products,
    check_pytree,
    check_right_products,
    draw_like,
    norm,
)

ALL = operator_cases()
SPECIAL = [case for case in ALL if case.tags & {"nested", "padded"}]
FEW = [*representatives(), *SPECIAL]  # JAX compiles every shape anew, which costs more than all else here


def has_parameters(arguments: Any) -> bool:
    """Whether an array is to be drawn: not only indices."""
    if isinstance(arguments, Case):
        return has_parameters(arguments.arguments)
    return any(isinstance(a, tuple | list) or (isinstance(a, Case) and has_parameters(a)) for a in arguments)


def each(cases: list[Case], name: str = "case") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, cases, ids=str)


def generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(len(str(case)))


# ------------------------------------------------------------------------------------------------------------ the cases


def test_every_registered_structure_has_cases_and_a_reference() -> None:
    assert set(so.OPERATORS) == set(CASES) == set(REFERENCES)
    assert all(CASES.values())


def test_cases_have_names_of_their_own_and_representatives_one_shape() -> None:
    assert len({str(case) for case in ALL}) == len(ALL)
    assert {case.shape for case in representatives()} == {(4, 4)}


def test_each_structure_that_can_be_rectangular_is_so_both_ways() -> None:
    for name in set(so.OPERATORS) - {"Circulant", "Permutation", "Einsum", "Diagonal"}:
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


# ------------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.torch
@each([*ALL, *scalar_cases()])
def test_laws_in_torch(case: Case) -> None:
    assert_operator_valid(*case.build("torch"))


@pytest.mark.jax
@each([*representatives(), *scalar_cases()[:3]])
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


# ---------------------------------------------------------------------------------------------------- tracing libraries


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
@each(list(filter(has_parameters, ALL)))
def test_gradients_of_every_array_in_torch(case: Case, side: str) -> None:
    import torch

    case, arguments, x, y, directions, wanted = gradient_problem(str(case), "torch")
    free = [leaf.requires_grad_() for leaf in leaves(arguments) if leaf.is_floating_point()]
    A = case.operator(arguments)
    loss = {"A @ x": lambda: y @ (A @ x), "y @ A": lambda: (y @ A) @ x, "to_dense": lambda: y @ A.to_dense() @ x}[
        side
    ]()
    # The head of a Toeplitz matrix's row is the one number that is ignored; a row of one number has no gradient.
    gradients = iter(torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True))
    assert_gradients([None if D is None else next(gradients) for D in wanted], directions, wanted)


@pytest.mark.jax
@each(list(filter(has_parameters, FEW)))
def test_gradients_of_every_array_in_jax(case: Case) -> None:
    import jax

    case, arguments, x, y, directions, wanted = gradient_problem(str(case), "jax")
    free = [k for k, D in enumerate(wanted) if D is not None]

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


# ------------------------------------------------------------------------------------------------------------ arguments


def changed_arguments(case: Case, change: Any) -> list[tuple[Any, Any]]:
    """The drawn arguments with one array changed, for every array in turn, and the changed array."""
    arguments = case.draw(generator(case), "torch")
    arrays = map(change, leaves(arguments))
    return [(with_leaf(arguments, k, array), array) for k, array in enumerate(arrays)]


@pytest.mark.torch
@each(ALL)
def test_an_array_with_another_axis_is_refused(case: Case) -> None:
    for arguments, array in changed_arguments(case, lambda leaf: leaf[None]):
        received = re.escape(str(tuple(array.shape)))
        with pytest.raises(so.ShapeError, match=f"{received}|spatial axes"):  # a convolution may have two of these
            case.operator(arguments)


@pytest.mark.torch
@each(ALL)
def test_an_empty_array_is_refused(case: Case) -> None:
    for arguments, _ in changed_arguments(case, lambda leaf: leaf[..., :0]):
        with pytest.raises(so.ShapeError, match="0"):
            case.operator(arguments)


@pytest.mark.torch
@pytest.mark.parametrize("axis", range(4))
@each(ALL)
def test_an_array_of_another_size_fits_or_is_refused(case: Case, axis: int) -> None:
    import torch

    def grown(leaf: Any) -> Any:
        return torch.cat([leaf, leaf.narrow(axis % leaf.ndim, 0, 1)], dim=axis % leaf.ndim)

    for arguments, _ in changed_arguments(case, grown):
        try:
            A = case.operator(arguments)
        except so.ShapeError:
            continue
        check_dense(A, case.dense(arguments))


@pytest.mark.torch
@each(representatives())
def test_numpy_arrays_are_refused_with_the_two_conversions(case: Case) -> None:
    arguments = case.draw(generator(case), "torch")
    for k, leaf in enumerate(leaves(arguments)):
        with pytest.raises(TypeError, match=r"numpy.*torch\.from_numpy.*jnp\.asarray"):
            case.operator(with_leaf(arguments, k, leaf.numpy()))


@pytest.mark.torch
@pytest.mark.jax
@each(FEW)
def test_arrays_of_two_libraries_are_refused(case: Case) -> None:
    first, second = (leaves(case.draw(generator(case), backend)) for backend in BACKENDS)
    if len(first) > 1:
        mixed = with_leaf(case.draw(generator(case), "torch"), len(first) - 1, second[-1])
        with pytest.raises(so.BackendError, match="one library"):
            case.operator(mixed)


@pytest.mark.torch
@pytest.mark.jax
@each(representatives())
def test_operators_of_two_libraries_are_refused(case: Case, backend: str) -> None:
    other = next(name for name in BACKENDS if name != backend)
    (A, _), (B, _) = case.build(backend), case.build(other)
    x = to_backend(np.ones(4), other)
    for call in (py.matmul, py.add, so.kron, so.Kron, so.BlockDiag):
        with pytest.raises(so.BackendError, match=r"torch.*jax|jax.*torch"):
            call(A, B)
    stock = _cola.Dense(to_backend(np.eye(4), other))
    for call in (py.matmul, py.add, so.kron):
        for pair in ((A, stock), (stock, A)):
            with pytest.raises(so.BackendError, match=r"torch.*jax|jax.*torch"):
                call(*pair)
    for call in (lambda: A @ x, lambda: x @ A, lambda: A + x[None]):
        with pytest.raises(so.BackendError, match=r"torch.*jax|jax.*torch"):
            call()


def test_sums_check_shapes_and_libraries(backend: str) -> None:
    A = so.Dense(to_backend(np.ones((2, 3)), backend))
    for other in (A.T, A.T.to_dense(), to_backend(np.ones(3), backend)):
        with pytest.raises(so.ShapeError, match=r"2x3.*\(3"):
            A + other
        with pytest.raises(so.ShapeError, match=r"2x3.*\(3"):
            A - other
    for sum_or_product in (lambda: A + np.ones((2, 3)), lambda: np.ones((2, 3)) + A, lambda: so.kron(A, np.eye(2))):
        with pytest.raises(so.BackendError, match=r"torch\.from_numpy"):
            sum_or_product()
    with pytest.raises(so.ShapeError, match="takes a number"):
        A * to_backend(np.ones(3), backend)
    assert_close((A + A.to_dense()).to_dense(), np.full((2, 3), 2.0))
    assert sum([A]) is A


# --------------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("dtype", DTYPES)
@each(FEW)
def test_conversion_to_a_dtype(case: Case, backend: str, dtype: str) -> None:
    A, M = case.build(backend)
    B = A.to(dtype=dtype_of(backend, dtype))
    assert type(B) is type(A)
    assert B.dtype == dtype_of(backend, dtype) == A.to(dtype_of(backend, dtype)).dtype
    if backend == "torch" or dtype == "float32":  # JAX compiles for every dtype
        check_dense(B, M)


def test_a_conversion_drops_no_imaginary_part_and_makes_no_integers(backend: str) -> None:
    A, _ = CASES["LowRank"][0].build(backend, "complex64")
    with pytest.raises(so.BackendError, match="imaginary"):
        A.to(dtype=dtype_of(backend, "float64"))
    with pytest.raises(so.BackendError, match="floating"):
        A.to(dtype=dtype_of(backend, "int32"))


@pytest.mark.torch
@each(ALL)
def test_meta_tensors_have_shapes(case: Case) -> None:
    import torch

    A, M = case.build("torch", "bfloat16")
    for B in (
        A.to("meta"),
        case.operator(torch.utils._pytree.tree_map(lambda x: x.to("meta"), case.draw(generator(case), "torch"))),
    ):
        assert B.device.type == "meta"
        assert B.to_dense().shape == M.shape
        assert (B @ torch.empty(M.shape[1], 2, device="meta")).shape == (M.shape[0], 2)
        assert (torch.empty(2, 3, M.shape[0], device="meta") @ B.T.T).shape == (2, 3, M.shape[1])
    assert repr(A.to("meta")) == repr(A)


@pytest.mark.jax
def test_conversion_to_a_device_in_jax() -> None:
    import jax

    device = jax.local_devices()[0]
    A, M = CASES["TT"][0].build("jax")
    B = A.to(device)
    assert B.device == A.device == device
    check_dense(B, M)


@each(FEW)
def test_real_and_complex_numbers_meet(case: Case, backend: str) -> None:
    real, complex_ = dtype_of(backend, "float64"), dtype_of(backend, "complex128")
    rng = generator(case)
    for own, other in ((real, complex_), (complex_, real)):
        A, M = case.build(backend, name_of(own))
        x, y = (to_backend(normal(rng, (size,), other), backend, name_of(other)) for size in M.shape[::-1])
        assert (A @ x).dtype == (y @ A).dtype == complex_
        assert_close(A @ x, M @ to_numpy(x), scale=norm(M) * norm(x))
        assert_close(y @ A, to_numpy(y) @ M, scale=norm(M) * norm(y))


@pytest.mark.parametrize(
    ("own", "other", "result"),
    [
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float32", "int32", "float32"),
    ],
)
@each(representatives())
def test_products_promote(case: Case, own: str, other: str, result: str) -> None:
    A, M = case.build("torch", own)
    x = to_backend(np.arange(4) if other == "int32" else np.arange(4.0), "torch", other).to(dtype_of("torch", other))
    assert (A @ x).dtype == (x @ A).dtype == dtype_of("torch", result)
    for actual, expected in ((A @ x, M @ to_numpy(x)), (x @ A, to_numpy(x) @ M)):
        assert_close(actual, expected, scale=norm(M) * norm(x))  # nothing is rounded before it is multiplied


def test_half_precision_by_fft_is_computed_in_single(backend: str) -> None:
    # A running sum of ones in bfloat16 would stop at 256.
    column = to_backend(np.ones(512), backend, "bfloat16")
    y = so.Circulant(column) @ column
    assert name_of(y.dtype) == "bfloat16"
    assert_close(y, np.full(512, 512.0), scale=0.1)


# ------------------------------------------------------------------------------------------------------- CoLA's algebra

PAIRS = {"@": (py.matmul, np.matmul), "+": (py.add, np.add), "kron": (so.kron, np.kron)}


def assert_matrix(A: Any, M: np.ndarray) -> None:
    """The value and both products; CoLA's wrappers keep fewer laws than our operators."""
    rng = np.random.default_rng(0)
    x, Y = draw_like(A, rng, (M.shape[1],)), draw_like(A, rng, (2, M.shape[0]))
    assert tuple(A.shape) == M.shape
    assert_close(A.to_dense(), M, scale=norm(M) + 1)
    assert_close(A @ x, M @ to_numpy(x), scale=(norm(M) + 1) * norm(x))
    assert_close(Y @ A, to_numpy(Y) @ M, scale=(norm(M) + 1) * norm(Y))


def stock_operators(backend: str) -> dict[str, tuple[Any, np.ndarray]]:
    """CoLA's own operators, 4 x 4, and their matrices."""
    rng = np.random.default_rng(1)
    M, N, P = (rng.standard_normal(shape) for shape in ((4, 4), (2, 2), (4, 4)))
    A, B, C = (_cola.Dense(to_backend(matrix, backend)) for matrix in (M, N, P))
    d, (a, c) = rng.standard_normal(4), rng.standard_normal((2, 3))
    dtype = A.dtype
    return {
        "Dense": (A, M),
        "Triangular": (_cola.Triangular(to_backend(np.tril(M), backend)), np.tril(M)),
        "Identity": (_cola.Identity((4, 4), dtype), np.eye(4)),
        "ScalarMul": (_cola.ScalarMul(2.5, (4, 4), dtype, A.device), 2.5 * np.eye(4)),
        "Diagonal": (_cola.Diagonal(to_backend(d, backend)), np.diag(d)),
        "Tridiagonal": (
            _cola.Tridiagonal(*(to_backend(v, backend) for v in (a, d, c))),
            np.diag(a, -1) + np.diag(d) + np.diag(c, 1),
        ),
        "Permutation": (_cola.Permutation(to_backend(np.array([2, 0, 3, 1]), backend), dtype), np.eye(4)[[2, 0, 3, 1]]),
        "Product": (A @ C, M @ P),
        "Sum": (A + C, M + P),
        "Kronecker": (_cola.Kronecker(B, B), np.kron(N, N)),
        "BlockDiag": (_cola.BlockDiag(B, B), np.kron(np.eye(2), N)),
        "Transpose": ((A @ C).T, (M @ P).T),
        "Adjoint": ((A @ C).H, (M @ P).T),
        "Sliced": (_cola.Kronecker(B, C)[:4, 4:], np.kron(N, P)[:4, 4:]),
    }


@pytest.mark.jax
@pytest.mark.parametrize("verb", PAIRS)
@each(representatives(), "left")
def test_ordered_pairs_of_structures_in_jax(left: Case, verb: str) -> None:
    """One product each, since JAX compiles every new shape; ``test_closure.py`` has these pairs in torch."""
    combine, expected = PAIRS[verb]
    A, M = left.build("jax", seed=1)
    for right in representatives():
        B, N = right.build("jax", seed=2)
        AB = combine(A, B)
        x = draw_like(A, generator(right), (AB.shape[1],))
        assert_close(AB @ x, expected(M, N) @ to_numpy(x), scale=norm(M) * norm(N) * norm(x) + 10)


@pytest.mark.torch
@pytest.mark.parametrize("verb", PAIRS)
@pytest.mark.parametrize(
    "stock", stock_operators("torch") if installed_backends() and "torch" in installed_backends() else []
)
def test_ordered_pairs_with_operators_of_cola(stock: str, verb: str) -> None:
    combine, expected = PAIRS[verb]
    B, N = stock_operators("torch")[stock]
    for case in representatives():
        A, M = case.build("torch")
        assert_matrix(combine(A, B), expected(M, N))
        assert_matrix(combine(B, A), expected(N, M))


@each(representatives())
def test_scalars_identities_and_powers(case: Case, backend: str) -> None:
    A, M = case.build(backend)
    identity = _cola.Identity((4, 4), A.dtype)
    scale = norm(M) + 1
    assert A @ identity is A
    assert identity @ A is A
    for B, N in (
        (2 * A, 2 * M),
        (-A, -M),
        (A / 4, M / 4),
        (A - A, 0 * M),
        (A + identity, M + np.eye(4)),
        (A * 0.5, M / 2),
    ):
        assert_close(B.to_dense(), N, scale=scale)
    assert_close((A.T @ A).to_dense(), M.T @ M, scale=scale**2)
    assert_close((A @ A @ A).to_dense(), M @ M @ M, scale=scale**3)


@each(representatives())
def test_declared_properties_survive_copies_and_pytrees(case: Case, backend: str) -> None:
    A, M = case.build(backend)
    P = _cola.PSD(A)
    assert type(P) is type(A)
    assert P.isa(_cola.PSD)
    assert not A.isa(_cola.PSD)
    for check in (check_pytree, check_copies, check_dense):
        check(P, M)
    assert P.to(dtype=dtype_of(backend, "float32")).isa(_cola.PSD)
    assert P.T.isa(_cola.PSD)
    assert P.H.isa(_cola.PSD)
    assert _cola.Unitary(A).T.isa(_cola.Unitary)
    assert not _cola.Stiefel(A).T.isa(_cola.Stiefel) or A.isa(_cola.Stiefel)  # orthonormal columns, then rows


@each(representatives())
def test_linear_algebra_of_cola(case: Case, backend: str) -> None:
    import cola

    A, M = case.build(backend, seed=3)
    b = to_backend(np.arange(1.0, 5.0), backend)
    assert_close(cola.linalg.trace(A), np.trace(M), scale=100)
    assert_close(cola.linalg.diag(A), np.diag(M), scale=100)
    if np.linalg.cond(M) < 100:
        assert_close(cola.linalg.inv(A) @ b, np.linalg.solve(M, to_numpy(b)), scale=1e4)
        for actual, expected in zip(cola.linalg.slogdet(A), np.linalg.slogdet(M), strict=True):
            assert_close(actual, expected, scale=1e3)
        assert_close(cola.linalg.logdet(2 * A), np.linalg.slogdet(2 * M)[1], scale=1e3)
