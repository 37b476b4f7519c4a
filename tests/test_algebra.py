"""Expressions of all structures and verbs: hypothesis draws trees and sizes and a seed, and numpy has the matrix."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import structops as so
from structops.algebra.product import Product
from structops.algebra.sum import Sum
from structops.operator import promoted
from structops.testing import assert_close, to_backend, to_numpy
from structops.testing.arrays import dtype_of, normal
from structops.testing.cases import leaves, with_leaf
from structops.testing.checks import check_copies, check_pytree, draw_like, norm
from structops.testing.strategies import cases_of_shape, dtypes, seeds

EXAMPLES = settings().max_examples
SIZES = st.integers(1, 6)
Draw = Callable[[st.SearchStrategy[Any]], Any]


# ------------------------------------------------------------------------------------------------------------ the trees


@dataclass(frozen=True)
class Tree:
    """A verb on other trees or cases; ``value`` is the number, the slices, or whether it is an array."""

    verb: str
    parts: tuple[Any, ...]
    value: Any = None

    def draw(self, rng: np.random.Generator, backend: str, dtype: str) -> tuple[Any, ...]:
        """The arguments of all cases; last the number, where it is an array."""
        drawn = tuple(part.draw(rng, backend, dtype) for part in self.parts)
        return (*drawn, to_backend(normal(rng, ()), backend, dtype)) if self.verb == "array *" else drawn

    def operator(self, arguments: Any) -> Any:
        """The operator of drawn arguments."""
        A, *others = [part.operator(given) for part, given in zip(self.parts, arguments, strict=False)]
        B = others[0] if others else None
        return {
            "@": lambda: A @ B,
            "+": lambda: A + B,
            "-": lambda: A - B,
            "T": lambda: A.T,
            "H": lambda: A.H,
            "*": lambda: self.value * A,
            # The number is cast to the dtype of A, and permutations are in single precision.
            "array *": lambda: arguments[-1] * promoted(A, [A, arguments[-1]]),
            "/": lambda: A / 4,
            "gram": lambda: A.T @ A,
            "doubled": lambda: A + A,
            "kron": lambda: so.kron(A, B),
            "BlockDiag": lambda: so.BlockDiag(A, B),
            "slice": lambda: A[self.value],
        }[self.verb]()

    def dense(self, arguments: Any) -> np.ndarray:
        """The matrix of drawn arguments."""
        M, *others = [part.dense(given) for part, given in zip(self.parts, arguments, strict=False)]
        N = others[0] if others else None
        return {
            "@": lambda: M @ N,
            "+": lambda: M + N,
            "-": lambda: M - N,
            "T": lambda: M.T,
            "H": lambda: M.conj().T,
            "*": lambda: self.value * M,
            "array *": lambda: to_numpy(arguments[-1]) * M,
            "/": lambda: M / 4,
            "gram": lambda: M.T @ M,
            "doubled": lambda: M + M,
            "kron": lambda: np.kron(M, N),
            "BlockDiag": lambda: scipy.linalg.block_diag(M, N),
            "slice": lambda: M[self.value],
        }[self.verb]()

    def bound(self, arguments: Any) -> float:
        """Product and sum of the norms of everything that is multiplied and added, which rounding is relative to."""
        a, *others = [bound(part, given) for part, given in zip(self.parts, arguments, strict=False)]
        b = others[0] if others else 1.0
        number = self.value if self.verb == "*" else to_numpy(arguments[-1]) if self.verb == "array *" else 1
        if self.verb in ("+", "-", "BlockDiag", "doubled"):
            return a + b + a
        return a * a if self.verb == "gram" else float(abs(number)) * a * b


def bound(tree: Any, arguments: Any) -> float:
    """The bound of a tree; of a case the norm that its matrix would have if no summands cancelled."""
    if isinstance(tree, Tree):
        return tree.bound(arguments)
    absolute = copy.copy(arguments)
    for k, leaf in enumerate(leaves(arguments)):
        absolute = with_leaf(absolute, k, np.abs(to_numpy(leaf)))
    return 1.0 + float(np.linalg.norm(tree.dense(absolute)))


@st.composite
def trees(draw: Draw, rows: int, cols: int, depth: int, *, numbers: tuple[Any, ...] = (2, -0.5, 1.5j)) -> Any:
    """Trees of this shape and depth."""

    def below(m: int, n: int) -> Any:
        return draw(trees(m, n, draw(st.integers(0, depth - 1)), numbers=numbers))

    if depth == 0:
        return draw(cases_of_shape(rows, cols))
    verbs = ["@", "@", "+", "+", "-", "T", "H", "*", "array *", "/", "doubled", "kron", "slice"]
    verbs += ["gram"] if rows == cols else []
    verbs += ["BlockDiag"] if min(rows, cols) > 1 else []
    verb = draw(st.sampled_from(verbs))
    if verb == "@":
        inner = draw(SIZES)
        return Tree(verb, (below(rows, inner), below(inner, cols)))
    if verb in ("+", "-"):
        return Tree(verb, (below(rows, cols), below(rows, cols)))
    if verb in ("T", "H"):
        return Tree(verb, (below(cols, rows),))
    if verb == "gram":
        return Tree(verb, (below(draw(SIZES), cols),))
    if verb == "kron":
        a, c = (draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in (rows, cols))
        return Tree(verb, (below(a, c), below(rows // a, cols // c)))
    if verb == "BlockDiag":
        a, c = draw(st.integers(1, rows - 1)), draw(st.integers(1, cols - 1))
        return Tree(verb, (below(a, c), below(rows - a, cols - c)))
    if verb == "slice":
        i, j, after = draw(st.integers(0, 2)), draw(st.integers(0, 1)), draw(st.integers(0, 1))
        index = slice(i, i + rows), slice(j, j + cols)
        return Tree(verb, (below(i + rows + after, j + cols),), index)
    return Tree(verb, (below(rows, cols),), draw(st.sampled_from(numbers)) if verb == "*" else None)


def any_tree(depth: int = 2, **options: Any) -> st.SearchStrategy[Any]:
    """Trees of any shape."""
    return st.tuples(SIZES, SIZES).flatmap(lambda shape: trees(*shape, depth, **options))


def assert_is(A: Any, M: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """The value, and products from both sides, vectors, matrices and batches."""
    x, Y = draw_like(A, rng, (M.shape[1],)), draw_like(A, rng, (2, M.shape[0]))
    assert tuple(A.shape) == M.shape
    assert_close(A.to_dense(), M, scale=scale)
    assert_close(A @ x, M @ to_numpy(x), scale=scale * norm(x))
    assert_close(Y @ A, to_numpy(Y) @ M, scale=scale * norm(Y))


# ---------------------------------------------------------------------------------------------------------- expressions


@pytest.mark.torch
@settings(max_examples=max(300, EXAMPLES))
@given(any_tree(), dtypes("float64", "complex128", "float32"), seeds())
def test_expressions_are_those_of_matrices(tree: Any, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arguments = tree.draw(rng, "torch", dtype)
    A, M, scale = tree.operator(arguments), tree.dense(arguments), 10 * bound(tree, arguments)
    assert_is(A, M, scale, rng)
    assert_close(A.T.to_dense(), M.T, scale=scale)
    assert_close(A.H.to_dense(), M.conj().T, scale=scale)
    assert so.flops(A) == 2 * so.macs(A)
    assert so.num_params(A) >= 0


@pytest.mark.jax
@settings(max_examples=max(1, EXAMPLES // 5))
@given(any_tree(), dtypes("float64", "complex128"), seeds())
def test_expressions_are_those_of_matrices_under_jit(tree: Any, dtype: str, seed: int) -> None:
    import jax

    rng = np.random.default_rng(seed)
    arguments = tree.draw(rng, "jax", dtype)
    M, scale = tree.dense(arguments), 10 * bound(tree, arguments)
    x, y = (to_backend(normal(rng, (size,), dtype), "jax", dtype) for size in M.shape[::-1])

    @jax.jit
    def products(arguments: Any, x: Any, y: Any) -> Any:
        A = tree.operator(arguments)
        return A @ x, y @ A

    right, left = products(arguments, x, y)
    assert_close(right, M @ to_numpy(x), scale=scale * norm(x))
    assert_close(left, to_numpy(y) @ M, scale=scale * norm(y))


@pytest.mark.torch
@given(any_tree(numbers=(2, -0.5)), seeds())
def test_gradients_of_every_array_in_torch(tree: Any, seed: int) -> None:
    import torch

    rng = np.random.default_rng(seed)
    arguments = tree.draw(rng, "torch", "float64")
    free = [leaf.requires_grad_() for leaf in leaves(arguments) if leaf.is_floating_point()]
    if free:
        x, y = (torch.from_numpy(rng.standard_normal(size)) for size in tree.dense(arguments).shape[::-1])
        A = tree.operator(arguments)
        loss = (y @ (A @ x) + (y @ A) @ x) / 2
        # Zeros have no gradient at all, and neither has the head of a Toeplitz matrix's row.
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True)
        else:
            gradients = tuple(map(torch.zeros_like, free))
        assert_gradients(tree, arguments, gradients, x, y, rng)


@pytest.mark.jax
@settings(max_examples=max(1, EXAMPLES // 6))
@given(any_tree(numbers=(2, -0.5)), seeds())
def test_gradients_of_every_array_in_jax(tree: Any, seed: int) -> None:
    import jax

    rng = np.random.default_rng(seed)
    arguments = tree.draw(rng, "jax", "float64")
    free = {k: leaf for k, leaf in enumerate(leaves(arguments)) if leaf.dtype.kind == "f"}
    x, y = (jax.numpy.asarray(rng.standard_normal(size)) for size in tree.dense(arguments).shape[::-1])

    def loss(free: dict[int, Any]) -> Any:
        filled = arguments
        for k, array in free.items():
            filled = with_leaf(filled, k, array)
        A = tree.operator(filled)
        return (y @ (A @ x) + (y @ A) @ x) / 2

    gradients = jax.jit(jax.grad(loss))(free)
    assert_gradients(tree, arguments, [gradients[k] for k in free], x, y, rng)


def assert_gradients(tree: Any, arguments: Any, gradients: Any, x: Any, y: Any, rng: np.random.Generator) -> None:
    """Along a random direction, the derivative is a central difference of matrices, which is exact for quadratics."""
    quartic = tree_degree(tree) > 2
    remaining = iter(gradients)
    for k, leaf in enumerate(leaves(arguments)):
        array = to_numpy(leaf)
        if array.dtype.kind in "iu":
            continue
        v, received = rng.standard_normal(array.shape), to_numpy(next(remaining))
        h = 1e-3 if quartic else 1.0
        ahead, behind = (tree.dense(with_leaf(arguments, k, array + step * v)) for step in (h, -h))
        expected = to_numpy(y) @ (ahead - behind) @ to_numpy(x) / (2 * h)
        scale = 100 * bound(tree, with_leaf(arguments, k, np.abs(array) + np.abs(v))) * (1 + norm(x)) * (1 + norm(y))
        scale *= 1e6 if quartic else 1.0  # the error of the difference, not of the gradient
        assert_close(np.vdot(received, v), expected, scale=scale, dtype="float64")


def tree_degree(tree: Any) -> int:
    """How often an array is multiplied with itself, at most."""
    if not isinstance(tree, Tree):
        return 1
    return max(map(tree_degree, tree.parts)) * (2 if tree.verb == "gram" else 1)


# ----------------------------------------------------------------------------------------------------------------- laws

# Shapes in letters, and two sides that are equal, of four operators of these shapes and a number.
LAWS: dict[str, tuple[tuple[str, ...], Callable[..., Any], Callable[..., Any]]] = {
    "(AB)C = A(BC)": (("mk", "kl", "ln"), lambda c, A, B, C: (A @ B) @ C, lambda c, A, B, C: A @ (B @ C)),
    "A(B+C) = AB + AC": (("mk", "kn", "kn"), lambda c, A, B, C: A @ (B + C), lambda c, A, B, C: A @ B + A @ C),
    "(A+B)C = AC + BC": (("mk", "mk", "kn"), lambda c, A, B, C: (A + B) @ C, lambda c, A, B, C: A @ C + B @ C),
    "(A+B)+C = A+(B+C)": (("mn", "mn", "mn"), lambda c, A, B, C: (A + B) + C, lambda c, A, B, C: A + (B + C)),
    "A+B = B+A": (("mn", "mn"), lambda c, A, B: A + B, lambda c, A, B: B + A),
    "A-B = -(B-A)": (("mn", "mn"), lambda c, A, B: A - B, lambda c, A, B: -(B - A)),
    "(AB)' = B'A'": (("mk", "kn"), lambda c, A, B: (A @ B).T, lambda c, A, B: B.T @ A.T),
    "(AB)* = B*A*": (("mk", "kn"), lambda c, A, B: (A @ B).H, lambda c, A, B: B.H @ A.H),
    "(A+B)* = A* + B*": (("mn", "mn"), lambda c, A, B: (A + B).H, lambda c, A, B: A.H + B.H),
    "(cA)* = c'A*": (("mn",), lambda c, A: (c * A).H, lambda c, A: np.conj(c) * A.H),
    "c(A+B) = cA + cB": (("mn", "mn"), lambda c, A, B: c * (A + B), lambda c, A, B: c * A + B * c),
    "c(AB) = (cA)B": (("mk", "kn"), lambda c, A, B: c * (A @ B), lambda c, A, B: (c * A) @ B),
    "c(AB) = A(cB)": (("mk", "kn"), lambda c, A, B: c * (A @ B), lambda c, A, B: A @ (c * B)),
    "c(3A) = (3c)A": (("mn",), lambda c, A: c * (3 * A), lambda c, A: (3 * c) * A),
    "(A/2)+(A/2) = A": (("mn",), lambda c, A: A / 2 + A / 2, lambda c, A: A),
    "A - A = 0": (("mn",), lambda c, A: A - A, lambda c, A: 0 * A),
    "(AxB)(CxD) = ACxBD": (
        ("ab", "kl", "bc", "lm"),
        lambda c, A, B, C, D: so.kron(A, B) @ so.kron(C, D),
        lambda c, A, B, C, D: so.kron(A @ C, B @ D),
    ),
    "(AxB)xC = Ax(BxC)": (
        ("ab", "kl", "mn"),
        lambda c, A, B, C: so.kron(so.kron(A, B), C),
        lambda c, A, B, C: so.kron(A, so.kron(B, C)),
    ),
    "(AxB)* = A*xB*": (("ab", "kl"), lambda c, A, B: so.kron(A, B).H, lambda c, A, B: so.kron(A.H, B.H)),
    "(A+B)xC = AxC + BxC": (
        ("ab", "ab", "kl"),
        lambda c, A, B, C: so.kron(A + B, C),
        lambda c, A, B, C: so.kron(A, C) + so.kron(B, C),
    ),
    "c(AxB) = Ax(cB)": (("ab", "kl"), lambda c, A, B: c * so.kron(A, B), lambda c, A, B: so.kron(A, c * B)),
}


@pytest.mark.torch
@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=max(1, EXAMPLES // 2))
@given(data=st.data())
def test_laws(law: str, data: st.DataObject) -> None:
    shapes, left, right = LAWS[law]
    limit = 3 if "x" in law else 5
    size = {letter: data.draw(st.integers(1, limit), label=letter) for letter in sorted(set("".join(shapes)))}
    cases = [data.draw(cases_of_shape(*(size[letter] for letter in shape))) for shape in shapes]
    c, dtype, seed = (
        data.draw(st.sampled_from([2, -0.5, 1.5j])),
        data.draw(dtypes("float64", "complex128")),
        data.draw(seeds()),
    )
    rng = np.random.default_rng(seed)
    drawn = [case.draw(rng, "torch", dtype) for case in cases]
    operators = [case.operator(arguments) for case, arguments in zip(cases, drawn, strict=True)]
    # Sums of products are bounded by the product of all, since no bound is below 1.
    scale = 100 * math.prod(bound(case, arguments) for case, arguments in zip(cases, drawn, strict=True))
    first, second = left(c, *operators), right(c, *operators)
    assert_close(first.to_dense(), to_numpy(second.to_dense()), scale=scale)
    x = draw_like(first, rng, (first.shape[1],))
    assert_close(first @ x, to_numpy(second @ x), scale=scale * norm(x))


# ------------------------------------------------------------------------------------- copies, compilers, odd arguments


def lazy(backend: str, dtype: str = "float64") -> dict[str, tuple[Any, np.ndarray]]:
    """Products and sums that stay lazy, of one and of two levels."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return to_backend(normal(rng, shape, dtype), backend, dtype)

    D, C, K = so.Dense(array(4, 4)), so.Circulant(array(4)), so.Kron(array(2, 2), array(2, 2))
    P = so.Permutation(to_backend(np.array([2, 0, 3, 1]), backend), dtype=dtype_of(backend, dtype))
    d, c, k, p = (to_numpy(A.to_dense()) for A in (D, C, K, P))
    found = {
        "product": (D @ C, d @ c),
        "sum": (D + C, d + c),
        "product of sums": ((D + C) @ (K + P), (d + c) @ (k + p)),
        "sum of products": (D @ C + P @ K, d @ c + p @ k),
        "scaled": (2 * (P @ K), 2 * p @ k),
        "transpose": ((C @ D).T + K, (c @ d).T + k),
    }
    assert all(isinstance(A, Product | Sum) for A, _ in found.values())
    return found


