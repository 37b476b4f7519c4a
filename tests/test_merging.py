"""Factors multiplied together in advance: the same matrix, and only where it is cheaper."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

pytest.importorskip("torch", reason="needs PyTorch")

import torch
from test_contract import chains, fewer_examples, integers, reference

import structops as so
from structops.contract import store
from structops.errors import PatternError
from structops.merging import CPU, Machine, merge, plans
from structops.pattern import Step

pytestmark = pytest.mark.torch

FREE = Machine(move=0.0, side=0.0, call=0.0)  # multiply-accumulates are all that counts


def groupings(count: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Ways to cut ``count`` factors into neighbours."""
    return st.sets(st.integers(1, count - 1) if count > 1 else st.nothing()).map(
        lambda cuts: tuple(zip([0, *sorted(cuts)], [*sorted(cuts), count], strict=True))
    )


def crosses(chain: so.Chain, groups: tuple[tuple[int, int], ...]) -> bool:
    """Whether a regroup lies inside a group."""
    places = [k for k, step in enumerate(chain.steps) if isinstance(step, Step)]
    return any(places[end - 1] - places[start] > end - 1 - start for start, end in groups)


@fewer_examples(2)
@given(st.data(), chains())
def test_merged_chains_are_the_same_matrix(data, drawn):
    chain = drawn[0]
    groups = data.draw(groupings(len(chain.factors)))
    if crosses(chain, groups):
        with pytest.raises(PatternError, match="regroup"):
            merge(chain, groups)
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = [integers(rng, *factor.shape) for factor in chain.factors]
    x = integers(rng, 3, chain.in_features)
    merged = merge(chain, groups)
    factors = merged.factors(store(chain, [torch.from_numpy(array) for array in arrays]))
    assert [tuple(factor.shape) for factor in factors] == list(merged.chain.stored_shapes)
    assert merged.chain.shape == chain.shape
    np.testing.assert_array_equal(so.contract(merged.chain, factors, torch.from_numpy(x)), reference(chain, arrays, x))


@given(chains(), st.sampled_from([CPU, FREE, Machine(1e3, 0, 0), Machine(0, 100, 1e3)]))
def test_plans_grow_with_the_tokens(drawn, machine):
    chain = drawn[0]
    found = plans(chain, machine)
    least = [tokens for tokens, _ in found]
    assert least[0] == 0
    assert least == sorted(set(least))
    for _, merged in found:
        assert [k for start, end in merged.groups for k in range(start, end)] == list(range(len(chain.factors)))


def test_where_arithmetic_counts_the_cheapest_order_wins():
    """Against all orders, at the MACs of products and factors."""
    chain = so.structure("kron(num_factors=4)").chain(2**4 * 3**4, 2**4 * 3**4)
    tokens = 4096
    merged = next(m for least, m in reversed(plans(chain, FREE)) if tokens >= least)

    def price(groups: tuple[tuple[int, int], ...]) -> float:
        made = merge(chain, groups)
        once = sum(
            math.prod(f.num_params for f in chain.factors[start : k + 1])
            for start, end in groups
            for k in range(start + 1, end)
        )
        return once + tokens * made.chain.macs

    every = [
        tuple(zip([0, *cuts], [*cuts, 4], strict=True))
        for cuts in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])
    ]
    best = min(map(price, every))
    assert price(merged.groups) <= best / 0.8  # what promises less is left as it is


def test_dense_where_the_chain_costs_as_much():
    chain = so.structure("btt(rank=16, blocks=16)").chain(256, 256)
    (_, few), *_, (_, many) = plans(chain, CPU)
    assert few.chain == chain
    assert many.chain.pattern == "cd, abcd -> ab"
    assert many.chain.num_params == 256 * 256


def test_wrong_groups_are_refused():
    chain = so.structure("btt").chain(16, 16)
    for groups in (((0, 1),), ((1, 2), (0, 1)), ((0, 3),), ((0, 1), (0, 2))):
        with pytest.raises(PatternError, match="expected groups of the 2 factors"):
            merge(chain, groups)
