"""The laws of an operator, each a function of the operator and of the matrix that it should be.

All of them together are `assert_operator_valid`.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from operator import matmul
from typing import Any

import numpy as np

from structops.algebra.counting import factors, flops, macs, num_params
from structops.algebra.product import Product
from structops.algebra.sum import Sum
from structops.errors import BackendError, ShapeError
from structops.operators.dense import Dense
from structops.testing.arrays import assert_close, name_of, normal, to_backend, to_numpy

Matrix = np.ndarray
Check = Callable[..., None]
Map = Callable[[Any], Any]


def backend_of(A: Any) -> str:
    """The library that an operator computes with."""
    return "torch" if "torch" in A.xnp.__name__ else "jax"


def draw_like(A: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A Gaussian array of the library and dtype of an operator."""
    return to_backend(normal(rng, shape, A.dtype), backend_of(A), name_of(A.dtype))


def norm(M: Any) -> float:
    """The largest singular value of a matrix, the length of a vector, the root of the sum of squares beyond."""
    M = to_numpy(M)
    return float(np.linalg.norm(M, 2) if M.ndim == 2 and M.size else np.linalg.norm(M.ravel()))


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _raises(error: type[Exception], call: Callable[[], Any], *mentioned: Any) -> None:
    """``call`` raises exactly this error, and the message mentions what was expected and what came."""
    try:
        result = call()
    except error as raised:
        for what in mentioned:
            _require(str(what) in str(raised), f"{error.__name__} should mention {what}: {raised}")
        return
    raise AssertionError(f"expected {error.__name__}, got {result!r}")


# --------------------------------------------------------------------------------------------------- value and products


def check_dense(A: Any, M: Matrix, seed: int = 0) -> None:
    """``A.to_dense()`` is the matrix: one array of the operator's shape and dtype, contiguous in torch."""
    dense = A.to_dense()
    assert_close(dense, M, scale=norm(M), what=f"{A!r}.to_dense()")
    _require(tuple(A.shape) == M.shape, f"{A!r}: expected shape {M.shape}, got {tuple(A.shape)}")
    _require(dense.dtype == A.dtype, f"{A!r}.to_dense() has dtype {dense.dtype}")
    _require(backend_of(A) == "jax" or dense.is_contiguous(), f"{A!r}.to_dense() is not contiguous")


def check_right_products(A: Any, M: Matrix, seed: int = 0) -> None:
    """``A @ x`` and ``A @ X`` are those of the matrix, for no column as well as for many."""
    rng = np.random.default_rng(seed)
    for shape in ((M.shape[1],), (M.shape[1], 3), (M.shape[1], 0)):
        _check_product(f"{A!r} @ x of shape {shape}", lambda x: A @ x, lambda x: M @ x, M, draw_like(A, rng, shape), A)


def check_left_products(A: Any, M: Matrix, seed: int = 0) -> None:
    """``X @ A`` is that of the matrix under any batch axes, also empty ones."""
    rng = np.random.default_rng(seed)
    for lead in ((), (3,), (2, 3), (0,), (2, 0)):
        x = draw_like(A, rng, (*lead, M.shape[0]))
        _check_product(f"x of shape {x.shape} @ {A!r}", lambda x: x @ A, lambda x: x @ M, M, x, A)


def check_strided(A: Any, M: Matrix, seed: int = 0) -> None:
    """The layout of x in memory does not matter: transposed, every other row or column, expanded."""
    rng = np.random.default_rng(seed)
    rows, cols = M.shape
    wide = draw_like(A, rng, (3, 2 * max(rows, cols)))
    expanded = wide[:1, :1].repeat(2, axis=0) if backend_of(A) == "jax" else wide[:1, :1].expand(2, 1)
    for x in (wide[:, :cols].T, wide[:, ::2][:, :cols].T, wide[::2, :cols].T):
        _check_product(f"{A!r} @ strided", lambda x: A @ x, lambda x: M @ x, M, x, A)
    for x in (wide[:, ::2][:, :rows], wide[::2, :rows], wide.T[:rows].T[None], expanded[:, [0] * rows]):
        _check_product(f"strided @ {A!r}", lambda x: x @ A, lambda x: x @ M, M, x, A)


def _check_product(what: str, product: Map, expected: Map, M: Matrix, x: Any, A: Any) -> None:
    y = product(x)
    assert_close(y, expected(to_numpy(x)), scale=norm(M) * float(np.linalg.norm(to_numpy(x).ravel())), what=what)
    _require(y.dtype == A.dtype, f"{what}: expected {A.dtype}, got {y.dtype}")


# ------------------------------------------------------------------------------------------------ transpose and adjoint


