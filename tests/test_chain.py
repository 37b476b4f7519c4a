"""The chain: what is read off a pattern, and what is no pattern."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

from structops.chain import Chain, Factor
from structops.errors import PatternError, ShapeError
from structops.pattern import Regroup, Step

# Name: pattern, sizes, and for every factor its batch, emitted, contracted and shared labels.
ROLES = {
    "dense": ("j, ij -> i", {"i": 3, "j": 5}, [("", "i", "j", "")]),
    "low rank": ("j, sj, is -> i", {"i": 7, "j": 5, "s": 2}, [("", "s", "j", ""), ("", "i", "s", "")]),
    "kron": ("cd, bd, ac -> ab", {"a": 2, "b": 3, "c": 5, "d": 7}, [("", "b", "d", "c"), ("", "a", "c", "b")]),
    "tt": (
        "cd, sbd, acs -> ab",
        {"a": 2, "b": 3, "c": 5, "d": 7, "s": 4},
        [("", "sb", "d", "c"), ("", "a", "cs", "b")],
    ),
    "btt": (
        "cd, sbcd, abcs -> ab",
        {"a": 2, "b": 3, "c": 5, "d": 7, "s": 4},
        [("c", "sb", "d", ""), ("b", "a", "cs", "")],
    ),
    "btt, 3 cores": (
        "xyz, tkxyz, sjkxyt, ijkxs -> ijk",
        {"x": 2, "y": 3, "z": 4, "i": 5, "j": 2, "k": 3, "s": 6, "t": 7},
        [("xy", "tk", "z", ""), ("kx", "sj", "yt", ""), ("jk", "i", "xs", "")],
    ),
    "blast": (
        "jn, jnr, ijr, imr -> im",
        {"j": 2, "n": 3, "r": 4, "i": 5, "m": 6},
        [("j", "r", "n", ""), ("r", "i", "j", ""), ("i", "m", "r", "")],
    ),
    "butterfly": (
        "xyz, kxyz, jkxy, ijkx -> ijk",
        dict.fromkeys("xyzijk", 2),
        [("xy", "k", "z", ""), ("kx", "j", "y", ""), ("jk", "i", "x", "")],
    ),
    "two-factor family": (
        "gba, fdrga, ferbg -> fed",
        {"g": 2, "b": 3, "a": 4, "f": 5, "d": 2, "r": 3, "e": 4},
        [("g", "fdr", "a", "b"), ("f", "e", "rbg", "d")],
    ),
    "block diagonal": ("cd, cbd -> cb", {"b": 2, "c": 3, "d": 4}, [("c", "b", "d", "")]),
    "diagonal": ("j, j -> j", {"j": 4}, [("j", "", "", "")]),
    "outer product, modes of 1 kept": ("a, ba -> b", {"a": 1, "b": 4}, [("", "b", "a", "")]),
    "factor that only emits": ("a, b -> ab", {"a": 3, "b": 4}, [("", "b", "", "a")]),
    "factor that only contracts": ("ab, b -> a", {"a": 3, "b": 4}, [("", "", "b", "a")]),
    "the same factor twice": ("j, ij, ij, kij -> ki", {"i": 2, "j": 3, "k": 4}, None),
}


def loops(chain: Chain) -> tuple[list[int], int]:
    """Multiplications of every factor, and multiplications in total, by counting the terms of each sum.

    Applying a factor costs one multiplication for every value of all labels in the state and the factor together.
    """
    size, state, counts = dict(chain.sizes), set(chain.terms[0]), []
    terms = chain.terms[1:]
    for position, term in enumerate(terms[:-1]):
        if "=" in term:
            state = set(term.split("=")[1])
            continue
        counts.append(sum(1 for _ in np.ndindex(*[size[label] for label in sorted(state | set(term))])))
        later = set()
        for other in terms[position + 1 :]:
            later |= set(other.split("=")[0])
            if "=" in other:
                break
        state = (state | set(term)) & later
    return counts, sum(counts)


@pytest.mark.parametrize("name", [name for name, (_, _, roles) in ROLES.items() if roles])
def test_roles(name):
    pattern, sizes, roles = ROLES[name]
    steps = Chain(pattern, sizes).steps
    assert all(isinstance(step, Step) for step in steps)
    expected = [tuple(set(labels) for labels in role) for role in roles]
    assert [tuple(map(set, (s.batch, s.emitted, s.contracted, s.shared))) for s in steps] == expected
    # Labels of the factor are in the order of the factor.
    for step in steps:
        for part in (step.batch, step.emitted, step.contracted):
            assert [label for label in step.labels if label in part] == list(part)


@pytest.mark.parametrize("name", ROLES)
def test_counts_are_those_of_loops(name):
    pattern, sizes, _ = ROLES[name]
    chain = Chain(pattern, sizes)
    counts, total = loops(chain)
    assert [factor.macs for factor in chain.factors] == counts
    assert chain.macs == total
    assert chain.flops == 2 * total
    assert chain.num_params == sum(math.prod(sizes[label] for label in term) for term in chain.terms[1:-1])
    assert chain.xi == total / chain.in_features
    for factor in chain.factors:
        assert factor.num_params == factor.blocks * factor.fan_out * factor.fan_in
        assert factor.macs == factor.num_params * factor.sharing


@pytest.mark.parametrize("name", ROLES)
def test_transpose(name):
    pattern, sizes, _ = ROLES[name]
    chain = Chain(pattern, sizes)
    assert chain.transpose() == chain.T
    assert chain == chain.T.T
    assert hash(chain.T.T) == hash(chain)
    assert chain.T.shape == chain.shape[::-1]
    assert (chain.T.macs, chain.T.num_params, chain.T.rank_bound) == (chain.macs, chain.num_params, chain.rank_bound)
    assert chain.T.factors == tuple(factor.T for factor in reversed(chain.factors))
    for before, after in zip(chain.factors, reversed(chain.T.factors), strict=True):
        assert (before.fan_in, before.fan_out) == (after.fan_out, after.fan_in)
        assert (before.blocks, before.sharing, before.shape) == (after.blocks, after.sharing, after.shape)
    # Between two factors there are as many numbers either way, so that the backward pass needs no more.
    assert chain.T.intermediate_widths == chain.intermediate_widths[::-1]


def test_a_chain_is_a_value():
    chain = Chain("cd,sbcd,abcs->ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 1, "unused": 9})
    same = Chain(" cd, sbcd,\n abcs -> ab ", tuple({"s": 1, "d": 5, "c": 2, "b": 3, "a": 4}.items()), 10, 12)
    assert chain == same
    assert hash(chain) == hash(same)
    assert {chain: 1}[same] == 1
    assert chain != Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 2})
    assert chain != Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 1}, in_features=9)
    assert repr(chain) == "Chain('cd, sbcd, abcs -> ab', a=4, b=3, c=2, d=5, s=1)"
    for copied in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert copied == chain
        assert copied.moves == chain.moves
    with pytest.raises(AttributeError):
        chain.in_features = 3


def test_sizes_may_be_numpy_integers():
    chain = Chain("j, ij -> i", {"i": np.int64(3), "j": np.int64(4)})
    assert chain == Chain("j, ij -> i", {"i": 3, "j": 4})
    assert all(type(size) is int for _, size in chain.sizes)


def test_intermediate_widths_and_saved_activations():
    sizes = {"a": 4, "b": 3, "c": 2, "d": 5, "s": 6}
    btt, tt = Chain("cd, sbcd, abcs -> ab", sizes), Chain("cd, sbd, acs -> ab", sizes)
    assert btt.intermediate_widths == tt.intermediate_widths == (6 * 3 * 2,)  # rank x input blocks x output blocks
    assert btt.saved_activations == tt.saved_activations == 10 + 36
    assert Chain("j, ij -> i", {"i": 2, "j": 3}).intermediate_widths == ()
    assert Chain("j, ij -> i", {"i": 2, "j": 3}).saved_activations == 3
    assert Chain("j, sj, is -> i", {"i": 2, "j": 3, "s": 7}).intermediate_widths == (7,)


# -------------------------------------------------------------------------------------------------- padding and regroup


def test_padded_chain():
    sizes = {"a": 4, "b": 3, "c": 2, "d": 5, "s": 1}
    chain = Chain("cd, sbcd, abcs -> ab", sizes, in_features=7, out_features=11)
    full = Chain("cd, sbcd, abcs -> ab", sizes)
    assert chain.shape == (11, 7)
    assert (chain.padded_in, chain.padded_out) == (10, 12)
    assert (chain.num_params, chain.macs) == (full.num_params, full.macs)  # padded factors are counted
    assert chain.factors == full.factors
    assert chain.xi == full.macs / 7
    assert chain.rank_bound <= 7
    assert chain.saved_activations == full.saved_activations  # the padding is kept, too
    assert chain.T.shape == (7, 11)
    assert chain == chain.T.T
    assert repr(chain) == "Chain('cd, sbcd, abcs -> ab', a=4, b=3, c=2, d=5, s=1, padded from 11x7)"
    assert "padded" not in repr(full)


def test_regroup():
    chain = Chain("kp, kqp, kq=rl, lsr -> sl", {"k": 4, "p": 3, "q": 6, "r": 6, "l": 4, "s": 5})
    assert chain.shape == (20, 12)
    assert [type(step) for step in chain.steps] == [Step, Regroup, Step]
    right, left = chain.factors
    assert (right.blocks, right.fan_out, right.fan_in, right.sharing) == (4, 6, 3, 1)
    assert (left.blocks, left.fan_out, left.fan_in, left.sharing) == (4, 5, 6, 1)
    assert chain.macs == chain.num_params == 4 * 6 * 3 + 4 * 5 * 6  # re-reading costs nothing
    assert chain.intermediate_widths == (24,)
    assert chain.rank_bound == 12
    assert chain.T.pattern == "sl, lsr, rl=kq, kqp -> kp"
    assert chain == chain.T.T
    assert (chain.T.macs, chain.T.factors) == (chain.macs, (left.T, right.T))


def test_labels_before_and_after_a_regroup_are_different_labels():
    chain = Chain("kp, kqp, kq=rk, ksr -> sk", {"k": 4, "p": 3, "q": 6, "r": 6, "s": 5})
    first, last = chain.factor_steps
    assert (first.batch, first.emitted, first.contracted) == ("k", "q", "p")
    assert (last.batch, last.emitted, last.contracted) == ("k", "s", "r")
    assert chain == chain.T.T


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("ab, ab=c, dc -> d", {"a": 2, "b": 3, "c": 6, "d": 4}),  # before the first factor
        ("c, dc, d=ab -> ba", {"a": 2, "b": 2, "c": 6, "d": 4}),  # after the last
        ("ab, ab=cd, dc=e, fe -> f", {"a": 2, "b": 3, "c": 3, "d": 2, "e": 6, "f": 4}),  # two in a row
        ("ab, ba=cd, ed -> ce", {"a": 2, "b": 3, "c": 3, "d": 2, "e": 4}),  # state listed in another order
    ],
)
def test_regroups_anywhere(pattern, sizes):
    chain = Chain(pattern, sizes)
    assert chain == chain.T.T
    assert chain.macs == loops(chain)[1] == chain.T.macs
    assert len(chain.factors) == len(chain.intermediate_widths) + 1


# ------------------------------------------------------------------------------------------------------------- mistakes

SIZES = {"a": 4, "b": 3, "c": 2, "d": 5, "s": 1, "e": 6}


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("cd, sbcd, abc -> ab", PatternError, ["'s'", "no later factor", "'sbcd'"]),  # emitted, never contracted
        ("cd, bd -> b", PatternError, ["'c'", "no later factor"]),  # an input mode summed away
        ("cd, bd, a -> ab", PatternError, ["'c'", "no later factor"]),
        ("cdd, bd, ac -> ab", PatternError, ["'cdd'", "distinct"]),
        ("cd, bbd, ac -> ab", PatternError, ["'bbd'", "distinct"]),
        ("cd, bd, ac -> aa", PatternError, ["'aa'", "distinct"]),
        ("cd, bd, ac -> abe", PatternError, ["output", "abe"]),  # never emitted
        ("cd, bd, ac -> a", PatternError, ["'b'"]),  # left over
        ("cd -> cd", PatternError, ["no factor"]),
        ("cd, cd=dc -> dc", PatternError, ["no factor"]),
        ("cd, cd=e -> e", PatternError, ["no factor"]),
        ("cd, bd, ac", PatternError, ["->", "expected"]),
        ("", PatternError, ["expected"]),
        ("cd, bd, ac -> ", PatternError, ["expected"]),
        (" -> ab", PatternError, ["expected"]),
        ("cd, , bd, ac -> ab", PatternError, ["expected"]),
        ("cd, bd, ac -> ab, b", PatternError, ["expected"]),
        ("cd, bd, ac -> ab -> ab", PatternError, ["expected"]),
        ("cd, bd, ac => ab", PatternError, ["expected"]),
        ("c-d, bd, ac -> ab", PatternError, ["'c-d'", "letter"]),
        ("cd, *d, ac -> a*", PatternError, ["letter"]),
        ("cd, ...d, ac -> ab", PatternError, ["letter"]),
        ("cd, bd, b=e, ae -> ae", PatternError, ["regroup", "'c'"]),  # c is neither re-read nor contracted
        ("cd, bd, b=a, ac -> ab", PatternError, ["regroup", "'c'"]),  # c comes too late
        ("cd, bd, cbe=a -> a", PatternError, ["regroup", "'cbe=a'"]),  # e is not in the state
        ("cd, bd, cb=, a -> ab", PatternError, ["'cb='"]),
        ("cd, bd, cb=a=e -> e", PatternError, ["regroup"]),
        ("cd=e, ae -> a", PatternError, ["regroup"]),
        ("cd, bd, ac -> ab=e", PatternError, ["regroup"]),
        ("cd, bd, cb=ae, a -> e", ShapeError, ["6", "24", "regroup"]),
        ("cd, zd, ac -> az", ShapeError, ["no size", "z"]),
    ],
)
def test_what_is_no_chain(pattern, error, words):
    with pytest.raises(error) as caught:
        Chain(pattern, SIZES)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("size", [0, -2, 2.5, None, "3"])
def test_a_size_is_a_positive_whole_number(size):
    with pytest.raises(ShapeError, match=r"'a'|\{'a'"):
        Chain("cd, bd, ac -> ab", {**SIZES, "a": size})


@pytest.mark.parametrize(("name", "value"), [("in_features", 11), ("in_features", -1), ("out_features", 13)])
def test_a_true_size_is_at_most_the_padded_one(name, value):
    with pytest.raises(ShapeError, match=f"{name}={value}.* hold 1[02] entries"):
        Chain("cd, bd, ac -> ab", SIZES, **{name: value})


# ----------------------------------------------------------------------------------------------------------------- rank


def dense(chain: Chain, factors: list[np.ndarray]) -> np.ndarray:
    """The matrix of a chain without regroup, by numpy's einsum."""
    basis = np.eye(chain.in_features).reshape(chain.in_features, *chain.shape_of(chain.terms[0]))
    terms = ["Z" + chain.terms[0], *chain.terms[1:-1]]
    y = np.einsum(",".join(terms) + "->Z" + chain.terms[-1], basis, *factors, optimize="greedy")
    return y.reshape(chain.in_features, chain.out_features).T