@pytest.mark.parametrize("name", ["product", "sum", "product of sums", "sum of products", "scaled", "transpose"])
def test_lazy_results_are_copied_and_pickled(name: str, backend: str) -> None:
    A, M = lazy(backend)[name]
    for check in (check_copies, check_pytree):
        check(A, M)
    assert so.num_params(copy.deepcopy(A)) == so.num_params(pickle.loads(pickle.dumps(A))) == so.num_params(A)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["product of sums", "transpose"])
def test_lazy_results_compile_as_one_graph(name: str) -> None:
    import torch

    torch._dynamo.reset()  # it stops after some recompilations of one function
    A, M = lazy("torch")[name]
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 3)))
    right = torch.compile(lambda A, x: A._matmat(x), fullgraph=True, backend="eager")
    left = torch.compile(lambda A, x: A._rmatmat(x.mT), fullgraph=True, backend="eager")
    assert_close(right(A, x), M @ x.numpy(), scale=100 * norm(x))
    assert_close(left(A, x), x.numpy().T @ M, scale=100 * norm(x))


@pytest.mark.jax
def test_a_jitted_function_returns_a_lazy_result_and_does_not_trace_again() -> None:
    import jax

    traces = []

    @jax.jit
    def combined(A: Any, B: Any) -> Any:
        traces.append(A)
        return 2 * (A @ B) + B.T

    for _ in range(2):
        (A, M), (B, N) = lazy("jax")["product"], lazy("jax")["sum"]
        assert_close(combined(A, B).to_dense(), 2 * M @ N + N.T, scale=1000)
    assert len(traces) == 1


