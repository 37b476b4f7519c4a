"""Structure-aware muP: the paper's tables from chains alone, and the rules for any expression."""

from __future__ import annotations

import math
from fractions import Fraction as F
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import structops as so
from structops.chain import Chain, Factor
from structops.errors import StructureError
from structops.mup import init_std, init_stds, lr_multiplier, scales, width_ratio
from structops.operators import Einsum
from structops.sampling import draw


class Row(NamedTuple):
    """What arXiv 2406.06248 and the authors' code give for one layer; factors in order of application."""

    spec: str
    in_features: int
    out_features: int
    params: int
    macs: int
    std: tuple[float, ...]  # to 6 digits
    adam: tuple[F | int, ...]
    sgd: tuple[F | int, ...] | None = None
    modes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # output, input; most significant first


TABLE = [
    Row("dense", 1024, 1024, 1_048_576, 1_048_576, (0.03125,), (1,), (1,)),
    Row("dense", 1024, 4096, 4_194_304, 4_194_304, (0.03125,), (1,), (1,)),
    Row("dense", 4096, 1024, 4_194_304, 4_194_304, (0.0078125,), (1,), (1,)),
    Row("btt", 256, 256, 8192, 8192, (0.25, 0.25), (8, 8), (F(1, 2), F(1, 2)), ((16, 16), (16, 16))),
    Row("btt", 1024, 1024, 65_536, 65_536, (0.176777,) * 2, (16, 16), (F(1, 2), F(1, 2)), ((32, 32), (32, 32))),
    Row("btt(rank=4)", 1024, 1024, 262_144, 262_144, (0.176777, 0.044194), (16, 4), (2, F(1, 8))),
    Row("btt", 1024, 4096, 196_608, 196_608, (0.176777,) * 2, (16, 16), (F(1, 4), F(1, 4)), ((64, 64), (32, 32))),
    Row("btt", 4096, 1024, 196_608, 196_608, (0.088388,) * 2, (32, 32), (1, 1), ((32, 32), (64, 64))),
    Row("btt(rank=4)", 1024, 4096, 786_432, 786_432, (0.176777, 0.0625), (16, 4)),
    Row("btt(rank=4)", 4096, 1024, 786_432, 786_432, (0.125, 0.022097), (32, 8)),
    Row("btt", 784, 3136, 131_712, 131_712, (0.188982,) * 2, (14, 14), None, ((56, 56), (28, 28))),
    Row("btt", 4096, 4096, 524_288, 524_288, (0.125,) * 2, (32, 32), (F(1, 2), F(1, 2)), ((64, 64), (64, 64))),
    Row("btt(rank=16)", 4096, 4096, 8_388_608, 8_388_608, (0.125, 0.0078125), (32, 2), (8, F(1, 32))),
    Row("btt(modes='greedy')", 768, 768, 49_152, 49_152, (0.25, 0.144338), (24, 8), None, ((48, 16), (48, 16))),
    Row("btt", 768, 768, 43_008, 43_008, (0.204124, 0.176777), (16, 12), None, ((32, 24), (32, 24))),
    Row("btt(modes='greedy')", 768, 3072, 172_032, 172_032, (0.25, 0.144338), (24, 8), None, ((96, 32), (48, 16))),
    Row("btt(modes='greedy')", 3072, 768, 122_880, 122_880, (0.125, 0.072169), (48, 16), None, ((48, 16), (96, 32))),
    Row("kron", 1024, 1024, 2048, 65_536, (0.176777,) * 2, (16, 16), None, ((32, 32), (32, 32))),
    Row("kron", 1024, 4096, 4096, 196_608, (0.176777,) * 2, (16, 16), None, ((64, 64), (32, 32))),
    Row("kron", 4096, 1024, 4096, 196_608, (0.088388,) * 2, (32, 32), None, ((32, 32), (64, 64))),
    Row("tt(rank=16)", 1024, 1024, 32_768, 1_048_576, (0.176777, 0.011049), (16, 1), None, ((32, 32), (32, 32))),
    Row("low_rank(rank=32)", 1024, 1024, 65_536, 65_536, (0.005524, 0.176777), (F(1, 2), 16)),
    Row("low_rank(rank=32)", 1024, 4096, 163_840, 163_840, (0.005524, 0.176777), (F(1, 2), 16)),
    Row("low_rank(rank=103)", 1024, 1024, 210_944, 210_944, (0.009911, 0.098533), (F(1, 2), F(1024, 206))),
    Row("monarch(blocks=4)", 1024, 1024, 524_288, 524_288, (0.0625,) * 2, (2, 2)),
    Row("monarch(blocks=16)", 1024, 1024, 131_072, 131_072, (0.125,) * 2, (8, 8)),
    Row("monarch(blocks=4)", 1024, 4096, 1_310_720, 1_310_720, (0.0625,) * 2, (2, 2)),
    Row("monarch(blocks=4)", 4096, 1024, 1_310_720, 1_310_720, (0.015625, 0.0625), (2, 8)),
    Row(
        "btt(rank=2, num_cores=3)",
        *(4096, 4096, 524_288, 524_288),
        (0.25, 0.176777, 0.125),
        (F(256, 3), F(128, 3), F(128, 3)),
        None,
        ((16, 16, 16), (16, 16, 16)),
    ),
    Row(
        "tt(rank=2, num_cores=3)",
        *(4096, 4096, 2048, 524_288),
        (0.25, 0.176777, 0.125),
        (F(256, 3), F(128, 3), F(128, 3)),
        None,
        ((16, 16, 16), (16, 16, 16)),
    ),
]
IDS = [f"{row.spec} {row.in_features} to {row.out_features}" for row in TABLE]
# The paper chooses these ranks and modes knowing that they cap the rank.
capped = pytest.mark.filterwarnings("ignore::structops.errors.StructureWarning")


