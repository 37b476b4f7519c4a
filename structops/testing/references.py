"""The matrix of every structure, built from its textbook definition by loops over indices or by SciPy.

A reference takes the arguments of the constructor, numpy arrays in place of arrays and dense matrices in place of
operators, and shares no code with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import scipy.linalg

Matrix = np.ndarray
Shape = tuple[int, ...]


def dense(A: Matrix) -> Matrix:
    """The matrix itself."""
    return A


def low_rank(left: Matrix, right: Matrix) -> Matrix:
    """``left right``."""
    return np.einsum("is,sj->ij", left, right)


def kron(*Ms: Matrix) -> Matrix:
    """The Kronecker product of numpy."""
    return reduce(np.kron, Ms)


def block_diag(*Ms: Matrix, multiplicities: Sequence[int] | None = None) -> Matrix:
    """SciPy's block-diagonal matrix, every block repeated."""
    return scipy.linalg.block_diag(
        *(M for M, c in zip(Ms, multiplicities or [1] * len(Ms), strict=True) for _ in [M] * c)
    )


def tt(cores: Sequence[np.ndarray]) -> Matrix:
    """``A[i, j] = G_1[:, i_1, j_1, :] ... G_c[:, i_c, j_c, :]``, a product of c small matrices."""
    out_modes, in_modes = [core.shape[1] for core in cores], [core.shape[2] for core in cores]

    def entry(i: Shape, j: Shape) -> Matrix:
        return reduce(np.matmul, (core[:, i[t], j[t], :] for t, core in enumerate(cores)))

    return _from_entries(entry, out_modes, in_modes)


def btt(cores: Sequence[np.ndarray]) -> Matrix:
    """``A[i, j] = product over t of G_t[:, i_t ... i_c, j_1 ... j_t, :]``."""
    out_modes, in_modes = cores[0].shape[1:-2], cores[-1].shape[2:-1]

    def entry(i: Shape, j: Shape) -> Matrix:
        digits: list[tuple[Any, ...]] = [(slice(None), *i[t:], *j[: t + 1]) for t in range(len(cores))]
        return reduce(np.matmul, (core[at] for core, at in zip(cores, digits, strict=True)))

    return _from_entries(entry, out_modes, in_modes)


def _from_entries(entry: Callable[[Shape, Shape], Matrix], out_modes: Sequence[int], in_modes: Sequence[int]) -> Matrix:
    """The matrix of 1 x 1 entries at row and column in mixed radix, most significant digit first."""
    rows = [[entry(i, j)[0, 0] for j in np.ndindex(*in_modes)] for i in np.ndindex(*out_modes)]
    return np.array(rows)


def monarch(
    left: np.ndarray, right: np.ndarray, in_features: int | None = None, out_features: int | None = None
) -> Matrix:
    """``z_kq = sum_p R_kqp x_kp``, read again as ``z_rl``; ``y_sl = sum_r L_lsr z_rl``; then cut to the true sizes."""
    blocks, q, p = right.shape
    _, s, _ = left.shape
    first = np.zeros((blocks * q, blocks * p), right.dtype)
    for k, row, col in np.ndindex(blocks, q, p):
        first[k * q + row, k * p + col] = right[k, row, col]
    last = np.zeros((s * blocks, q * blocks), left.dtype)
    for block, row, r in np.ndindex(blocks, s, q):
        last[row * blocks + block, r * blocks + block] = left[block, row, r]
    return (last @ first)[:out_features, :in_features]


def blast(left: np.ndarray, coupling: np.ndarray, right: np.ndarray) -> Matrix:
    """Block (i, j) is ``left_i diag(coupling_ij) right_j^T``."""
    rows, cols = coupling.shape[:2]
    return np.block([[left[i] @ np.diag(coupling[i, j]) @ right[j].T for j in range(cols)] for i in range(rows)])


def circulant(first_column: np.ndarray) -> Matrix:
    """SciPy's circulant."""
    return scipy.linalg.circulant(first_column)


def toeplitz(first_column: np.ndarray, first_row: np.ndarray) -> Matrix:
    """SciPy's Toeplitz matrix."""
    return scipy.linalg.toeplitz(first_column, first_row)


