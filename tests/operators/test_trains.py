"""Tensor-train and block tensor-train: what cores and ranks mean, and which cores fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import structops as so
from structops.testing import assert_close, to_backend
from structops.testing.cases import btt_cores, tt_cores

MODES = (2, 3, 2), (3, 1, 2)
RANKS = (2, 3)


def drawn(shapes: list[tuple[int, ...]], backend: str = "torch") -> list[Any]:
    rng = np.random.default_rng(0)
    return [to_backend(rng.standard_normal(shape), backend) for shape in shapes]


@pytest.mark.parametrize(("kind", "shapes"), [(so.TT, tt_cores), (so.BTT, btt_cores)], ids=["tt", "btt"])
def test_operators_keep_the_cores_they_are_given(kind: Any, shapes: Any, backend: str) -> None:
    cores = drawn(shapes(*MODES, *RANKS), backend)
    A = kind(cores)
    assert all(kept is given for kept, given in zip(A.cores, cores, strict=True))
    assert all(kept is given for kept, given in zip(A.T.T.cores, cores, strict=True))
    assert A.ranks == A.T.ranks == RANKS
    assert A.arrays == tuple(reversed(cores))  # in order of application
    assert not A.is_transposed
    assert A.T.is_transposed


def test_the_cores_of_a_transposed_tensor_train_are_a_tensor_train(backend: str) -> None:
    A = so.TT(drawn(tt_cores(*MODES, *RANKS), backend))
    assert_close(so.TT(A.T.cores).to_dense(), A.to_dense().T)


@pytest.mark.torch
@pytest.mark.parametrize("kind", [so.TT, so.BTT])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 2, 1), (1, 2, 2, 1, 1)], "core 2 of 2 must have"),  # axes
        ([(1, 2, 2, 2), (3, 2, 2, 1)], "chain"),  # inner rank
        ([(2, 2, 2, 2), (2, 2, 2, 1)], "chain"),  # outer rank
        ([(1, 2, 2, 2), (2, 2, 2, 2)], "chain"),
    ],
)
def test_cores_that_do_not_fit(kind: Any, shapes: list[tuple[int, ...]], message: str) -> None:
    if kind is so.BTT:  # the same cores with one axis more
        shapes = [(*shape[:2], 2, *shape[2:]) for shape in shapes]
    with pytest.raises(so.ShapeError, match=rf"{kind.__name__}.*{message}"):
        kind(drawn(shapes))


@pytest.mark.torch
def test_modes_of_a_block_tensor_train_that_do_not_fit() -> None:
    good = btt_cores((2, 3), (4, 5), 2)
    for core, axis in ((0, 2), (0, 3), (1, 1), (1, 2)):
        bad = [list(shape) for shape in good]
        bad[core][axis] += 1
        with pytest.raises(so.ShapeError, match="must chain, expected shapes"):
            so.BTT(drawn([tuple(shape) for shape in bad]))


@pytest.mark.torch
@pytest.mark.parametrize("kind", [so.TT, so.BTT])
def test_no_cores(kind: Any) -> None:
    with pytest.raises(so.ShapeError, match="at least one"):
        kind([])


@pytest.mark.torch
def test_more_cores_than_letters() -> None:
    cores = drawn([(1, 2 if t == 7 else 1, 1, 1) for t in range(20)])
    A = so.TT(cores)
    assert A.shape == (2, 1)
    assert_close(A.to_dense().reshape(2), cores[7].reshape(2) * np.prod([c.item() for c in cores[:7] + cores[8:]]))