@capped
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_table_of_the_paper(row):
    chain = so.structure(row.spec).chain(row.in_features, row.out_features)
    assert (chain.num_params, chain.macs) == (row.params, row.macs)
    if row.modes:
        assert (chain.shape_of(chain.terms[-1]), chain.shape_of(chain.terms[0])) == row.modes
    adam = scales(chain)
    assert [scale.init_std for scale in adam] == pytest.approx(row.std, abs=5.01e-7)
    assert [scale.lr_scale for scale in adam] == pytest.approx([float(kappa) for kappa in row.adam], rel=1e-15)
    assert [scale.factor for scale in adam] == list(chain.factors)
    if row.sgd:
        sgd = scales(chain, optimizer="sgd")
        assert [scale.lr_scale for scale in sgd] == pytest.approx([float(kappa) for kappa in row.sgd], rel=1e-15)
        assert [scale.init_std for scale in sgd] == [scale.init_std for scale in adam]


def test_shapes_of_monarch_blocks():
    """(blocks, out, in): the width in between is the smaller one."""
    up, down = (so.structure("monarch(blocks=4)").plan(*sizes) for sizes in ((1024, 4096), (4096, 1024)))
    assert up.stored_shapes == ((4, 256, 256), (4, 1024, 256))
    assert down.stored_shapes == ((4, 256, 1024), (4, 256, 256))