def numerical_rank(chain: Chain) -> int:
    rng = np.random.default_rng(0)
    return np.linalg.matrix_rank(dense(chain, [rng.standard_normal(factor.shape) for factor in chain.factors]))


KRON, TT, BTT = "cd, bd, ac -> ab", "cd, sbd, acs -> ab", "cd, sbcd, abcs -> ab"
# Input modes c d, output modes a b; d is contracted first, b emitted first.
RANKS = {
    "kron of 2x8 and 8x2": (KRON, {"a": 2, "c": 8, "b": 8, "d": 2}, 4),  # between the factors there are 64 numbers
    "kron of 8x2 and 2x8": (KRON, {"a": 8, "c": 2, "b": 2, "d": 8}, 4),
    "kron of 3x5 and 7x2": (KRON, {"a": 3, "c": 5, "b": 7, "d": 2}, 6),
    "btt (16, 32) to (8, 76)": (BTT, {"d": 16, "c": 32, "b": 8, "a": 76, "s": 1}, 256),
    "btt (16, 32) to (19, 32)": (BTT, {"d": 16, "c": 32, "b": 19, "a": 32, "s": 1}, 512),
    "btt (32, 19) to (16, 32)": (BTT, {"d": 32, "c": 19, "b": 16, "a": 32, "s": 1}, 304),
    "btt, rank 2 lifts it": (BTT, {"d": 8, "c": 8, "b": 2, "a": 32, "s": 2}, 32),
    "tt of two terms": (TT, {"a": 2, "c": 8, "b": 8, "d": 2, "s": 2}, 8),
    "low rank": ("j, sj, is -> i", {"i": 7, "j": 9, "s": 3}, 3),
    "low rank above the sides": ("j, sj, is -> i", {"i": 7, "j": 9, "s": 20}, 7),
    "low-rank btt": ("gba, fdrga, ferbg -> fed", {"g": 3, "b": 1, "a": 9, "f": 3, "d": 1, "r": 2, "e": 9}, 18),
    "block diagonal": ("cd, cbd -> cb", {"b": 2, "c": 5, "d": 4}, 10),
    "blast": ("jn, jnr, ijr, imr -> im", {"j": 3, "n": 4, "r": 2, "i": 3, "m": 4}, 6),
    "butterfly": ("xyz, kxyz, jkxy, ijkx -> ijk", dict.fromkeys("xyzijk", 2), 8),
    "btt, 3 cores": (
        "xyz, tkxyz, sjkxyt, ijkxs -> ijk",
        {"x": 2, "y": 3, "z": 4, "i": 4, "j": 3, "k": 2, "s": 1, "t": 1},
        12,  # x y k, or x j k
    ),
    "a narrow middle": ("ab, cab, dc -> d", {"a": 4, "b": 4, "c": 3, "d": 16}, 3),
}


