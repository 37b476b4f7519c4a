"""Structure specs: their forms, their mistakes, their budgets, and plans at every kind of size."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import structops as so
from structops.chain import Chain
from structops.errors import PatternError, ShapeError, StructureError, StructureWarning
from structops.spec import Plan, Structure, registry

NAMES = ("dense", "low_rank", "kron", "tt", "btt", "monarch", "block_diag", "blast")
CHAINLESS = ("circulant", "toeplitz", "convolution")

SPECS = [
    so.structure("dense"),
    so.structure("low_rank", rank=3),
    so.structure("low_rank", params=0.5),
    so.structure("kron", num_factors=3, modes="greedy"),
    so.structure("tt", rank=(2, 3), num_cores=3),
    so.structure("btt", rank=2, blocks=8),
    so.structure("btt", rank=2, modes=((4, 2), (2, 4))),
    so.structure("btt", params=0.25, num_cores=3),
    so.structure("monarch", blocks=4),
    so.structure("block_diag", blocks=2),
    so.structure("blast", rank=2, blocks=2),
    so.structure("circulant"),
    so.structure("toeplitz"),
    so.structure("convolution", spatial_shape=(4, 4), kernel_size=(3, 2), padding="circular"),
    so.structure("einsum", theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0)),
    so.structure("einsum", pattern="cd, bd, ac -> ab", sizes={"a": 2, "b": 4, "c": 4, "d": 2}),
]


def quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    """Without the warnings about ranks: here random arguments are tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StructureWarning)
        return function(*arguments, **options)


# ---------------------------------------------------------------------------------------------------------------- forms