@pytest.mark.parametrize("number", [3, -1, 0.25, True, np.float32(0.5), np.int64(3), np.complex64(1j), 2 - 1j])
def test_numbers_of_all_kinds(number: Any, backend: str) -> None:
    for name in ("product", "sum"):
        A, M = lazy(backend)[name]
        for B in (number * A, A * number):
            assert_close(B.to_dense(), number * M, scale=100)
            assert B.dtype == dtype_of(
                backend, "complex128" if isinstance(number, complex | np.complexfloating) else "float64"
            )


def test_arrays_with_axes_are_no_numbers(backend: str) -> None:
    A, _ = lazy(backend)["sum"]
    vector = to_backend(np.ones(4), backend)
    with pytest.raises(so.ShapeError, match=r"\(4,\).*Diagonal"):
        vector * A
    with pytest.raises(so.ShapeError, match=r"\(4,\).*Diagonal"):
        A * vector


def test_sums_begin_at_zero_and_products_of_many_keep_all(backend: str) -> None:
    (A, M), (B, N) = lazy(backend)["product"], lazy(backend)["sum"]
    assert_close(sum([A, B, A]).to_dense(), 2 * M + N, scale=100)
    assert_close((A @ B @ A.T @ B.T).to_dense(), M @ N @ M.T @ N.T, scale=1e5)
    assert isinstance(A - A, so.Zero) or np.allclose(to_numpy((A - A).to_dense()), 0)