def permutation(perm: np.ndarray) -> Matrix:
    """A one at (i, perm[i])."""
    A = np.zeros((len(perm), len(perm)))
    for i, j in enumerate(perm):
        A[i, j] = 1
    return A


def diagonal(diag: np.ndarray) -> Matrix:
    """Numpy's diagonal matrix."""
    return np.diag(diag)


def convolution(kernel: np.ndarray, spatial_shape: int | Sequence[int], padding: str = "valid") -> Matrix:
    """``y[o, p] = sum over c, t of K[o, c, t] x[c, p + t - before]``, x zero or periodic outside."""
    c_out, c_in, *taps = kernel.shape
    spatial = [spatial_shape] if isinstance(spatial_shape, int) else list(spatial_shape)
    before = [0] * len(taps) if padding == "valid" else [(t - 1) // 2 for t in taps]
    out = [n - t + 1 for n, t in zip(spatial, taps, strict=True)] if padding == "valid" else spatial
    A = np.zeros((c_out, *out, c_in, *spatial), kernel.dtype)
    for o, c in np.ndindex(c_out, c_in):
        for p, t in itertools.product(np.ndindex(*out), np.ndindex(*taps)):
            at = [i + k - b for i, k, b in zip(p, t, before, strict=True)]
            if padding == "circular":
                at = [i % n for i, n in zip(at, spatial, strict=True)]
            if all(0 <= i < n for i, n in zip(at, spatial, strict=True)):
                A[(o, *p, c, *at)] += kernel[(o, c, *t)]
    return A.reshape(c_out * math.prod(out), c_in * math.prod(spatial))


def einsum(factors: Sequence[np.ndarray], pattern: str, sizes: Mapping[str, int] | None = None) -> Matrix:
    """Every assignment of numbers to the labels adds the product of the factors' entries to one entry of the matrix.

    Between two regroups this is a matrix; the whole is their product.
    """
    *terms, output = pattern.replace(" ", "").replace("->", ",").split(",")
    size = dict(sizes or {})
    names = [term for term in terms[1:] if "=" not in term]
    for name, factor in zip(names, factors, strict=True):
        size |= dict(zip(name, factor.shape, strict=True))
    remaining = iter(factors)
    A: Matrix | None = None
    for part in _parts([*terms, output]):
        here = [next(remaining) for _ in part[1:-1]]
        B = _assignments(part, here, {label: size[label] for label in "".join(part)})
        A = B if A is None else B @ A
    assert A is not None
    return A


def _parts(terms: Sequence[str]) -> Iterator[list[str]]:
    """``input, factors, output`` between regroups."""
    part: list[str] = []
    for term in terms:
        if "=" in term:
            before, after = term.split("=")
            yield [*part, before]
            part = [after]
        else:
            part.append(term)
    yield part


def _assignments(terms: Sequence[str], factors: Sequence[np.ndarray], size: Mapping[str, int]) -> Matrix:
    labels = "".join(size)
    number = dict(zip(labels, np.indices(tuple(size.values())), strict=True))

    def flat(term: str) -> np.ndarray:
        return np.ravel_multi_index([number[k] for k in term], tuple(size[k] for k in term))

    first, *names, last = terms
    values: np.ndarray = np.ones(tuple(size.values()))
    for name, factor in zip(names, factors, strict=True):
        values = values * factor[tuple(number[k] for k in name)]
    A = np.zeros((math.prod(size[k] for k in last), math.prod(size[k] for k in first)), values.dtype)
    np.add.at(A, (flat(last), flat(first)), values)
    return A


REFERENCES: dict[str, Callable[..., Matrix]] = {
    "Dense": dense,
    "LowRank": low_rank,
    "Kron": kron,
    "TT": tt,
    "BTT": btt,
    "Monarch": monarch,
    "BlockDiag": block_diag,
    "BLAST": blast,
    "Circulant": circulant,
    "Toeplitz": toeplitz,
    "Convolution": convolution,
    "Permutation": permutation,
    "Einsum": einsum,
    "Diagonal": diagonal,
}