def test_every_structure_of_the_design_is_known():
    assert set(registry()) >= {*NAMES, *CHAINLESS, "einsum"}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trips(spec):
    assert so.structure(str(spec)) == spec
    assert so.structure(json.loads(spec.to_json())) == spec
    assert so.structure(json.loads(json.dumps(json.loads(spec.to_json())))) == spec
    assert so.structure(spec) is spec
    assert so.structure(spec.name, **spec.arguments()) == spec
    for other in (so.structure(str(spec)), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert hash(other) == hash(spec)
        assert str(other) == str(spec)
    assert len({spec, so.structure(str(spec))}) == 1
    assert "\n" not in str(spec)


def test_forms():
    spec = so.structure("btt", rank=2, blocks=8)
    assert spec == so.structure("btt(rank=2, blocks=8)") == so.structure(" btt( blocks = 8,rank=2 ) ")
    assert spec == so.structure({"name": "btt", "rank": 2, "blocks": 8})
    assert spec == so.structure("btt(rank=2)", blocks=8) == so.structure(so.structure("btt", rank=2), blocks=8)
    assert so.structure("btt(rank=5)", rank=2, blocks=8) == spec  # arguments override
    assert str(spec) == "btt(rank=2, blocks=8)"
    assert str(so.structure("btt")) == str(so.structure("btt()")) == "btt"
    assert spec != so.structure("btt", rank=2)
    assert so.structure("btt", modes=[[4, 4], [2, 8]]) == so.structure("btt", modes=((4, 4), (2, 8)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rank = 3


def test_numpy_numbers_are_numbers():
    spec = so.structure("btt", rank=np.int64(2), modes=[np.array([4, 4]).tolist(), (np.int32(2), np.int32(8))])
    assert str(spec) == "btt(rank=2, modes=((4, 4), (2, 8)))"
    assert so.structure(json.loads(spec.to_json())) == spec
    budget = so.structure("low_rank", params=np.float64(0.25))
    assert str(budget) == "low_rank(params=0.25)"
    assert so.structure(str(budget)) == budget


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bttt",), ["'bttt'", "did you mean 'btt'", *NAMES, *CHAINLESS]),
        (("zzz",), ["'zzz'", *NAMES]),
        (({"rank": 2},), ["unknown structure", *NAMES]),
        (("btt(2)",), ["btt(rank=2, blocks=8)"]),
        (("btt(rank=2",), ["btt(rank=2, blocks=8)"]),
        (("btt(rank=x)",), ["btt(rank=2, blocks=8)"]),
        (("btt(rank=2, rank=3)",), ["btt(rank=2, blocks=8)"]),
        (("",), ["btt(rank=2, blocks=8)"]),
        (("import os",), ["btt(rank=2, blocks=8)"]),
        ((None,), ["None"]),
        ((3,), ["3"]),
    ],
)
def test_unreadable_or_unknown(arguments, words):
    with pytest.raises(StructureError) as caught:
        so.structure(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("btt", {"rnk": 2}, ["rnk", "btt", "rank", "num_cores", "modes", "blocks", "params"]),
        ("low_rank", {"blocks": 2}, ["blocks", "low_rank", "rank", "params"]),
        ("dense", {"rank": 2}, ["rank", "dense", "no arguments"]),
        ("monarch", {"rank": 2}, ["rank", "monarch", "blocks"]),
        ("btt", {"rank": 0}, ["rank", "0", "at least 1"]),
        ("btt", {"rank": -1}, ["rank", "-1"]),
        ("btt", {"rank": True}, ["rank", "True"]),
        ("btt", {"rank": "2"}, ["rank", "'2'"]),
        ("btt", {"rank": 0.25}, ["rank", "0.25", "params="]),
        ("low_rank", {"rank": 0.25}, ["rank", "0.25", "params="]),
        ("blast", {"rank": 0.25}, ["rank", "0.25", "params="]),
        ("monarch", {"blocks": 0.25}, ["blocks", "0.25", "params="]),
        ("btt", {"rank": 2, "params": 0.5}, ["rank=2", "params=0.5", "not both"]),
        ("monarch", {"blocks": 2, "params": 0.5}, ["blocks=2", "params=0.5", "not both"]),
        ("btt", {"params": 0}, ["params", "0"]),
        ("btt", {"params": -0.5}, ["params", "-0.5"]),
        ("btt", {"params": "a lot"}, ["params", "a lot"]),
        ("btt", {"params": math.nan}, ["params", "nan"]),
        ("btt", {"num_cores": 0}, ["num_cores", "0"]),
        ("btt", {"rank": (2, 2)}, ["2 cores", "1 inner", "(2, 2)"]),
        ("tt", {"rank": (2, 0), "num_cores": 3}, ["rank", "0"]),
        ("btt", {"modes": "even"}, ["balanced", "greedy", "'even'"]),
        ("btt", {"modes": ((2, 2), (2,))}, ["modes", "2 each"]),
        ("btt", {"modes": ((2, 0), (2, 2))}, ["modes"]),
        ("btt", {"modes": ((2, 2, 2), (2, 2, 2))}, ["modes", "2 each"]),
        ("kron", {"num_factors": 3, "modes": ((2, 2), (2, 2))}, ["3 each"]),
        ("btt", {"blocks": 4, "num_cores": 3}, ["blocks=4", "num_cores=3"]),
        ("btt", {"blocks": 4, "modes": "greedy"}, ["blocks=4", "greedy"]),
        ("btt", {"num_cores": 1, "params": 1.0}, ["num_cores", "params"]),
        ("block_diag", {"blocks": 0}, ["blocks", "0"]),
        ("convolution", {"padding": "reflect"}, ["'reflect'", "valid", "same", "circular"]),
        ("convolution", {"kernel_size": 0}, ["kernel_size", "0"]),
        ("convolution", {"kernel_size": (3, 0), "spatial_shape": (4, 4)}, ["kernel_size", "0"]),
        ("convolution", {"spatial_shape": (4, 0)}, ["spatial_shape", "0"]),
        ("convolution", {"spatial_shape": (2, 2, 2)}, ["1 or 2"]),
        ("convolution", {"spatial_shape": (4, 4), "kernel_size": (3, 3, 3)}, ["kernel_size", "spatial_shape"]),
        ("einsum", {"order": "c"}, ["order", "cheapest"]),
        ("einsum", {"theta": (1, 0), "order": "a"}, ["theta", "7"]),
        ("einsum", {"theta": (1, 1, 0, 1, 0, 0, 0)}, ["theta", "sum to 1"]),
        ("einsum", {"theta": (1, 0, 0, 1, 0, 0, 0), "pattern": "j, ij -> i"}, ["either theta or pattern"]),
        ("einsum", {"pattern": "j, ij -> i"}, ["no size", "i"]),
        ("einsum", {"pattern": "j, ij", "sizes": {"i": 2, "j": 2}}, ["expected"]),
    ],
)
def test_bad_arguments_are_found_before_any_size_is_known(name, arguments, words):
    with pytest.raises((StructureError, PatternError, ShapeError)) as caught:
        so.structure(name, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("spec", "sizes", "words"),
    [
        ("btt(blocks=8)", (100, 64), ["in_features=100", "8 blocks", "96", "104", "1, 2, 4"]),
        ("btt(blocks=8)", (64, 100), ["out_features=100", "96", "104"]),
        ("btt(modes=((4, 4), (4, 4)))", (16, 18), ["(4, 4)", "16", "out_features=18", "(6, 3)"]),
        ("kron(modes=((4, 4), (4, 4)))", (18, 16), ["(4, 4)", "in_features=18", "(6, 3)"]),
        ("block_diag(blocks=8)", (100, 64), ["8 blocks", "100", "64", "1, 2, 4", "96", "104"]),
        ("block_diag(params=0.1)", (100, 64), ["100", "64", "1, 2, 4", "0.25"]),
        ("blast(blocks=8)", (100, 64), ["8 blocks", "100", "64", "1, 2, 4", "96", "104"]),
        ("circulant", (6, 8), ["6", "8", "toeplitz"]),
        ("convolution(spatial_shape=(4, 4))", (40, 32), ["in_features=40", "32", "48"]),
        ("convolution(spatial_shape=(4, 4))", (32, 40), ["out_features=40", "32", "48"]),
        ("convolution(spatial_shape=4, kernel_size=5, padding='valid')", (4, 4), ["5", "4", "valid"]),
        ("btt(params=0.01)", (64, 64), ["rank 1", "1024", "40", "0.25"]),
        ("low_rank(params=0.01)", (64, 64), ["rank 1", "128", "40", "0.0313"]),
        ("monarch(params=0.001)", (64, 64), ["64x64", "128", "4"]),
        ("einsum", (3, 16), ["in_features=3", "4"]),
        ("einsum", (16, 5), ["out_features=5", "4, 6"]),
        ("einsum(pattern='j, ij -> i', sizes=(('i', 3), ('j', 4)))", (4, 5), ["3x4", "5x4"]),
    ],
)
def test_sizes_that_cannot_work_name_those_that_would(spec, sizes, words):
    with pytest.raises(StructureError) as caught:
        so.structure(spec).plan(*sizes)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", [*NAMES, *CHAINLESS, "einsum"])
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-4, 4), (8, 4.0), ("8", 8)])
def test_sizes_are_positive_whole_numbers(name, sizes):
    wrong = next(size for size in sizes if not (isinstance(size, int) and size > 0))
    with pytest.raises(StructureError) as caught:
        so.structure(name).plan(*sizes)
    assert f"{'in' if sizes[0] == wrong else 'out'}_features" in str(caught.value)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("name", CHAINLESS)