def check_transpose(A: Any, M: Matrix, seed: int = 0) -> None:
    """``A.T`` is the transposed matrix in the same class, and ``A.T.T`` is ``A``."""
    for name, view in (("A.T", A.T), ("A.T.T", A.T.T)):
        _require(type(view) is type(A), f"{name} of {A!r} is a {type(view).__name__}")
    for check in (check_dense, check_right_products, check_left_products):
        check(A.T, M.T, seed)
    _require(np.array_equal(to_numpy(A.T.T.to_dense()), to_numpy(A.to_dense())), f"{A!r} is not its double transpose")


def check_adjoint(A: Any, M: Matrix, seed: int = 0) -> None:
    """``A.H`` is the conjugate transpose in the same class, and ``A.H.H`` is ``A``."""
    _require(type(A.H) is type(A), f"A.H of {A!r} is a {type(A.H).__name__}")
    for check in (check_dense, check_right_products, check_left_products):
        check(A.H, M.conj().T, seed)
    check_dense(A.H.H, M)


def dot_test(A: Any, M: Matrix | None = None, seed: int = 0) -> None:
    """``<A x, y> = <x, A^H y>``, and ``(y^T A) x = y^T (A x)``; needs no matrix."""
    rng = np.random.default_rng(seed)
    x, y = draw_like(A, rng, (A.shape[1],)), draw_like(A, rng, (A.shape[0],))
    forward, backward, left = map(to_numpy, (A @ x, A.H @ y, y @ A))
    u, v = to_numpy(x), to_numpy(y)
    scale = norm(forward) * norm(v) + norm(backward) * norm(u)
    assert_close(
        np.vdot(forward, v), np.vdot(u, backward), scale=scale, dtype=A.dtype, what=f"<A x, y> and <x, A^H y> of {A!r}"
    )
    assert_close(left @ u, v @ forward, scale=scale, dtype=A.dtype, what=f"(y^T A) x and y^T (A x) of {A!r}")


# --------------------------------------------------------------------------------------------------- copies and pytrees


def check_pytree(A: Any, M: Matrix, seed: int = 0) -> None:
    """The library's pytrees and CoLA's take the operator apart and put it together, twice."""
    for flatten, unflatten in _pytrees(backend_of(A)):
        leaves, tree = flatten(A)
        again = unflatten(leaves, tree)
        _check_same(again, A)
        leaves_again, tree_again = flatten(again)
        _require(tree_again == tree, f"{A!r}: the tree changes from {tree} to {tree_again}")
        _require(len(leaves_again) == len(leaves), f"{A!r}: the leaves change")
        _require(all(hasattr(leaf, "dtype") for leaf in leaves), f"{A!r}: a leaf is no array")


def _pytrees(backend: str) -> Iterable[tuple[Callable[..., Any], Callable[..., Any]]]:
    if backend == "jax":
        tree_util = importlib.import_module("jax").tree_util
        yield tree_util.tree_flatten, lambda leaves, tree: tree_util.tree_unflatten(tree, leaves)
        return
    pytree, optree = importlib.import_module("torch.utils._pytree"), importlib.import_module("optree")
    yield pytree.tree_flatten, pytree.tree_unflatten
    yield (
        lambda A: optree.tree_flatten(A, namespace="cola"),
        lambda leaves, tree: optree.tree_unflatten(tree, leaves),
    )


