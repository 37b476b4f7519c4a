"""Which structure contains which, entry by entry: arXiv 2406.06248, sections 2 and 4.

The matrices are built here with numpy's kron and index loops; the operators only have to agree with them.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import numpy as np
import pytest

import structops as so


@pytest.fixture
def backend() -> str:
    """PyTorch, which takes milliseconds; one case of each kind runs on JAX at the end of this file."""
    pytest.importorskip("torch")
    return "torch"


RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    """Small whole numbers: the products below are exact."""
    return RNG.integers(-4, 5, size=shape).astype(np.float64)


def assert_matrix(backend: str, operator: Any, dense: np.ndarray) -> None:
    assert operator.shape == dense.shape
    np.testing.assert_array_equal(operator.to_dense(), dense)
    x = numbers(dense.shape[1], 2)
    np.testing.assert_array_equal(operator @ to(backend, x), dense @ x)


def to(backend: str, array: np.ndarray) -> Any:
    """A copy on a library: some of these arrays are broadcast views without memory of their own."""
    if backend == "torch":
        return importlib.import_module("torch").from_numpy(np.array(array))
    return importlib.import_module("jax.numpy").asarray(np.array(array))


# ------------------------------------------------------------------------------------- matrices by their definition


def train_dense(cores: list[np.ndarray]) -> np.ndarray:
    """Tensor-train by multiplying the slices of every entry."""
    rows, cols = ([core.shape[axis] for core in cores] for axis in (1, 2))
    dense = np.empty((math.prod(rows), math.prod(cols)))
    for i, row in enumerate(itertools.product(*map(range, rows))):
        for j, col in enumerate(itertools.product(*map(range, cols))):
            product = np.ones((1, 1))
            for core, a, b in zip(cores, row, col, strict=True):
                product = product @ core[:, a, b, :]
            dense[i, j] = product.item()
    return dense


def monarch_dense(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two block-diagonal matrices and the stride permutation between them, as matrices."""
    (blocks, q, p), s = right.shape, left.shape[1]
    first, second = np.zeros((blocks * q, blocks * p)), np.zeros((blocks * s, blocks * q))
    for k in range(blocks):
        first[k * q : (k + 1) * q, k * p : (k + 1) * p] = right[k]
        # Block l reads the entries l, l + blocks, ... of the flat state, and writes the rows l, l + blocks, ...
        second[k::blocks, k::blocks] = left[k]
    return second @ first


def broadcast(cores: list[np.ndarray]) -> list[np.ndarray]:
    """Tensor-train cores as block tensor-train cores that are the same in every block."""
    rows, cols = ([core.shape[axis] for core in cores] for axis in (1, 2))
    result = []
    for t, core in enumerate(cores):
        count = len(cores)
        before, m, n, after = core.shape
        shape = (before, m, *(1,) * (count - t - 1), *(1,) * t, n, after)
        result.append(np.broadcast_to(core.reshape(shape), (before, *rows[t:], *cols[: t + 1], after)))
    return result


MODES = [((2, 3), (4, 2)), ((1, 5), (3, 1)), ((4, 4), (4, 4)), ((2, 3, 2), (3, 1, 2)), ((2, 2, 3, 1), (1, 3, 2, 2))]


@pytest.mark.parametrize(("rows", "cols"), MODES)
def test_kron_is_tensor_train_of_rank_one(backend, rows, cols):
    matrices = [numbers(m, n) for m, n in zip(rows, cols, strict=True)]
    dense = np.ones((1, 1))
    for matrix in matrices:
        dense = np.kron(dense, matrix)
    cores = [matrix[None, :, :, None] for matrix in matrices]
    assert_matrix(backend, so.Kron(*(to(backend, matrix) for matrix in matrices)), dense)
    assert_matrix(backend, so.TT([to(backend, core) for core in cores]), dense)
    assert_matrix(backend, so.BTT([to(backend, core) for core in broadcast(cores)]), dense)
    assert np.array_equal(train_dense(cores), dense)


@pytest.mark.parametrize(("rows", "cols"), MODES)
@pytest.mark.parametrize("rank", [2, 3])
def test_tensor_train_is_block_tensor_train(backend, rows, cols, rank):
    ranks = [1, *(rank + t for t in range(len(rows) - 1)), 1]
    cores = [numbers(ranks[t], m, n, ranks[t + 1]) for t, (m, n) in enumerate(zip(rows, cols, strict=True))]
    dense = train_dense(cores)
    assert_matrix(backend, so.TT([to(backend, core) for core in cores]), dense)
    assert_matrix(backend, so.BTT([to(backend, core) for core in broadcast(cores)]), dense)