def test_what_is_no_chain_says_so(name):
    with pytest.raises(TypeError, match=rf"{name} is not a chain.*\.plan\("):
        so.structure(name).chain(8, 8)


# ------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("spec", "sizes", "words"),
    [
        ("btt(modes='greedy')", (512, 608), ["608x512", "256 of 512"]),
        ("btt(modes='greedy')", (608, 512), None),
        ("kron(modes=((2, 8), (8, 2)))", (16, 16), ["16x16", "4 of 16"]),
        ("tt(modes=((2, 8), (8, 2)), rank=3)", (16, 16), ["12 of 16"]),
        ("btt", (16, 64), None),
        ("btt(blocks=2, rank=4)", (16, 64), None),
        ("btt(blocks=2)", (16, 64), ["64x16", "4 of 16"]),
        ("btt(blocks=1)", (16, 16), ["1 of 16"]),
    ],
)
def test_capped_rank(spec, sizes, words):
    if words is None:
        so.structure(spec).chain(*sizes)  # at full rank: the warning would be an error here
        return
    with pytest.warns(StructureWarning) as caught:
        so.structure(spec).chain(*sizes)
    (message,) = [str(warning.message) for warning in caught]
    assert all(word in message for word in ("cap the rank", *words)), message


@pytest.mark.parametrize(
    ("spec", "sizes", "useful"),
    [
        ("btt(rank={})", (16, 16), 4),
        ("btt(rank={})", (12, 30), 3),  # modes (4, 3) and (6, 5): min(m_1, n_2) = min(6, 3)
        ("btt(rank={}, modes='greedy')", (768, 768), 16),
        ("btt(rank={})", (768, 768), 24),
        ("btt(rank={}, blocks=2)", (16, 16), 8),
        ("tt(rank={})", (16, 16), 16),
        ("low_rank(rank={})", (8, 12), 8),
        ("blast(rank={})", (8, 12), 8),
        ("btt(rank=({}, 4), num_cores=3)", (64, 64), 4),
        ("btt(rank=(4, {}), num_cores=3)", (64, 64), 4),
        ("tt(rank=({}, 16), num_cores=3)", (64, 64), 16),
    ],
)
def test_wasteful_rank(spec, sizes, useful):
    chain = so.structure(spec.format(useful)).chain(*sizes)
    with pytest.warns(StructureWarning, match=rf"{useful + 1} is more than useful; {useful} "):
        wasteful = so.structure(spec.format(useful + 1)).chain(*sizes)
    assert wasteful.num_params > chain.num_params  # warned, never clamped