@pytest.mark.parametrize("name", RANKS)
def test_rank_bound_is_the_rank_of_random_factors(name):
    pattern, sizes, rank = RANKS[name]
    chain = Chain(pattern, sizes)
    assert chain.rank_bound == chain.T.rank_bound == rank
    assert numerical_rank(chain) == rank


def test_rank_bound_across_a_regroup():
    chain = Chain("kp, kqp, kq=rl, lsr -> sl", {"k": 3, "p": 8, "q": 2, "r": 2, "l": 3, "s": 8})
    assert chain.rank_bound == chain.T.rank_bound == 6
    assert Chain("a, sa, s=t, bt -> b", {"a": 9, "s": 4, "t": 4, "b": 9}).rank_bound == 4


def test_rank_bound_is_only_a_bound():
    """Two Kronecker products of 3x5 and 5x3 matrices never add up to full rank."""
    chain = Chain(TT, {"a": 3, "c": 5, "b": 5, "d": 3, "s": 2})
    assert chain.rank_bound == 15
    assert numerical_rank(chain) == 14


# ------------------------------------------------------------------------------------------------------------ exponents

FAMILY = "gba, fdrga, ferbg -> fed"


def test_exponents_do_not_depend_on_the_width():
    """The exponents of one point of the family, at two widths."""
    for width in (2**6, 2**12, 2**18):
        root = math.isqrt(width)
        tt = Chain(FAMILY, {"a": root, "b": root, "g": 1, "d": root, "e": root, "f": 1, "r": 1})
        assert (tt.omega, tt.psi, tt.nu) == pytest.approx((0.5, 1, 0.5), abs=1e-12)
        monarch = Chain(FAMILY, {"a": root, "b": 1, "g": root, "d": 1, "e": root, "f": root, "r": 1})
        assert (monarch.omega, monarch.psi, monarch.nu) == pytest.approx((0, 1, 0.5), abs=1e-12)