def check_copies(A: Any, M: Matrix, seed: int = 0) -> None:
    """``copy.copy``, ``copy.deepcopy`` and ``pickle`` give an equal operator."""
    for again in (copy.copy(A), copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        _check_same(again, A)


def _check_same(B: Any, A: Any) -> None:
    _require(type(B) is type(A), f"{A!r} became a {type(B).__name__}")
    _require(B.dtype == A.dtype and tuple(B.shape) == tuple(A.shape), f"{A!r} became {B!r}")
    _require(B.annotations == A.annotations, f"{A!r}: {A.annotations} became {B.annotations}")
    _require(np.array_equal(to_numpy(B.to_dense()), to_numpy(A.to_dense())), f"a copy of {A!r} is another matrix")


# ---------------------------------------------------------------------------------------------- indices, sizes and text


def check_indexing(A: Any, M: Matrix, seed: int = 0) -> None:
    """Rows, columns and entries are arrays, slices are operators, and an index beyond the end raises."""
    rows, cols = M.shape
    scale = norm(M)
    for i, j in ((0, 0), (rows - 1, cols - 1), (-1, -1), (rows // 2, -cols)):
        for name, index in (("i", i), ("i, :", (i, slice(None))), (":, j", (slice(None), j)), ("i, j", (i, j))):
            assert_close(A[index], M[index], scale=scale, what=f"A[{name}] of {A!r} at {i}, {j}")
    pairs = [0, -1], [-1, 0]
    assert_close(A[pairs], M[pairs], scale=scale, what=f"A[list, list] of {A!r}")
    for index in (slice(0, 2), (slice(None), slice(1, None)), (slice(None, None, 2), slice(-2, None))):
        part = M[index]
        if part.size:
            assert_close(A[index].to_dense(), part, scale=scale, what=f"A[{index}] of {A!r}")
    for beyond in (rows, -rows - 1, (0, cols), (slice(None), cols)):
        _raises(IndexError, partial(A.__getitem__, beyond))


def check_sizes(A: Any, M: Matrix, seed: int = 0) -> None:
    """Every wrong size is a `ShapeError` that says what was expected and what came."""
    rows, cols = M.shape
    rng = np.random.default_rng(seed)
    for shape in ((cols + 1,), (cols + 1, 2), (2, cols, 1), ()):
        _raises(ShapeError, partial(matmul, A, draw_like(A, rng, shape)), cols, shape)
    for shape in ((rows + 1,), (2, rows + 1), (rows, 2, rows + 1), ()):
        _raises(ShapeError, partial(matmul, draw_like(A, rng, shape), A), rows, shape)
    B, C = Dense(draw_like(A, rng, (cols + 1, 2))), Dense(draw_like(A, rng, (2, rows + 1)))
    _raises(ShapeError, partial(matmul, A, B), cols, cols + 1)
    _raises(ShapeError, partial(matmul, C, A), rows, rows + 1)


def check_foreign_arrays(A: Any, M: Matrix, seed: int = 0) -> None:
    """A numpy array is a `BackendError` that names the two conversions."""
    hints = "torch.from_numpy", "jnp.asarray"
    _raises(BackendError, partial(matmul, A, np.ones(M.shape[1])), *hints)
    _raises(BackendError, partial(matmul, np.ones(M.shape[0]), A), *hints)


def check_repr(A: Any, M: Matrix, seed: int = 0) -> None:
    """One line with the class, the shape and the dtype, and no numbers out of the arrays."""
    text = repr(A)
    _require("\n" not in text, f"the repr has more than one line: {text}")
    for part in (type(A).__name__, "x".join(map(str, M.shape)), str(A.dtype)):
        _require(part in text, f"the repr should mention {part}: {text}")
    leaves, unflatten = A.flatten()
    _require(repr(unflatten([0 * leaf for leaf in leaves])) == text, f"the repr depends on the numbers: {text}")


def check_counts(A: Any, M: Matrix, seed: int = 0) -> None:
    """FLOPs are twice the MACs; transposes and multiples have the same parameters, and sharing an operator adds none.

    ``A.T @ A`` may be of another structure, and has the parameters of that.
    """
    for B in (A, A.T @ A):
        _require(flops(B) == 2 * macs(B), f"{B!r}: {flops(B)} FLOPs, {macs(B)} MACs")
    _require(isinstance(factors(A), tuple), f"{A!r}: factors are a {type(factors(A)).__name__}")
    count = num_params(A)
    lazy = {"A.T @ A, not merged,": Product(A.T, A), "A + A, not merged,": Sum(A, A)}
    for what, B in {"A.T": A.T, "A + A": A + A, "2 * A": 2 * A, **lazy}.items():
        _require(num_params(B) == count, f"{what} has {num_params(B)} parameters, {A!r} has {count}")


CHECKS: tuple[Check, ...] = (
    check_dense,
    check_right_products,
    check_left_products,
    check_strided,
    check_transpose,
    check_adjoint,
    dot_test,
    check_pytree,
    check_copies,
    check_indexing,
    check_sizes,
    check_foreign_arrays,
    check_repr,
    check_counts,
)


def assert_operator_valid(operator: Any, dense: Matrix, *, seed: int = 0, checks: Iterable[Check] = CHECKS) -> None:
    """The operator is the matrix and keeps all laws; the way to test an operator of one's own.

    Args:
        operator: A `StructuredOperator`, on either library, of any floating dtype.
        dense: Its matrix, built in another way.
        seed: Of the vectors that it is multiplied with.
        checks: The laws; all of ``CHECKS`` by default.

    Raises:
        AssertionError: A law does not hold; the message says which.

    Example:
        >>> import torch
        >>> from structops import LowRank
        >>> left, right = torch.ones(4, 2), torch.ones(2, 3)
        >>> assert_operator_valid(LowRank(left, right), (left @ right).numpy())
    """
    for check in checks:
        check(operator, np.asarray(dense), seed)