def test_monarch_never_warns():
    for d_in, d_out, blocks in ((16, 16, 4), (512, 608, 8), (10, 7, 4), (64, 8, 16), (7, 13, 5)):
        chain = so.structure("monarch", blocks=blocks).chain(d_in, d_out)
        assert chain.rank_bound == min(d_in, d_out)


# -------------------------------------------------------------------------------------------------------------- budgets


@given(st.sampled_from(["low_rank", "btt", "tt", "blast"]), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 2))
def test_a_budget_gives_the_largest_rank(name, d_in, d_out, params):
    spec = so.structure(name, params=params)
    try:
        chain = quietly(spec.chain, d_in, d_out)
    except StructureError as error:
        rank_one = quietly(so.structure(name, rank=1).chain, d_in, d_out)
        assert rank_one.num_params > params * d_in * d_out
        # The budget that the message recommends works.
        recommended = float(str(error).rpartition("params>=")[2])
        assert quietly(so.structure(name, params=recommended).chain, d_in, d_out) == rank_one
        return
    assert chain.num_params <= params * d_in * d_out * (1 + 1e-12)
    rank = next(r for r in range(1, 10**6) if quietly(so.structure(name, rank=r).chain, d_in, d_out) == chain)
    assert quietly(so.structure(name, rank=rank + 1).chain, d_in, d_out).num_params > params * d_in * d_out


@given(st.sampled_from(["monarch", "block_diag"]), st.integers(1, 60), st.integers(1, 60), st.floats(0.02, 2))
def test_a_budget_gives_the_fewest_blocks(name, d_in, d_out, params):
    try:
        chain = so.structure(name, params=params).chain(d_in, d_out)
    except StructureError:
        for blocks in range(1, max(d_in, d_out) + 1):
            if name == "monarch" or d_in % blocks == d_out % blocks == 0:
                assert so.structure(name, blocks=blocks).chain(d_in, d_out).num_params > params * d_in * d_out
        return
    assert chain.num_params <= params * d_in * d_out * (1 + 1e-9)
    for blocks in range(1, chain.factors[0].blocks):
        if name == "monarch" or d_in % blocks == d_out % blocks == 0:
            assert so.structure(name, blocks=blocks).chain(d_in, d_out).num_params > params * d_in * d_out


def test_a_budget_of_large_layers_takes_no_time():
    start = time.perf_counter()
    with pytest.raises(StructureError, match="the least is 52400"):
        so.structure("monarch(params=0.00001)").chain(50304, 2048)
    for text in ("low_rank(params=0.01)", "monarch(params=0.01)", "btt(params=0.1)", "block_diag(params=0.1)"):
        assert so.structure(text).chain(50304, 2048).num_params <= so.structure(text).params * 50304 * 2048
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("spec", "size", "params"),
    [
        ("btt(params=0.25)", 1024, 262_144),  # rank 4
        ("btt(params=0.25, num_cores=3)", 4096, None),
        ("btt(params=0.5, blocks=8)", 1024, None),
        ("low_rank(params=0.25)", 1024, 262_144),  # rank 128
        ("monarch(params=0.25)", 1024, 262_144),  # 8 blocks
        ("block_diag(params=0.25)", 1024, 262_144),  # 4 blocks
        ("block_diag(params=0.3)", 1024, 262_144),
        ("tt(params=0.0078125)", 1024, 8192),  # rank 4
    ],
)
def test_budgets_that_are_met_exactly(spec, size, params):
    chain = quietly(so.structure(spec).chain, size, size)
    assert chain.num_params <= so.structure(spec).params * size * size
    if params is not None:
        assert chain.num_params == params


# ---------------------------------------------------------------------------------------------------------------- plans

