"""Linear algebra: every verb of CoLA on every structure against numpy, its type, its gradients, and its errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import cola
import numpy as np
import pytest
import scipy.linalg
from cola import linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import structops as so
from structops.algebra.closure import LINALG, ROWS, closure
from structops.algebra.determinant import determinant_rule
from structops.algebra.diagonal import diagonal_rule, trace_rule
from structops.algebra.eigen import eigen_rule, exp_rule, function_rule, power_rule
from structops.algebra.inverse import inverse_rule, pinv_rule
from structops.algebra.scalar import ScalarMul
from structops.algebra.svd import svd_rule
from structops.testing import BACKENDS, CASES, Case, to_backend, to_numpy
from structops.testing.arrays import normal
from structops.testing.cases import btt_cores, tt_cores

AUTO = linalg.Auto()
LIBRARIES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in BACKENDS]
Matrix = np.ndarray


def array(backend: str, dtype: str, *shape: int, seed: int = 0) -> Any:
    return to_backend(normal(np.random.default_rng(seed), shape, dtype), backend, dtype)


def close(actual: Any, expected: Any, tolerance: float = 1e-8) -> bool:
    received, wanted = to_numpy(actual), np.asarray(expected)
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    return received.shape == wanted.shape and bool(np.abs(received - wanted).max(initial=0.0) <= tolerance * scale)


def well_conditioned(M: Matrix) -> bool:
    return M.shape[0] == M.shape[1] and bool(np.linalg.cond(M) < 1e6)


# -------------------------------------------------------------------------------- every case of the library, every verb

SQUARE = [
    pytest.param(case, transposed, id=f"{case}{'.T' if transposed else ''}")
    for cases in CASES.values()
    for case in cases
    for transposed in (False, True)
    if case.shape[0] == case.shape[1]
]
ANY = [pytest.param(case, id=str(case)) for cases in CASES.values() for case in cases]


def built(case: Case, backend: str, dtype: str, transposed: bool = False, seed: int = 3) -> tuple[Any, Matrix]:
    A, M = case.build(backend, dtype, seed)
    return (A.T, M.T) if transposed else (A, M)


def check_square(A: Any, M: Matrix) -> None:
    """Inverse, determinant, trace and diagonals are those of the matrix."""
    n = len(M)
    if well_conditioned(M):
        x = to_numpy(A @ np_like(A, np.arange(1.0, n + 1)))
        assert close(linalg.inv(A).to_dense() @ np_like(A, M), np.eye(n))
        assert close(linalg.solve(A, np_like(A, x)), np.arange(1.0, n + 1))
        sign, log = linalg.slogdet(A)
        wanted_sign, wanted_log = np.linalg.slogdet(M)
        assert close(sign, wanted_sign)
        assert close(log, wanted_log)
    elif np.linalg.matrix_rank(M) < n:
        assert np.exp(float(to_numpy(linalg.logdet(A)))) <= 1e-8 * max(1, np.abs(M).max()) ** n
    assert close(linalg.trace(A), np.trace(M))
    for k in (0, 1, -1)[: 1 if n == 1 else 3]:
        assert close(linalg.diag(A, k), np.diag(M, k))


def np_like(A: Any, values: Matrix) -> Any:
    """A numpy array on the library of an operator, in its dtype."""
    like = A.arrays_flat()[0]
    if hasattr(like, "new_tensor"):
        import torch

        return torch.as_tensor(values).to(A.dtype)
    import jax.numpy as jnp

    return jnp.asarray(values, dtype=A.dtype)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(("case", "transposed"), SQUARE)
def test_square_verbs_in_torch(case: Case, transposed: bool, dtype: str) -> None:
    check_square(*built(case, "torch", dtype, transposed))


@pytest.mark.jax
@pytest.mark.parametrize("case", [cases[0] for cases in CASES.values()], ids=str)
def test_square_verbs_in_jax(case: Case) -> None:
    check_square(*built(case, "jax", "float64"))
    check_square(*built(case, "jax", "complex128", transposed=True))


@pytest.mark.torch
@pytest.mark.parametrize("case", ANY)
def test_pseudo_inverses_and_singular_values(case: Case) -> None:
    A, M = built(case, "torch", "float64")
    assert close(linalg.pinv(A).to_dense(), np.linalg.pinv(M, rcond=1e-10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.DensifyWarning)
        U, S, Vh = so.svd(A)
    left, values, right = map(to_numpy, (U.to_dense(), S, Vh.to_dense()))
    assert close(left * values @ right, M)
    assert close(values, np.linalg.svd(M, compute_uv=False)[: len(values)])
    assert np.all(np.diff(values) <= 1e-12)
    for Q in (left, right.conj().T):
        assert close(Q.conj().T @ Q, np.eye(Q.shape[1]))


@pytest.mark.torch
@pytest.mark.parametrize(("case", "transposed"), SQUARE[::2])
def test_eigenvalues_and_functions(case: Case, transposed: bool) -> None:
    A, M = built(case, "torch", "float64", transposed)
    assert close(linalg.exp(A).to_dense(), scipy.linalg.expm(M), 1e-7)
    values, vectors = linalg.eig(A, len(M), "SM")
    V = to_numpy(vectors.to_dense() if hasattr(vectors, "to_dense") else vectors)
    assert close(M @ V, V * to_numpy(values))
    if eigen_rule(A, AUTO) is not None:
        assert np.all(np.diff(np.abs(to_numpy(values))) >= -1e-12)
        largest, one = linalg.eig(A, 1, "LM")
        assert close(np.abs(to_numpy(largest)), [np.abs(np.linalg.eigvals(M)).max()])
        assert close(M @ to_numpy(one.to_dense()), to_numpy(one.to_dense()) * to_numpy(largest))


# ---------------------------------------------------------------------------------------------------- what a table says


def fitting(name: str, backend: str = "torch", dtype: str = "float64") -> tuple[Any, Matrix]:
    """An operator of the structure with square blocks and equal modes."""

    def draw(*shape: int, seed: int = 0) -> Any:
        return array(backend, dtype, *shape, seed=seed)

    perm = to_backend(np.array([2, 0, 3, 1]), backend)
    makers: dict[str, Callable[[], Any]] = {
        "Dense": lambda: so.Dense(draw(4, 4)),
        "LowRank": lambda: so.LowRank(draw(4, 2), draw(2, 4, seed=1)),
        "Kron": lambda: so.Kron(draw(2, 2), draw(3, 3, seed=1)),
        "TT": lambda: so.TT([draw(*s, seed=k) for k, s in enumerate(tt_cores((2, 2), (2, 2), 2))]),
        "BTT": lambda: so.BTT([draw(*s, seed=k) for k, s in enumerate(btt_cores((3, 2), (3, 2), 1))]),
        "Monarch": lambda: so.Monarch(draw(2, 2, 2), draw(2, 2, 2, seed=1)),
        "BlockDiag": lambda: so.BlockDiag(draw(2, 2), draw(3, 3, seed=1), multiplicities=(2, 1)),
        "BLAST": lambda: so.BLAST(draw(2, 2, 3), draw(2, 2, 3, seed=1), draw(2, 2, 3, seed=2)),
        "Einsum": lambda: so.Einsum([draw(2, 2, 2), draw(2, 2, 2, seed=1)], "cd, bcd, abc -> ab"),
        "Circulant": lambda: so.Circulant(draw(5)),
        "Toeplitz": lambda: so.Toeplitz(draw(4), draw(4, seed=1)),
        "Convolution": lambda: so.Convolution(draw(1, 1, 3), 4, "same"),
        "Permutation": lambda: so.Permutation(perm, draw(1).dtype),
        "Diagonal": lambda: so.Diagonal(draw(4)),
        "Identity": lambda: so.Identity(3, like=draw(1)),
        "Zero": lambda: so.Zero(3, 3, like=draw(1)),
        "ScalarMul": lambda: ScalarMul(draw(), 3),
    }
    A = makers[name]()
    return A, to_numpy(A.to_dense())


RULES: dict[str, Callable[[Any], Any]] = {
    "inv": lambda A: inverse_rule(A, AUTO),
    "pinv": lambda A: pinv_rule(A, AUTO),
    "slogdet": lambda A: determinant_rule(A, AUTO, AUTO),
    "trace": lambda A: trace_rule(A, AUTO),
    "diag": lambda A: diagonal_rule(A, 0, AUTO),
    "eig": lambda A: eigen_rule(A, AUTO),
    "svd": svd_rule,
    "exp": lambda A: exp_rule(A, AUTO) or function_rule(A.xnp.exp, A, AUTO),
    "sqrt": lambda A: power_rule(A, 0.5, AUTO) or function_rule(A.xnp.sqrt, A, AUTO),
}


def test_the_table_has_a_cell_for_every_verb_and_structure() -> None:
    assert set(LINALG) == {*RULES, "round"}
    assert {closure(verb, name) for verb in LINALG for name in ROWS} <= {
        *ROWS,
        *("Product", "direct", "dense", "CoLA", "singular", "error"),
    }


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("verb", RULES)
def test_every_cell_of_the_table(verb: str, name: str, backend: str) -> None:
    A, M = fitting(name, backend)
    said = closure(verb, name)
    if verb == "sqrt":
        A, M = positive(A, M, name)
    if verb == "inv" and said == "singular":
        with pytest.raises(so.StructureError, match=r"singular.*pinv"):
            linalg.inv(A)
        return
    if said == "singular":
        sign, log = linalg.slogdet(A)
        assert float(sign) == 0
        assert float(log) == -np.inf
        return
    if verb == "inv" and name in ("Permutation", "Identity"):
        result = linalg.inv(A)  # unitary operators need no rule
    elif verb == "pinv" and name in ("Permutation", "Identity"):
        result = linalg.pinv(A)
    else:
        result = RULES[verb](A)
    if said in ("CoLA", "dense"):
        assert result is None
    elif verb == "trace":
        assert result is not None or diagonal_rule(A, 0, AUTO) is not None
    else:
        assert result is not None
    if said not in ("CoLA", "dense", "direct"):
        assert type(result).__name__ == said
        assert close(result.to_dense(), EXPECTED[verb](M), 1e-7)


EXPECTED: dict[str, Callable[[Matrix], Matrix]] = {
    "inv": np.linalg.inv,
    "pinv": np.linalg.pinv,
    "exp": scipy.linalg.expm,
    "sqrt": lambda M: scipy.linalg.sqrtm(M) if M.any() else M,
}


def positive(A: Any, M: Matrix, name: str) -> tuple[Any, Matrix]:
    """A positive operator of the structure, where sqrt has a rule for it."""
    if name == "Kron":
        A = so.Kron(*(cola.PSD(so.Dense(P.A @ P.A.mT + P.A.shape[0] * np_like(A, np.eye(P.A.shape[0])))) for P in A.Ms))
    elif name in ("Diagonal", "ScalarMul"):
        A = abs_of(A)
    else:
        return A, M
    return A, to_numpy(A.to_dense())


def abs_of(A: Any) -> Any:
    return A.with_leaves(
        *(abs(leaf) if not isinstance(leaf, tuple) else tuple(map(abs, leaf)) for leaf in A.tree_flatten()[0])
    )


# ----------------------------------------------------------------------------------------------------- low-rank updates

BASES = ("Diagonal", "Circulant", "Kron", "BlockDiag", "Monarch", "ScalarMul", "Identity", "Permutation")


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("name", BASES)
def test_low_rank_updates(name: str, dtype: str, backend: str) -> None:
    X, M = fitting(name, backend, dtype)
    n = len(M)
    L = so.LowRank(array(backend, dtype, n, 2, seed=7), array(backend, dtype, 2, n, seed=8))
    A = L + X
    wanted = to_numpy(L.to_dense()) + M
    inverse = linalg.inv(A)
    assert {type(part).__name__ for part in inverse.Ms} == {"LowRank", type(X).__name__}
    assert close(inverse.to_dense(), np.linalg.inv(wanted), 1e-7)
    assert all(map(close, linalg.slogdet(A), np.linalg.slogdet(wanted)))


# -------------------------------------------------------------------------------------------------------- determinants


@pytest.mark.torch
@given(st.data(), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_signs_of_determinants_of_square_chains(data: st.DataObject, seed: int) -> None:
    """Butterflies with modes in any order, also with a regroup: the signs of the re-orderings count."""
    size = {label: data.draw(st.integers(1, 3)) for label in "abc"}
    size |= {upper: size[lower] for upper, lower in zip("xyz", "abc", strict=True)}
    order = "".join(data.draw(st.permutations("xyz")))
    output = "".join(data.draw(st.permutations("abc")))
    pattern = f"{order}, axyz, bayz, czba -> {output}"
    factors = pattern.split(" -> ")[0].split(", ")[1:]
    rng = np.random.default_rng(seed)
    A = so.Einsum([to_backend(rng.standard_normal([size[k] for k in f]), "torch", "float64") for f in factors], pattern)
    M = to_numpy(A.to_dense())
    if np.linalg.cond(M) < 1e10:
        sign, log = linalg.slogdet(A)
        assert determinant_rule(A, AUTO, AUTO) is not None
        assert float(sign) == np.linalg.slogdet(M)[0]
        assert close(log, np.linalg.slogdet(M)[1])


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 64])
def test_signs_of_permutations(n: int, backend: str) -> None:
    for seed in range(10):
        perm = np.random.default_rng(seed).permutation(n)
        P = so.Permutation(to_backend(perm, backend), array(backend, "float64").dtype)
        assert float(linalg.slogdet(P)[0]) == np.linalg.slogdet(np.eye(n)[perm])[0]


@pytest.mark.torch
def test_determinants_multiply() -> None:
    A, B = fitting("Kron")[0], fitting("BTT")[0]
    sign, log = linalg.slogdet(A @ B)
    (s, a), (t, b) = linalg.slogdet(A), linalg.slogdet(B)
    assert float(sign) == float(s * t)
    assert close(log, to_numpy(a + b))


# ----------------------------------------------------------------------------------------------------------- gradients

SCALARS: dict[str, Callable[[Any, Any], Any]] = {
    "solve": lambda A, b: linalg.solve(A, b).sum(),
    "logdet": lambda A, b: linalg.logdet(A),
    "trace": lambda A, b: linalg.trace(A),
    "diag": lambda A, b: (linalg.diag(A) * b).sum(),
}
DENSE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "solve": lambda xp, M, b: xp.linalg.solve(M, b[:, None]).sum(),
    "logdet": lambda xp, M, b: xp.linalg.slogdet(M)[1],
    "trace": lambda xp, M, b: xp.trace(M),
    "diag": lambda xp, M, b: (xp.diagonal(M) * b).sum(),
}
WITH_GRADIENTS = ("Dense", "Kron", "BTT", "Monarch", "BlockDiag", "Einsum", "Circulant", "Toeplitz", "TT", "Diagonal")


@pytest.mark.torch
@pytest.mark.parametrize("verb", SCALARS)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_those_of_the_matrix_in_torch(name: str, verb: str) -> None:
    import torch

    A, M = fitting(name)
    b = torch.linspace(1, 2, len(M), dtype=torch.float64)
    leaves, unflatten = A.flatten()
    through_rule, through_matrix = (
        torch.func.grad(lambda parts, f=f: f(unflatten(parts)))(leaves)
        for f in (lambda A: SCALARS[verb](A, b), lambda A: DENSE[verb](torch, A.to_dense(), b))
    )
    for mine, other in zip(through_rule, through_matrix, strict=True):
        assert close(mine, other.numpy(), 1e-7)


@pytest.mark.jax
@pytest.mark.parametrize("name", ["Kron", "BTT", "BlockDiag", "Circulant", "Toeplitz"])
def test_gradients_are_those_of_the_matrix_in_jax(name: str) -> None:
    import jax
    import jax.numpy as jnp

    A, M = fitting(name, "jax")
    b = jnp.linspace(1, 2, len(M))

    def of_all(A: Any) -> Any:
        return sum(f(A, b) for f in SCALARS.values())

    def of_matrix(A: Any) -> Any:
        return sum(f(jnp, A.to_dense(), b) for f in DENSE.values())

    # Not compiled: without optimisations, as in the tests, XLA refuses FFTs of transposed arrays.
    mine, other = (jax.tree.leaves(jax.grad(f)(A)) for f in (of_all, of_matrix))
    assert all(close(x, np.asarray(y), 1e-7) for x, y in zip(mine, other, strict=True))


# ------------------------------------------------------------------------------------------- what falls through to CoLA

SOLVERS = {
    "CG": lambda A: linalg.inv(cola.PSD(A), linalg.CG(tol=1e-12)),
    "GMRES": lambda A: linalg.inv(A, linalg.GMRES(tol=1e-12)),
    "LU": lambda A: linalg.inv(A, linalg.LU()),
    "Cholesky": lambda A: linalg.inv(cola.PSD(A), linalg.Cholesky()),
}


def positive_chain(factor: Any) -> Any:
    """``F^T F + 2 I`` for a structure without a direct inverse."""
    F = so.Einsum([factor], "cd, ad -> ac", {"c": 2})
    return F.T @ F + 2 * so.Identity(F.shape[1], like=factor)


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_iterative_solves_have_gradients_of_operator_and_right_hand_side(solver: str, backend: str) -> None:
    factor, b = array(backend, "float64", 3, 3), array(backend, "float64", 6, seed=1)
    xp = __import__("torch") if backend == "torch" else __import__("jax").numpy

    def ours(factor: Any, b: Any) -> Any:
        return ((SOLVERS[solver](positive_chain(factor)) @ b) ** 2).sum()

    def dense(factor: Any, b: Any) -> Any:
        M = xp.kron(xp.eye(2, dtype=factor.dtype), factor.T @ factor) + 2 * xp.eye(6, dtype=factor.dtype)
        return (xp.linalg.solve(M, b[:, None]) ** 2).sum()

    grad = __import__("torch").func.grad if backend == "torch" else __import__("jax").grad
    for position in ({"argnums": 0}, {"argnums": 1}):
        assert close(grad(ours, **position)(factor, b), to_numpy(grad(dense, **position)(factor, b)), 1e-5)


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize(
    ("verb", "name"),
    [
        (lambda A: (linalg.sqrt(cola.PSD(A), linalg.Lanczos()) @ ones(A)).sum(), "Lanczos"),
        (lambda A: (linalg.exp(A, linalg.Arnoldi()) @ ones(A)).real.sum(), "Arnoldi"),
        (lambda A: linalg.eig(cola.PSD(A), 2, "LM", linalg.Lanczos())[0].sum(), "Lanczos"),
        (lambda A: linalg.eig(A, 2, "LM", linalg.Arnoldi())[0].real.sum(), "Arnoldi"),
    ],
)
def test_krylov_methods_give_values_and_say_that_they_have_no_gradient(verb: Any, name: str, backend: str) -> None:
    factor = array(backend, "float64", 3, 3)
    value = verb(positive_chain(factor))
    assert np.isfinite(float(value))
    grad = __import__("torch").func.grad if backend == "torch" else __import__("jax").grad
    with pytest.raises(so.GradientError, match=f"by {name} has no gradient.*Eigh"):
        grad(lambda factor: verb(positive_chain(factor)))(factor)


def ones(A: Any) -> Any:
    return np_like(A, np.ones(A.shape[1]))


@pytest.mark.parametrize("backend", LIBRARIES)
def test_krylov_eigenvalues_are_the_largest(backend: str) -> None:
    """With more steps than rows, CoLA alone would return zeros."""
    A = positive_chain(array(backend, "float64", 3, 3))
    wanted = np.sort(np.linalg.eigvalsh(to_numpy(A.to_dense())))
    for algorithm in (linalg.Arnoldi(), linalg.Lanczos()):
        values, _ = linalg.eig(cola.PSD(A), 1, "LM", algorithm)
        assert close(np.real(to_numpy(values)), wanted[-1:], 1e-6)


# -------------------------------------------------------------------------------------------- rank reduction and errors


@pytest.mark.torch
@given(
    st.integers(0, 2**32 - 1), st.sampled_from(["LowRank", "TT", "BTT", "Monarch"]), st.integers(1, 3), st.booleans()
)
@settings(max_examples=60)
def test_rank_reduction_states_its_error(seed: int, name: str, rank: int, transposed: bool) -> None:
    case = {
        "LowRank": Case(so.LowRank, ((5, 4), (4, 6))),
        "TT": Case(so.TT, (tt_cores((2, 3, 2), (3, 2, 2), 4, 3),)),
        "BTT": Case(so.BTT, (btt_cores((2, 3, 2), (3, 2, 2), 4, 3),)),
        "Monarch": Case(so.Monarch, ((2, 4, 6), (2, 6, 3))),
    }[name]
    A, M = built(case, "torch", "float64", transposed, seed)
    B, error, optimality = so.compress(A, rank)
    assert type(B) is type(A)
    assert B.is_transposed == A.is_transposed
    assert close(error, np.linalg.norm(M - to_numpy(B.to_dense())) / np.linalg.norm(M))
    assert optimality == ("quasi" if name in ("TT", "BTT") else "exact")
    assert so.num_params(B) <= so.num_params(A)
    assert close(A.round(rank).to_dense(), to_numpy(B.to_dense()))
    assert float(so.compress(A, 10).error) <= 1e-12


@pytest.mark.torch
def test_rank_reduction_of_two_factors_is_optimal() -> None:
    """Against numpy: the best low rank, and the best rank of every block."""
    A, M = built(Case(so.LowRank, ((6, 4), (4, 7))), "torch", "float64")
    values = np.linalg.svd(M, compute_uv=False)
    assert close(so.compress(A, 2).error, np.linalg.norm(values[2:]) / np.linalg.norm(values))
    B, N = built(Case(so.BTT, (btt_cores((4, 2), (3, 5), 3),)), "torch", "float64")
    blocks = N.reshape(4, 2, 3, 5).transpose(1, 2, 0, 3)
    left = np.linalg.svd(blocks, compute_uv=False)[..., 1:]
    assert close(so.compress(B, 1).error, np.linalg.norm(left) / np.linalg.norm(N))


@pytest.mark.torch
def test_ranks_of_sums_come_back() -> None:
    A = fitting("TT")[0]
    B = so.compress(A + A.untransposed() * 3 - 2 * A, A.ranks[0])
    assert B.operator.ranks == A.ranks
    assert float(B.error) < 1e-12


@pytest.mark.torch
def test_errors_say_what_would_work() -> None:
    import torch

    wide = so.LowRank(torch.ones(2, 1), torch.ones(1, 3))
    for verb in (linalg.inv, linalg.slogdet, linalg.trace, linalg.exp, lambda A: linalg.eig(A, 1, "LM"), linalg.sqrt):
        with pytest.raises(so.ShapeError, match="square"):
            verb(wide)
    half = so.Circulant(torch.ones(4, dtype=torch.bfloat16))
    for verb in (linalg.inv, linalg.pinv, linalg.slogdet, linalg.exp, so.svd, lambda A: linalg.eig(A, 4, "LM")):
        with pytest.raises(so.BackendError, match="float32"):
            verb(half)
    with pytest.raises(so.BackendError, match="float32"):
        so.compress(so.LowRank(torch.ones(4, 2).half(), torch.ones(2, 4).half()), 1)
    with pytest.raises(so.StructureError, match="no rank to reduce"):
        so.compress(so.Circulant(torch.ones(4)), 1)
    for rank in (0, -1, 1.5, True, ()):
        with pytest.raises(so.StructureError, match="whole number"):
            so.compress(wide, rank)  # type: ignore[arg-type]
    with pytest.raises(so.StructureError, match="1 bonds, got 2 ranks"):
        so.compress(wide, (1, 1))
    with pytest.warns(so.DensifyWarning, match="Toeplitz.*4 x 4"):
        so.svd(so.Toeplitz(torch.arange(4.0), torch.arange(4.0)))
    for A, why in (
        (so.Kron(torch.ones(2, 3), torch.ones(3, 2)), "not square"),
        (so.BlockDiag(torch.ones(2, 3), torch.ones(3, 2)), "not square"),
        (so.LowRank(torch.ones(3, 2), torch.ones(2, 3)), "caps the rank at 2"),
        (so.Dense(torch.ones(3, 2)) @ so.Dense(torch.ones(2, 3)), "cap the rank at 2"),
    ):
        with pytest.raises(so.StructureError, match=why):
            linalg.inv(A)
        assert float(linalg.logdet(A)) == -np.inf


@pytest.mark.torch
def test_properties_choose_the_algorithm_and_survive_it() -> None:
    import torch

    W = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    K = so.Kron(cola.PSD(so.Dense(W)), cola.PSD(so.Dense(W)))
    for A in (K, linalg.inv(K), linalg.sqrt(K)):
        assert type(A) is so.Kron
        assert A.isa(cola.PSD)
        assert A.is_chain
    P = so.Permutation(torch.tensor([1, 2, 0]))
    assert type(linalg.inv(P)) is so.Permutation
    assert linalg.inv(P).isa(cola.Unitary)
    Q = cola.Unitary(so.Dense(torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q))
    assert type(linalg.inv(Q)) is so.Dense
    assert close((linalg.inv(Q) @ Q).to_dense(), np.eye(3))


@pytest.mark.torch
def test_a_zero_eigenvalue_gives_the_determinant_of_numpy() -> None:
    import torch

    for A in (so.Diagonal(torch.tensor([2.0, 0.0])), so.Circulant(torch.ones(4))):
        sign, log = linalg.slogdet(A)
        assert (float(sign), float(log)) == (0, -np.inf)