def test_exponents_of_dense_and_of_rectangles():
    for i, j in ((64, 64), (64, 512), (512, 64), (7, 13)):
        dense_chain = Chain("j, ij -> i", {"i": i, "j": j})
        assert (dense_chain.omega, dense_chain.psi, dense_chain.nu) == pytest.approx((0, 1, 1))
        assert (dense_chain.T.omega, dense_chain.T.psi, dense_chain.T.nu) == pytest.approx((0, 1, 1))
    low_rank = Chain("j, sj, is -> i", {"i": 4096, "j": 256, "s": 16})
    assert low_rank.psi == pytest.approx(0.5)
    assert low_rank.omega == 0


def test_exponents_of_a_number_are_finite():
    chain = Chain("j, ij -> i", {"i": 1, "j": 1})
    assert (chain.omega, chain.psi, chain.nu) == (0, 1, pytest.approx(-1, abs=1.1))


# --------------------------------------------------------------------------------------------------------------- factor


def test_factor_is_a_value_with_derived_counts():
    factor = Factor("ab", (2, 3), fan_in=3, fan_out=2, sharing=5)
    assert (factor.num_params, factor.macs, factor.blocks) == (6, 30, 1)
    assert Factor("ab", (2, 3), fan_in=2, fan_out=3, sharing=5) == factor.T
    assert factor == factor.T.T
    assert len({factor, Factor("ab", (2, 3), 3, 2, 1, 5)}) == 1