AWKWARD = [(1, 1), (1, 7), (7, 1), (7, 7), (13, 5), (12, 18), (16, 16), (10, 24), (30, 8)]
VARIANTS = [
    *("dense", "low_rank", "low_rank(rank=2)", "kron", "kron(num_factors=3)", "kron(num_factors=1)"),
    *("tt", "tt(rank=2)", "tt(rank=2, num_cores=3)", "tt(num_cores=1)", "btt", "btt(rank=2)", "btt(blocks=2)"),
    *("btt(rank=2, num_cores=3)", "btt(num_cores=1)", "btt(num_cores=4, modes='greedy')", "btt(params=0.7)"),
    *("monarch", "monarch(blocks=3)", "monarch(blocks=4)", "monarch(params=0.9)", "monarch(blocks=16)"),
    *("block_diag", "block_diag(blocks=2)", "block_diag(blocks=1)", "blast", "blast(rank=2, blocks=2)"),
    *("circulant", "toeplitz", "convolution", "convolution(spatial_shape=4, kernel_size=2, padding='valid')"),
    *("convolution(spatial_shape=(2, 3), padding='circular', kernel_size=(1, 3))", "convolution(kernel_size=1)"),
    *("einsum", "einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.5))", "einsum(order='b')"),
]


@pytest.mark.torch
@pytest.mark.parametrize("text", VARIANTS)
def test_plans_at_awkward_sizes(text):
    """A plan either says what would work, or its function, its operator and its counts are one and the same matrix."""
    torch = pytest.importorskip("torch")
    spec, made = so.structure(text), 0
    generator = torch.Generator().manual_seed(0)
    for d_in, d_out in AWKWARD:
        try:
            plan = quietly(spec.plan, d_in, d_out)
        except StructureError:
            continue
        made += 1
        assert isinstance(plan, Plan)
        assert (plan.in_features, plan.out_features) == (d_in, d_out)
        operator = quietly(so.random, spec, (d_out, d_in), generator=generator, dtype=torch.float64)
        assert operator.shape == (d_out, d_in)
        assert so.num_params(operator) == plan.num_params == sum(map(math.prod, plan.stored_shapes))
        assert so.macs(operator) == so.macs(plan) == plan.macs
        assert so.factors(operator) == plan.factors
        assert len(plan.factors) == len(plan.stored_shapes)
        factors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in plan.stored_shapes]
        x = torch.randn(2, 3, d_in, dtype=torch.float64, generator=generator)
        dense = plan.operator(factors).to_dense()
        assert dense.shape == (d_out, d_in)
        torch.testing.assert_close(plan.apply(factors, x), x @ dense.mT)
        torch.testing.assert_close(plan.operator(factors) @ x[0, 0], dense @ x[0, 0])
        if isinstance(getattr(plan, "chain", None), Chain):
            assert plan.chain == quietly(spec.chain, d_in, d_out)
            assert plan.stored_shapes == tuple((f.blocks, f.fan_out, f.fan_in) for f in plan.factors)
            assert plan.chain.rank_bound >= torch.linalg.matrix_rank(dense).item()
    assert made >= 1


@pytest.mark.jax
@pytest.mark.parametrize("text", ["btt(rank=2)", "monarch(blocks=3)", "toeplitz", "convolution"])
def test_plans_on_jax(text):
    jax = pytest.importorskip("jax")
    plan = so.structure(text).plan(10, 20)
    keys = jax.random.split(jax.random.key(0), len(plan.stored_shapes) + 1)
    factors = [jax.random.normal(key, shape) for key, shape in zip(keys[1:], plan.stored_shapes, strict=True)]
    x = jax.random.normal(keys[0], (3, 10))
    dense = np.asarray(plan.operator(factors).to_dense())
    np.testing.assert_allclose(plan.apply(factors, x), x @ dense.T, atol=1e-10)
    np.testing.assert_allclose(jax.jit(plan.apply)(factors, x), x @ dense.T, atol=1e-10)


@pytest.mark.parametrize("text", ["btt(rank=2)", "kron", "circulant", "toeplitz", "convolution"])
def test_plans_can_be_copied_and_pickled(text):
    """Layers hold their plan: whoever copies or saves a whole model copies and saves it, too."""
    plan = so.structure(text).plan(16, 16)
    for copied in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert copied.factors == plan.factors
        assert copied.stored_shapes == plan.stored_shapes
    assert plan == so.structure(text).plan(16, 16)
    assert hash(plan) == hash(so.structure(text).plan(16, 16))
    assert "object at 0x" not in repr(plan)


