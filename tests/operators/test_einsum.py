"""Einsum: sizes that the factors give, and patterns and factors that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import structops as so
from structops.testing import assert_close, to_backend


def ones(*shape: int, backend: str = "torch") -> Any:
    return to_backend(np.random.default_rng(sum(shape)).standard_normal(shape), backend)


def test_other_structures_are_patterns(backend: str) -> None:
    A, B = ones(3, 2, backend=backend), ones(4, 5, backend=backend)
    assert_close(so.Einsum([B, A], "cd, bd, ac -> ab").to_dense(), so.Kron(A, B).to_dense(), scale=10)
    left, right = ones(6, 2, backend=backend), ones(2, 3, backend=backend)
    assert_close(so.Einsum([right, left], "j, sj, is -> i").to_dense(), so.LowRank(left, right).to_dense(), scale=10)


@pytest.mark.torch
def test_sizes_are_inferred_and_the_rest_is_given() -> None:
    A = so.Einsum([ones(4, 3)], "ct,dc->dt", sizes={"t": 2})
    assert A.shape == (8, 6)
    assert A.pattern == "ct, dc -> dt"
    assert A.T.pattern == "dt, dc -> ct"
    with pytest.raises(so.ShapeError, match="no size for label"):
        so.Einsum([ones(4, 3)], "ct, dc -> dt")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("pattern", "shapes", "error", "message"),
    [
        ("cd, bd, ac -> ab", [(3, 5)], so.ShapeError, "2 factors, got 1"),
        ("cd, bd, ac -> ab", [(3, 5), (4, 2, 1)], so.ShapeError, "'ac'.*2 axes.*\\(4, 2, 1\\)"),
        ("j, sj, is -> i", [(2, 5), (4, 3)], so.ShapeError, "label 's' is 2 elsewhere and 3"),
        ("j, sj -> j", [(2, 5)], so.PatternError, "s"),  # s is never used again
        ("j, ij, ki -> i", [(2, 5), (3, 2)], so.PatternError, "."),
        ("j -> i", [], so.ShapeError, "at least one"),
        ("j, jj -> i", [(2, 2)], so.PatternError, "distinct"),
    ],
)
def test_what_is_refused(pattern: str, shapes: list[tuple[int, ...]], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        so.Einsum([ones(*shape) for shape in shapes], pattern)