@capped
@pytest.mark.parametrize(
    ("cores", "rank", "block_params", "params"),
    [
        (2, 1, 524_288, 8192),
        (2, 4, 2_097_152, 32_768),
        (3, 1, 196_608, 768),
        (3, 4, 1_572_864, 6144),
        (4, 1, 131_072, 256),
        (4, 2, 393_216, 768),
    ],
)
def test_counts_of_more_cores(cores, rank, block_params, params):
    """At d = 4096, and by the paper's formula at any d: (2 r + (c - 2) r^2) d^(1 + 1/c)."""
    btt, tt = (so.structure(name, rank=rank, num_cores=cores) for name in ("btt", "tt"))
    assert btt.chain(4096, 4096).num_params == btt.chain(4096, 4096).macs == block_params
    assert (tt.chain(4096, 4096).num_params, tt.chain(4096, 4096).macs) == (params, block_params)
    for mode in (3, 5, 6):
        d, count = mode**cores, 2 * rank + (cores - 2) * rank**2
        assert btt.chain(d, d).num_params == btt.chain(d, d).macs == tt.chain(d, d).macs == count * d * mode
        assert tt.chain(d, d).num_params == count * mode**2
        # Every parameter of a tensor-train is used d^(1 - 1/c) times, of a block tensor-train once.
        assert {factor.sharing for factor in tt.chain(d, d).factors} == {d // mode}
        assert {factor.sharing for factor in btt.chain(d, d).factors} == {1}


@pytest.mark.parametrize(
    ("spec", "width", "xi"),
    [
        ("btt", 1024, 64),
        ("btt(rank=4)", 1024, 256),
        ("btt", 4096, 128),
        ("dense", 1024, 1024),
        ("monarch(blocks=4)", 1024, 512),
        ("low_rank(rank=5)", 1024, 10),
        ("kron", 1024, 64),
        ("tt(rank=2)", 1024, 128),
    ],
)
def test_compute_per_dimension(spec, width, xi):
    assert so.structure(spec).chain(width, width).xi == xi


@capped
@given(st.integers(1, 5), st.tuples(*[st.integers(1, 6)] * 4))
def test_two_cores_by_formula(rank, sizes):
    """Table 1 with letters for sizes: parameters, MACs, init and learning rates of every two-core structure."""
    m0, m1, n0, n1 = sizes  # contracted first, contracted last; emitted first, emitted last
    d_in, d_out, modes = m0 * m1, n0 * n1, ((n1, n0), (m1, m0))
    btt, tt = (so.structure(name, rank=rank, modes=modes).chain(d_in, d_out) for name in ("btt", "tt"))
    kron = so.structure("kron", modes=modes).chain(d_in, d_out)
    assert btt.num_params == btt.macs == tt.macs == rank * m1 * n0 * (m0 + n1)
    assert tt.num_params == rank * (m0 * n0 + m1 * n1)
    assert (kron.num_params, kron.macs) == (m0 * n0 + m1 * n1, m1 * n0 * (m0 + n1))
    assert btt.intermediate_widths == tt.intermediate_widths == (rank * m1 * n0,)
    assert btt.rank_bound == min(d_in, d_out, rank * m1 * n0)
    for chain, r in ((btt, rank), (tt, rank), (kron, 1)):
        first, second = scales(chain)
        assert first.init_std == pytest.approx(math.sqrt(min(m0, r * n0)) / m0)
        assert second.init_std == pytest.approx(math.sqrt(min(r * m1, n1)) / (r * m1))
        assert (first.lr_scale, second.lr_scale) == pytest.approx((m1 / 2, m0 / (2 * r)))
        first, second = scales(chain, "sgd")
        assert first.lr_scale == pytest.approx((r * n0 / m0) / (d_out / d_in) / 2)
        assert second.lr_scale == pytest.approx((n1 / (r * m1)) / (d_out / d_in) / 2)


# ------------------------------------------------------------------------------------------- the two-factor family

THIRD = F(1, 3)


class Point(NamedTuple):
    """A point of arXiv 2410.02117 at d = 4096 with factor A first."""

    theta: tuple[float | F, ...]  # alpha, beta, gamma, delta, epsilon, phi, rho
    params: int
    macs: int
    exponents: tuple[float | F, ...]  # omega, psi, nu
    std: tuple[float, float]
    adam: tuple[float, float]


FAMILY = [
    Point((0.5, 0, 0.5, 0, 0.5, 0.5, 0), 524_288, 524_288, (0, 1, 0.5), (0.125, 0.125), (32, 32)),
    Point((1, 0, 0, 0, 1, 0, 0.5), 524_288, 524_288, (0, 0.5, 0.5), (0.001953, 0.125), (0.5, 32)),
    Point((0.5, 0.5, 0, 0.5, 0.5, 0, 0), 8192, 524_288, (0.5, 1, 0.5), (0.125, 0.125), (32, 32)),
    Point((0.5, 0.5, 0, 0.5, 0.5, 0, 0.25), 65_536, 4_194_304, (0.5, 1, 0.75), (0.125, 0.015625), (32, 4)),
    Point(
        (THIRD, 0, 2 * THIRD, 0, 2 * THIRD, THIRD, 0),
        *(1_114_112, 1_114_112),
        (0, 1, 2 * THIRD),
        (0.25, 0.0625),
        (128, 8),
    ),
    Point((0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), 65_536, 524_288, (0.25, 1, 0.5), (0.125, 0.125), (32, 32)),
]


@pytest.mark.parametrize("point", FAMILY, ids=lambda point: "|".join(f"{float(t):.3g}" for t in point.theta))
def test_family(point):
    chain = Einsum.from_theta([float(t) for t in point.theta], 4096, 4096, order="a")
    assert chain.shape == (4096, 4096)
    assert (chain.num_params, chain.macs) == (point.params, point.macs)
    exponents = [float(value) for value in point.exponents]
    assert [chain.omega, chain.psi, chain.nu] == pytest.approx(exponents, abs=1e-12)
    assert [scale.init_std for scale in scales(chain)] == pytest.approx(point.std, abs=1e-6)
    assert [scale.lr_scale for scale in scales(chain)] == pytest.approx(point.adam)


def test_the_cheaper_order_of_the_family():
    """A tensor-train with unequal modes: 3,145,728 MACs in one order, 98,304 in the other."""
    theta = (1 / 3, 2 / 3, 0, 3 / 4, 1 / 4, 0, 0)
    a_first, b_first, cheapest = (Einsum.from_theta(theta, 4096, 4096, order) for order in ("a", "b", "cheapest"))
    assert (a_first.macs, b_first.macs) == (3_145_728, 98_304)
    assert a_first.num_params == b_first.num_params
    assert cheapest == b_first != a_first


SIZES = st.integers(1, 6)


@given(st.fixed_dictionaries(dict.fromkeys("abgdefr", SIZES)))
def test_family_by_formula(size):
    a, b, g, d, e, f, r = (size[label] for label in "abgdefr")
    chain = Chain("gba, fdrga, ferbg -> fed", size)
    A, B = f * d * r * g * a, f * e * r * b * g
    assert (chain.num_params, chain.macs) == (A + B, A * b + B * d)
    other = Chain("gba, ferbg, fdrga -> fed", size)
    assert (other.num_params, other.macs) == (A + B, B * a + A * e)
    first, second = chain.factors
    assert (first.fan_in, first.fan_out, second.fan_in, second.fan_out) == (a, d * f * r, b * g * r, e)
    assert [scale.lr_scale for scale in scales(chain)] == pytest.approx([g * b / 2, a / r / 2])


def test_mixture_of_block_tensor_trains():
    """BTT-MoE with 8 experts, 2 of them active, and a gate: counts of section 8.4."""
    expert, gate = so.structure("btt").chain(1024, 1024), so.structure("dense").chain(1024, 8)
    assert 8 * expert.num_params + gate.num_params == 532_480
    assert 2 * expert.macs + gate.macs == 139_264


# ------------------------------------------------------------------------------------------------- learning rates


def test_examples_of_learning_rates():
    """Base learning rate 3e-3 at width 64, Adam."""

    def rates(spec, in_features, out_features, base_in, extra=1.0):
        chain = so.structure(spec).chain(in_features, out_features)
        return [3e-3 * extra * width_ratio(base_in, chain) * scale.lr_scale for scale in scales(chain)]

    assert rates("btt", 1024, 4096, 64) == pytest.approx([3e-3, 3e-3])
    assert rates("btt", 4096, 1024, 256) == pytest.approx([6e-3, 6e-3])
    assert rates("btt(modes='greedy')", 3072, 1024, 3072, extra=0.1) == pytest.approx([1.44e-2, 4.8e-3])
    assert rates("dense", 1024, 10, 64) == pytest.approx([3e-3 * 64 / 1024])


@pytest.mark.parametrize("root", [4, 8, 16, 32, 64])
def test_learning_rate_of_square_block_tensor_train(root):
    """eta0 d0 / (2 sqrt(d)) at every width."""
    chain = so.structure("btt").chain(root**2, root**2)
    for scale in scales(chain):
        assert 3e-3 * width_ratio(64, chain) * scale.lr_scale == pytest.approx(3e-3 * 64 / (2 * root))


@pytest.mark.parametrize("spec", ["btt(rank=2)", "btt(num_cores=3)", "low_rank(rank=7)", "monarch(blocks=6)", "blast"])
@pytest.mark.parametrize(("d_in", "d_out"), [(216, 216), (216, 512), (512, 64)])
@pytest.mark.filterwarnings("ignore::structops.errors.StructureWarning")
def test_unshared_fans_multiply_to_the_ratio_of_the_layer(spec, d_in, d_out):
    """Each factor maps blocks * fan_in to blocks * fan_out numbers, the next starts from there."""
    chain = so.structure(spec).chain(d_in, d_out)
    ratio = math.prod(F(f.fan_out, f.fan_in) for f in chain.factors)
    assert ratio == F(chain.padded_out, chain.padded_in)
    if chain.shape == (chain.padded_out, chain.padded_in):
        sgd = math.prod(scale.lr_scale for scale in scales(chain, "sgd"))
        k = len(chain.factors)
        assert sgd == pytest.approx(k**-k * (d_out / d_in) ** (1 - k))


def test_padded_chain_takes_its_true_width():
    chain = so.structure("monarch(blocks=4)").chain(10, 7)
    assert (chain.padded_in, chain.padded_out, chain.shape) == (12, 8, (7, 10))
    assert [f.fan_in for f in chain.factors] == [3, 2]
    assert [scale.lr_scale for scale in scales(chain)] == pytest.approx([10 / 3 / 2, 10 / 2 / 2])
    assert [scale.lr_scale for scale in scales(chain, "sgd")] == pytest.approx(
        [(2 / 3) / (7 / 10) / 2, (2 / 2) / (7 / 10) / 2]
    )


@pytest.mark.parametrize("name", ["adam", "AdamW", "nadam", "lion", "rmsprop"])
def test_relatives_of_adam(name):
    chain = so.structure("btt(rank=3)").chain(64, 144)
    assert [s.lr_scale for s in scales(chain, name)] == [s.lr_scale for s in scales(chain, "adam")]
    assert [s.lr_scale for s in scales(chain, "SGD")] == [s.lr_scale for s in scales(chain, "sgd")]


def test_unknown_optimizer():
    chain = so.structure("btt").chain(16, 16)
    for call in (lambda: scales(chain, "shampoo"), lambda: lr_multiplier(chain.factors[0], 16, 16, 2, "shampoo")):
        with pytest.raises(StructureError, match=r"'shampoo'.*adam.*sgd"):
            call()


# ------------------------------------------------------------------------------------------------------------- objects


@pytest.mark.torch
def test_chains_plans_operators_and_transposes():
    torch = pytest.importorskip("torch")
    spec = so.structure("btt(rank=2)")
    plan = spec.plan(36, 64)
    operator = so.random(spec, (64, 36), generator=torch.Generator().manual_seed(0))
    rows = [tuple(scales(each)) for each in (plan.chain, plan, operator)]
    assert rows[0] == rows[1] == rows[2]
    # Transposed, every factor keeps its blocks, and fan-in and fan-out trade places.
    for flipped in (scales(plan.chain.T), scales(operator.T)):
        assert [s.factor for s in flipped] == [s.factor.T for s in reversed(rows[0])]
        assert [s.lr_scale for s in flipped] == pytest.approx([64 / s.factor.fan_out / 2 for s in reversed(rows[0])])
    assert tuple(scales(operator.T.T)) == rows[0]


@pytest.mark.torch
def test_expressions():
    """k counts the learnable factors of the whole expression; constants have none."""
    torch = pytest.importorskip("torch")
    A, B = so.Kron(torch.ones(2, 3), torch.ones(4, 5)), so.Dense(torch.ones(15, 8))
    product = A @ B
    assert product.shape == (8, 8)
    got = scales(product)
    assert [(s.factor.fan_in, s.factor.fan_out) for s in got] == [(8, 15), (5, 4), (3, 2)]
    assert [s.lr_scale for s in got] == pytest.approx([8 / 8 / 3, 8 / 5 / 3, 8 / 3 / 3])
    assert [s.lr_scale for s in scales(2 * product)] == [s.lr_scale for s in got]
    shuffled = product @ so.Permutation(torch.arange(8))
    assert [s.lr_scale for s in scales(shuffled)] == [s.lr_scale for s in got]
    total = A + so.LowRank(torch.ones(8, 2), torch.ones(2, 15))
    assert [s.lr_scale for s in scales(total)] == pytest.approx([15 / 5 / 4, 15 / 3 / 4, 15 / 15 / 4, 15 / 2 / 4])


def test_the_table_prints():
    table = scales(so.structure("btt(rank=4)").chain(1024, 4096))
    lines = str(table).splitlines()
    assert len(lines) == 3
    assert [word in lines[0] for word in ("factor", "blocks", "fan_in", "fan_out", "init_std", "adam", "reason")]
    assert "0.176777" in lines[1]
    assert "0.0625" in lines[2]
    assert "(1/32)/(1/1024)/2" in lines[1]
    assert "sgd" in str(scales(so.structure("btt").chain(16, 16), "sgd")).splitlines()[0]
    # It is also a sequence.
    assert len(table) == 2
    assert table[0] is next(iter(table))
    assert table[-1].lr_scale == 4
    assert "sqrt(min(32, 256))/32" in table[0].reason


def test_rule_of_one_factor():
    wide, tall = Factor("w", (2, 8), fan_in=8, fan_out=2), Factor("t", (8, 2), fan_in=2, fan_out=8)
    assert init_std(wide) == math.sqrt(2) / 8
    assert init_std(tall) == math.sqrt(2) / 2
    assert lr_multiplier(wide, 16, 4, 1) == 2
    assert lr_multiplier(wide, 16, 4, 2, "sgd") == (2 / 8) / (4 / 16) / 2


def test_zero_initialised_last_factor():
    """Only then does low rank take the paper's exception, std 1 / sqrt(d_in) for the first factor."""
    low_rank, btt = (so.structure(spec).chain(1024, 1024) for spec in ("low_rank(rank=32)", "btt"))
    assert init_stds(low_rank) == pytest.approx((0.005524, 0.176777), abs=5e-7)
    assert init_stds(low_rank, zero_last=True) == (0.03125, 0)
    assert init_stds(btt) == pytest.approx((0.176777, 0.176777), abs=5e-7)
    assert init_stds(btt, zero_last=True) == (init_stds(btt)[0], 0)
    assert init_stds(so.structure("dense").chain(64, 64), zero_last=True) == (0,)


# --------------------------------------------------------------------------------------------------------- at random


@pytest.mark.torch
@pytest.mark.parametrize("spec", ["dense", "btt", "btt(rank=4)", "kron", "tt(rank=2)", "low_rank", "monarch(blocks=4)"])
@pytest.mark.parametrize(("d_in", "d_out"), [(256, 256), (1024, 1024), (256, 1024), (1024, 256)])
def test_spectral_norms_at_init(spec, d_in, d_out):
    """Every block has the norm sqrt(fan_out / fan_in), up to a constant that does not drift with the width."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    plan = so.structure(spec).plan(d_in, d_out)
    factors = draw(plan, generator=generator, dtype=torch.float64)
    for stored, factor in zip(factors, plan.factors, strict=True):
        assert stored.std().item() == pytest.approx(init_std(factor), rel=0.15)
        norms = np.linalg.norm(stored.numpy(), ord=2, axis=(1, 2)) / math.sqrt(factor.fan_out / factor.fan_in)
        if min(factor.fan_in, factor.fan_out) >= 16:
            assert 0.9 < norms.min() <= norms.max() < 2.4
            sides = sorted((factor.fan_in, factor.fan_out))
            assert norms.mean() == pytest.approx(1 + math.sqrt(sides[0] / sides[1]), rel=0.15)
    # Entries keep their size, whatever the width, but for the part of a random x that a narrow factor drops.
    x = torch.randn(32, d_in, dtype=torch.float64, generator=generator)
    kept = math.prod(min(1, factor.fan_out / factor.fan_in) for factor in plan.factors)
    assert plan.apply(factors, x).pow(2).mean().item() == pytest.approx(kept, rel=0.25)
