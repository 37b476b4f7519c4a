"""Points of the two-factor family: the formulas of their exponents against chains, counts and ranks of matrices."""

import math
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import structops as so
from structops import POINTS, Theta
from structops.errors import StructureError
from structops.operators import Einsum

# Paper's taxonomy: (omega, psi, nu) of each point.
TAXONOMY = {
    "dense": (0, 1, 1),
    "low_rank": (0, F(1, 2), F(1, 2)),
    "kron": (F(1, 2), 1, F(1, 2)),
    "tt": (F(1, 2), 1, F(3, 4)),
    "monarch": (0, 1, F(1, 2)),
    "btt": (0, 1, F(1, 2)),
    "low_rank_btt": (0, F(1, 2), F(3, 10)),
    "unbalanced_btt": (0, 1, F(2, 3)),
    "generic": (F(1, 4), 1, F(1, 2)),
}

# At width 4096: parameters, MACs with A first, (omega, psi, nu), std and Adam's multiple of A and of B.
COUNTS = {
    "btt": (524_288, 524_288, (0, 1, 1 / 2), (0.125, 0.125), (32, 32)),
    "low_rank": (524_288, 524_288, (0, 1 / 2, 1 / 2), (1 / 512, 0.125), (0.5, 32)),
    "kron": (8_192, 524_288, (1 / 2, 1, 1 / 2), (0.125, 0.125), (32, 32)),
    "tt": (65_536, 4_194_304, (1 / 2, 1, 3 / 4), (0.125, 0.015625), (32, 4)),
    "unbalanced_btt": (1_114_112, 1_114_112, (0, 1, 2 / 3), (0.25, 0.0625), (128, 8)),
    "generic": (65_536, 524_288, (1 / 4, 1, 1 / 2), (0.125, 0.125), (32, 32)),
}


@st.composite
def points(draw, parts=4):
    """A point whose exponents are multiples of 1 / parts, so that width 2**(parts * k) has whole sizes."""

    def split():
        a = draw(st.integers(0, parts))
        b = draw(st.integers(0, parts - a))
        return F(a, parts), F(b, parts), F(parts - a - b, parts)

    return tuple(map(float, (*split(), *split(), F(draw(st.integers(0, parts)), parts))))


def test_the_named_points_are_those_of_the_paper():
    assert set(TAXONOMY) == set(POINTS)
    for name, expected in TAXONOMY.items():
        assert POINTS[name].exponents() == pytest.approx(tuple(map(float, expected))), name


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_scales_at_width_4096(name):
    params, macs, exponents, stds, rates = COUNTS[name]
    chain = Einsum.from_theta(POINTS[name], 4096, 4096, order="a")
    assert (chain.num_params, chain.macs) == (params, macs)
    assert POINTS[name].exponents("a") == pytest.approx(exponents)
    scales = so.mup.scales(chain)
    assert [row.init_std for row in scales] == pytest.approx(stds)
    assert [row.lr_scale for row in scales] == pytest.approx(rates)


@given(points(), st.sampled_from(["a", "b", "cheapest"]))
def test_exponents_are_those_of_growing_chains(theta, order):
    point = Theta.of(theta)
    small, large = (Einsum.from_theta(point, 2**n, 2**n, order) for n in (40, 200))

    def slope(number):
        return math.log2(number(large) / number(small)) / 160

    def bound(chain):
        return max(1, chain.rank_bound)

    omega, psi, nu = point.exponents(order)
    # A sum of two powers grows like the larger one, up to a constant that the slope leaves out.
    assert slope(lambda c: c.macs) == pytest.approx(1 + nu, abs=0.01)
    assert slope(lambda c: c.macs) - slope(lambda c: c.num_params) == pytest.approx(omega, abs=0.02)
    assert slope(bound) == pytest.approx(psi, abs=0.01)
    # The measures of one chain take its dominant factors, which leaves no constant either.
    assert (large.omega, large.psi, large.nu) == pytest.approx((omega, psi, nu), abs=1e-9)


@given(points())
def test_neighbours_cost_the_same(theta):
    point = Theta.of(theta)
    for other in (point.mirror(), point.transpose()):
        assert other.exponents() == pytest.approx(point.exponents())
    assert point.mirror().mirror() == point == point.transpose().transpose()
    assert point.mirror().exponents("b") == pytest.approx(point.exponents("a"))
    assert point.transpose().exponents("a") == pytest.approx(point.exponents("a"))
    assert point.exponents(point.cheapest) == pytest.approx(point.exponents())


@given(points(parts=3))
def test_random_members_have_the_rank_of_the_formula(theta):
    """Width 64 has sizes 1, 4, 16 and 64; sharing may cost generic members a little of the bound."""
    rng = np.random.default_rng(0)
    point = Theta.of(theta)
    sizes = dict(zip("abgdefr", (round(64**t) for t in theta), strict=True))
    A, B = (rng.standard_normal([sizes[label] for label in labels]) for labels in ("fdrga", "ferbg"))
    W = np.einsum("fdrga,ferbg->fedgba", A, B, optimize=True).reshape(64, 64)
    bound = 64**point.psi
    assert Einsum.from_theta(point, 64, 64).rank_bound == round(bound)
    rank = np.linalg.matrix_rank(W)
    assert 0.9 * bound <= rank <= round(bound)


def test_what_the_properties_say():
    assert POINTS["btt"].is_full_rank
    assert not POINTS["btt"].is_shared
    assert not POINTS["btt"].is_degenerate
    assert POINTS["kron"].is_shared
    assert not POINTS["low_rank"].is_full_rank
    for point in POINTS.values():
        assert not point.is_degenerate
        room = min(point.alpha, point.epsilon)
        assert not point.with_rank(room).is_degenerate
        assert room == 1 or point.with_rank(room + 0.01).is_degenerate


def test_the_tensor_train_of_the_papers_figure_applies_b_first():
    point = Theta(1 / 3, 2 / 3, 0, 3 / 4, 1 / 4, 0)
    assert point.cheapest == "b"
    assert point.nu < point.exponents("a").nu
    assert Einsum.from_theta(point, 4096, 4096).macs == 98_304
    assert Einsum.from_theta(point, 4096, 4096, order="a").macs == 3_145_728


def test_the_spec_takes_a_point():
    spec = so.structure("einsum", theta=POINTS["tt"])
    assert spec == so.structure(str(spec)) == so.structure("einsum", theta=tuple(POINTS["tt"]))
    assert hash(spec) is not None
    assert '"theta": [0.5' in spec.to_json()
    assert spec.chain(256, 256) == Einsum.from_theta(POINTS["tt"], 256, 256)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Theta(1, 1, 0, 1, 0, 0), "sum to 1"),
        (lambda: Theta(2, -1, 0, 1, 0, 0), r"in \[0, 1\]"),
        (lambda: Theta("a", 0, 0, 1, 0, 0), r"in \[0, 1\]"),
        (lambda: Theta(float("nan"), 0, 1, 1, 0, 0), r"in \[0, 1\]"),
        (lambda: Theta.of((1, 0)), "7 exponents"),
        (lambda: POINTS["btt"].with_rank(1.5), r"in \[0, 1\]"),
        (lambda: POINTS["btt"].exponents("c"), "cheapest, a or b"),
    ],
)
def test_errors(wrong, says):
    with pytest.raises(StructureError, match=says):
        wrong()
