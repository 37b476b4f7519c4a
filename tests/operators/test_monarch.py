"""Monarch: padding, and the three ways in which blocks and block heights divide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import structops as so
from structops.testing import assert_close, to_backend

pytestmark = pytest.mark.torch


def blocks(*shape: int) -> Any:
    return to_backend(np.random.default_rng(len(shape)).standard_normal(shape), "torch")


@pytest.mark.parametrize(
    ("count", "height", "regroups"), [(2, 4, False), (4, 2, False), (3, 3, False), (2, 3, True), (4, 6, True)]
)
def test_a_regroup_is_needed_only_where_neither_divides(count: int, height: int, regroups: bool) -> None:
    A = so.Monarch(blocks(count, 2, height), blocks(count, height, 3))
    assert ("=" in A.chain.pattern) is regroups


def test_padding_cuts_the_matrix_and_is_said() -> None:
    left, right = blocks(3, 2, 4), blocks(3, 4, 2)
    full = so.Monarch(left, right).to_dense()
    A = so.Monarch(left, right, in_features=5, out_features=4)
    assert_close(A.to_dense(), full[:4, :5])
    assert A.T.shape == (5, 4)
    assert "padded to 6x6" in repr(A)
    assert "padded" not in repr(so.Monarch(left, right))
    assert so.num_params(A) == so.num_params(so.Monarch(left, right))  # the padded factors count


@pytest.mark.parametrize("sizes", [{"in_features": 7}, {"out_features": 7}, {"in_features": 0}, {"out_features": -1}])
def test_a_true_size_lies_between_1_and_the_padded_one(sizes: dict[str, int]) -> None:
    with pytest.raises(so.ShapeError, match=str(next(iter(sizes.values())))):
        so.Monarch(blocks(3, 2, 4), blocks(3, 4, 2), **sizes)


def test_a_transpose_shows_the_blocks_of_the_original() -> None:
    left, right = blocks(3, 2, 4), blocks(3, 4, 5)
    for A in (so.Monarch(left, right), so.Monarch(left, right).T):
        assert A.left is left
        assert A.right is right
        assert A.blocks == 3


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(so.ShapeError, match=r"agree on blocks and q.*\(3, 2, 4\).*\(3, 5, 2\)"):
        so.Monarch(blocks(3, 2, 4), blocks(3, 5, 2))
    with pytest.raises(so.ShapeError, match="agree on blocks and q"):
        so.Monarch(blocks(3, 2, 4), blocks(2, 4, 2))