def test_two_core_tensor_train_is_a_sum_of_kronecker_products(backend):
    left, right = numbers(1, 3, 4, 5), numbers(5, 2, 6, 1)
    dense = sum(np.kron(left[0, :, :, s], right[s, :, :, 0]) for s in range(5))
    assert_matrix(backend, so.TT([to(backend, left), to(backend, right)]), dense)
    terms = [so.Kron(to(backend, left[0, :, :, s]), to(backend, right[s, :, :, 0])) for s in range(5)]
    assert_matrix(backend, sum(terms[1:], terms[0]), dense)


@pytest.mark.parametrize("root", [2, 3, 5])
def test_kron_is_monarch_with_equal_blocks(backend, root):
    left, right = numbers(root, root), numbers(root, root)
    monarch = so.Monarch(to(backend, np.stack([left] * root)), to(backend, np.stack([right] * root)))
    assert_matrix(backend, monarch, np.kron(left, right))


@pytest.mark.parametrize("root", [2, 3, 5])
def test_monarch_with_root_d_blocks_is_block_tensor_train_of_rank_one(backend, root):
    """``y_ab = sum_c L_abc sum_d R_bcd x_cd`` with ``L_abc = (L_b)_ac`` and ``R_bcd = (R_c)_bd``."""
    left, right = numbers(root, root, root), numbers(root, root, root)
    dense = monarch_dense(left, right)
    # The same numbers: block b of the left factor, block c of the right one.
    cores = [left.transpose(1, 0, 2)[None, ..., None], right.transpose(1, 0, 2)[None, ..., None]]
    assert_matrix(backend, so.Monarch(to(backend, left), to(backend, right)), dense)
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), dense)
    by_index = np.einsum("bac,cbd->abcd", left, right).reshape(root**2, root**2)
    assert np.array_equal(dense, by_index)


@pytest.mark.parametrize(("d", "b"), [(16, 4), (32, 4), (48, 4), (18, 3), (36, 6), (64, 2), (36, 2), (12, 1)])
def test_monarch_is_block_tensor_train(backend, d, b):
    """``R[s, b, c, d] = R_c[s * blocks + b, d]`` and ``L[a, b, c, s] = L_b[a, c * r + s]`` with rank d / blocks**2."""
    block = d // b
    rank = block // b
    left, right = numbers(b, block, block), numbers(b, block, block)
    cores = [np.empty((1, block, b, b, rank)), np.empty((rank, b, b, block, 1))]
    for c, beta, s in itertools.product(range(b), range(b), range(rank)):
        cores[0][0, :, beta, c, s] = left[beta, :, c * rank + s]
        cores[1][s, beta, c, :, 0] = right[c, s * b + beta, :]
    dense = monarch_dense(left, right)
    assert_matrix(backend, so.Monarch(to(backend, left), to(backend, right)), dense)
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), dense)
    # As many parameters, products and numbers between the factors, whichever name it has.
    monarch, btt = so.structure("monarch", blocks=b).chain(d, d), so.structure("btt", blocks=b, rank=rank).chain(d, d)
    assert (monarch.num_params, monarch.macs) == (btt.num_params, btt.macs) == (2 * d * d // b,) * 2
    assert monarch.intermediate_widths == btt.intermediate_widths == (d,)


@pytest.mark.parametrize(
    ("b", "p", "q", "s"), [(4, 3, 4, 2), (4, 5, 2, 3), (6, 2, 3, 4), (4, 3, 6, 5), (3, 2, 5, 2), (5, 3, 2, 4)]
)
def test_monarch_of_any_sizes(backend, b, p, q, s):
    """Blocks that divide the height of a block, that it divides, and neither."""
    left, right = numbers(b, s, q), numbers(b, q, p)
    assert_matrix(backend, so.Monarch(to(backend, left), to(backend, right)), monarch_dense(left, right))


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (7, 5), (6, 6)])
def test_low_rank_is_block_tensor_train(backend, rows, cols):
    """Input modes (1, cols), output modes (rows, 1): nothing is blocked, the rank is the rank."""
    left, right = numbers(rows, 3), numbers(3, cols)
    cores = [left.reshape(1, rows, 1, 1, 3), right.reshape(3, 1, 1, cols, 1)]
    assert_matrix(backend, so.LowRank(to(backend, left), to(backend, right)), left @ right)
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), left @ right)