def test_defaults():
    """Square root of the size where the authors have it."""
    assert so.structure("low_rank").chain(1024, 4096).factors[0].fan_out == 32
    assert so.structure("low_rank").chain(1000, 1000).factors[0].fan_out == 32  # rounded up
    assert so.structure("monarch").chain(1024, 4096).factors[0].blocks == 32
    assert so.structure("monarch").chain(1000, 1000).factors[0].blocks == 32
    assert so.structure("btt").chain(1024, 1024) == so.structure("btt", rank=1, num_cores=2).chain(1024, 1024)
    assert so.structure("tt").chain(1024, 1024).num_params == 2 * 1024


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("dense", "j, ij -> i"),
        ("low_rank", "j, sj, is -> i"),
        ("kron", "cd, bd, ac -> ab"),
        ("tt", "cd, sbd, acs -> ab"),
        ("btt", "cd, sbcd, abcs -> ab"),
        ("btt(num_cores=3)", "def, tcdef, sbcdet, abcds -> abc"),
        ("blast", "jn, jnr, ijr, imr -> im"),
        ("block_diag", "cd, cbd -> cb"),
        ("monarch(blocks=4)", "cd, csbd, bacs -> ab"),
        ("einsum", "gba, fdrga, ferbg -> fed"),
    ],
)
def test_patterns(spec, pattern):
    """As the documentation writes them, label for label."""
    assert so.structure(spec).chain(64, 64).pattern == pattern


@pytest.mark.parametrize("name", ["tt", "btt"])
def test_more_cores_than_letters(name):
    start = time.perf_counter()
    chain = so.structure(name, num_cores=40).chain(2**40, 2**40)
    assert len(chain.factors) == 40
    assert len(set("".join(chain.terms))) == 40 + 40 + 39
    assert chain.rank_bound == 2**40
    assert time.perf_counter() - start < 5  # not all 2**40 cuts were tried


def test_blocks_of_btt():
    """Both factors have that many blocks."""
    chain = so.structure("btt", rank=3, blocks=4).chain(24, 40)
    assert chain.shape_of(chain.terms[0]) == (4, 6)
    assert chain.shape_of(chain.terms[-1]) == (10, 4)
    assert [factor.blocks for factor in chain.factors] == [4, 4]
    assert [factor.stored_shape for factor in chain.factors] == [(4, 3 * 4, 6), (4, 10, 4 * 3)]


def test_modes_are_listed_most_significant_first():
    """The smallest are contracted and emitted first."""
    for text in ("kron", "tt", "btt"):
        for rule, out, inn in (("balanced", (6, 5), (5, 4)), ("greedy", (10, 3), (10, 2))):
            chain = quietly(so.structure(text, modes=rule).chain, 20, 30)
            assert (chain.shape_of(chain.terms[-1]), chain.shape_of(chain.terms[0])) == (out, inn)
            first, last = chain.factors
            assert (first.fan_in, first.fan_out, last.fan_in, last.fan_out) == (inn[1], out[1], inn[0], out[0])


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 5])
def test_any_number_of_cores(cores):
    """Also a single one, which is dense."""
    d_in, d_out = 2**cores, 3**cores
    for name in ("tt", "btt"):
        chain = quietly(so.structure(name, num_cores=cores, rank=2 if cores > 1 else None).chain, d_in, d_out)
        assert chain.shape == (d_out, d_in)
        assert len(chain.factors) == cores
    kron = so.structure("kron", num_factors=cores).chain(d_in, d_out)
    assert kron.num_params == cores * 6
    if cores == 1:
        assert chain.num_params == kron.num_params == d_in * d_out


def test_a_structure_of_ones_own():
    """A frozen class with a chain is all that it takes; nothing needs to be registered to be used."""

    @dataclasses.dataclass(frozen=True)
    class Diagonal(Structure):
        name = "diagonal"

        def chain(self, in_features: int, out_features: int) -> Chain:
            return Chain("j, j -> j", {"j": in_features})

        build = staticmethod(so.Einsum.from_factors)

    plan = Diagonal().plan(5, 5)
    assert (plan.num_params, plan.macs, plan.stored_shapes) == (5, 5, ((5, 1, 1),))
    assert [scale.lr_scale for scale in so.mup.scales(plan)] == [5]
    assert str(Diagonal()) == "diagonal"
