"""Factorising a size into modes."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structops.errors import StructureError
from structops.modes import common_divisors, divisors, modes, nearest_multiples

# Size: two factors by the rule of the paper's code, and the closest pair.
PAPER = {
    20: ((10, 2), (5, 4)),
    30: ((10, 3), (6, 5)),
    768: ((48, 16), (32, 24)),
    3072: ((96, 32), (64, 48)),
    1152: ((48, 24), (36, 32)),
    608: ((76, 8), (32, 19)),
    50304: ((2096, 24), (262, 192)),
    2048: ((64, 32), (64, 32)),
    2560: ((80, 32), (64, 40)),
    1000: ((50, 20), (40, 25)),
    50257: ((1733, 29), (1733, 29)),
    512: ((32, 16), (32, 16)),
    4096: ((64, 64), (64, 64)),
    97: ((97, 1), (97, 1)),
    1: ((1, 1), (1, 1)),
    **{root**2: ((root, root), (root, root)) for root in (12, 16, 22, 28, 36, 44)},  # widths of the paper's models
}


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_examples(size):
    greedy, balanced = PAPER[size]
    assert modes(size, 2, "greedy") == greedy
    assert modes(size, 2, "balanced") == modes(size, 2) == balanced


def test_more_than_two():
    assert modes(4096, 3) == modes(4096, 3, "greedy") == (16, 16, 16)
    assert modes(4096, 4) == (8, 8, 8, 8)
    assert modes(768, 1) == (768,)
    assert modes(768, 3) == (12, 8, 8)
    assert modes(4620, 3) == (22, 15, 14)  # not (21, 20, 11), whose largest is smaller but whose sum is not
    assert modes(7, 4) == (7, 1, 1, 1)
    assert modes(12, 5) == (3, 2, 2, 1, 1)


def factorisations(size: int, count: int) -> list[tuple[int, ...]]:
    """All descending factorisations, by trying every combination."""
    candidates = [d for d in range(1, size + 1) if size % d == 0]
    every = itertools.combinations_with_replacement(reversed(candidates), count)
    return [parts for parts in every if math.prod(parts) == size]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_balanced_is_optimal(count):
    for size in [*range(1, 130), 144, 210, 216, 360, 480, 512, 720]:
        best = min(factorisations(size, count), key=lambda parts: (sum(parts), max(parts)))
        got = modes(size, count)
        assert (sum(got), max(got)) == (sum(best), max(best)), (size, got, best)


@given(st.integers(1, 100_000), st.integers(1, 5), st.sampled_from(["balanced", "greedy"]))
def test_descending_and_product(size, count, rule):
    got = modes(size, count, rule)
    assert len(got) == count
    assert math.prod(got) == size
    assert list(got) == sorted(got, reverse=True)


@given(st.integers(1, 100_000))
def test_two_balanced_modes_are_the_divisors_around_the_root(size):
    larger, smaller = modes(size, 2)
    assert smaller == max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    assert larger == size // smaller


def test_sizes_with_many_divisors_take_no_time():
    start = time.perf_counter()
    assert math.prod(modes(2**4 * 3**3 * 5**2 * 7 * 11 * 13, 6)) == 10_810_800
    modes(10_810_800, 6, "greedy")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((12, 0), ["at least one mode", "0"]),
        ((0, 2), ["0"]),
        ((-4, 2), ["-4"]),
        ((12, 2, "even"), ["'even'", "balanced", "greedy"]),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(StructureError) as caught:
        modes(*arguments)
    assert all(word in str(caught.value) for word in words)


@given(st.integers(1, 10_000))
def test_divisors(size):
    assert list(divisors(size)) == [d for d in range(1, size + 1) if size % d == 0]


def test_what_is_near():
    assert nearest_multiples(10, 4) == (8, 12)
    assert nearest_multiples(3, 4) == (4,)
    assert nearest_multiples(8, 4) == (8, 12)


def test_common_divisors():
    assert common_divisors(100, 64) == (1, 2, 4)
    assert common_divisors(7, 5) == (1,)