def test_dense_is_block_tensor_train(backend):
    """Input modes (cols, 1), output modes (1, rows): the entrywise product of two full matrices."""
    matrix = numbers(5, 7)
    cores = [np.ones((1, 1, 5, 7, 1)), matrix.reshape(1, 5, 7, 1, 1)]
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), matrix)
    other = numbers(5, 7)
    cores[0] = other.reshape(1, 1, 5, 7, 1)
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), matrix * other)
    assert_matrix(backend, so.BTT([to(backend, matrix.reshape(1, 5, 7, 1))]), matrix)  # and a single core is dense


def test_block_tensor_train_is_every_matrix_at_rank_min(backend):
    """Rank min(m_1, n_2) holds any matrix: here with the identity as one core."""
    rows, cols = (3, 4), (2, 5)
    matrix = numbers(12, 10)
    blocks = matrix.reshape(*rows, *cols)  # (a, b, c, d)
    identity = np.broadcast_to(np.eye(3).reshape(1, 3, 1, 1, 3), (1, 3, 4, 2, 3))
    cores = [identity, blocks[..., None]]  # rank 3 = m_1: the right core is the matrix
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), matrix)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_butterfly_is_block_tensor_train_of_rank_one(backend, levels):
    """The Walsh-Hadamard transform, from 2 x 2 blocks."""
    hadamard = np.array([[1.0, 1.0], [1.0, -1.0]])
    dense = np.ones((1, 1))
    for _ in range(levels):
        dense = np.kron(dense, hadamard)
    cores = broadcast([hadamard[None, :, :, None]] * levels)
    assert_matrix(backend, so.BTT([to(backend, core) for core in cores]), dense)


@pytest.mark.parametrize("order", ["gba, fdrga, ferbg -> fed", "gba, ferbg, fdrga -> fed"])
def test_two_factor_family(backend, order):
    """Kron, TT, BTT and low rank are points of the family, in either order of its factors."""
    size = {"g": 2, "b": 3, "a": 4, "f": 3, "d": 2, "r": 2, "e": 3}
    shapes = {name: [size[label] for label in name] for name in ("fdrga", "ferbg")}
    arrays = {name: numbers(*shape) for name, shape in shapes.items()}
    names = order.split(" -> ")[0].split(", ")[1:]
    dense = np.einsum("fdrga,ferbg->fedgba", arrays["fdrga"], arrays["ferbg"]).reshape(18, 24)
    assert_matrix(backend, so.Einsum([to(backend, arrays[name]) for name in names], order), dense)


def test_block_diagonal_is_a_chain(backend):
    blocks = numbers(3, 2, 4)
    dense = np.zeros((6, 12))
    for k in range(3):
        dense[2 * k : 2 * k + 2, 4 * k : 4 * k + 4] = blocks[k]
    assert_matrix(backend, so.BlockDiag(*(to(backend, block) for block in blocks)), dense)
    assert_matrix(backend, so.Einsum([to(backend, blocks)], "cd, cbd -> cb"), dense)


def test_blast_by_blocks(backend):
    left, coupling, right = numbers(2, 3, 4), numbers(2, 5, 4), numbers(5, 2, 4)
    dense = np.block([[left[i] @ np.diag(coupling[i, j]) @ right[j].T for j in range(5)] for i in range(2)])
    assert_matrix(backend, so.BLAST(*(to(backend, array) for array in (left, coupling, right))), dense)
    # With all couplings 1 it is low rank.
    ones = so.BLAST(to(backend, left), to(backend, np.ones((2, 5, 4))), to(backend, right))
    assert_matrix(backend, ones, left.reshape(6, 4) @ right.reshape(10, 4).T)


@pytest.mark.jax
@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (test_kron_is_tensor_train_of_rank_one, ((2, 3), (4, 2))),
        (test_tensor_train_is_block_tensor_train, ((2, 3, 2), (3, 1, 2), 2)),
        (test_kron_is_monarch_with_equal_blocks, (3,)),
        (test_monarch_with_root_d_blocks_is_block_tensor_train_of_rank_one, (3,)),
        (test_monarch_is_block_tensor_train, (18, 3)),
        (test_monarch_of_any_sizes, (4, 3, 6, 5)),
        (test_low_rank_is_block_tensor_train, (5, 7)),
        (test_dense_is_block_tensor_train, ()),
    ],
)
def test_on_jax(check, arguments):
    check("jax", *arguments)
