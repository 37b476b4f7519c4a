"""The plan of a model as numbers: families, references, invariants, and the multipliers of microsoft/mup as oracle."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import structops as so
from structops.chain import Factor
from structops.mup import FAMILIES, FAMILY, MupPlan, Rule, Weight, family, init_std, lr_multiplier, make_plan, scales
from structops.mup.families import NO_RULE
from structops.mup.rules import dense_factor

SPECS = ("dense", "low_rank", "kron", "tt(rank=2)", "btt(rank=2)", "monarch(blocks=4)", "btt(num_cores=3)")


def layer(name: str, n: int, m: int, spec: str = "dense", role: str = "hidden", **options: object) -> list[Weight]:
    """The weights of one layer."""
    factors = so.structure(spec).plan(n, m).factors
    return [
        Weight(f"{name}.{k}", name, role, factor, n, m, k, len(factors), "" if spec == "dense" else spec, **options)  # type: ignore[arg-type]
        for k, factor in enumerate(factors)
    ]


def vector(name: str, size: int) -> Weight:
    return Weight(name, name.rpartition(".")[0], "vector", Factor("vector", (size,), 1, size), 1, size)


def network(width: int, spec: str = "dense") -> list[Weight]:
    """Embedding, two layers of a feed-forward block with biases, a norm, and the readout of 10 classes."""
    return [
        Weight("emb.0", "emb", "embedding", Factor("table", (100, width), 1, width), 1, width),
        *layer("up", width, 4 * width, spec),
        vector("up.bias", 4 * width),
        *layer("down", 4 * width, width, spec),
        vector("norm.gain", width),
        *layer("head", width, 10, role="readout"),
    ]


# ----------------------------------------------------------------------------------------------------------- the oracle

# microsoft/mup 1.0 at width 256 with base 64, MuReadout's factor 1/m in the forward pass folded into the readout's
# rate (Adam: once, SGD: twice).
ORACLE = {
    "adam": {"emb.0": 1, "up.0": 1 / 4, "up.bias": 1, "down.0": 1 / 4, "norm.gain": 1, "head.0": 1 / 4},
    "sgd": {"emb.0": 4, "up.0": 1, "up.bias": 4, "down.0": 1, "norm.gain": 4, "head.0": 1 / 4},
}
# MuAdamW multiplies the decay of matrices by m, so that lr * wd does not change.
DECAY = {"up.0": 4, "down.0": 4, "head.0": 4, "up.bias": 0, "norm.gain": 0}


@pytest.mark.parametrize("optimizer", ORACLE)
def test_dense_models_take_the_multipliers_of_mup(optimizer: str) -> None:
    plan = make_plan(network(256), optimizer, network(64))
    assert {row.name: row.lr_scale for row in plan} == pytest.approx(ORACLE[optimizer])
    if optimizer == "adam":
        assert {name: plan[name].wd_scale for name in DECAY} == pytest.approx(DECAY)


@pytest.mark.parametrize("optimizer", sorted(FAMILIES))
@pytest.mark.parametrize("spec", SPECS)
def test_the_plan_at_base_is_all_ones(spec: str, optimizer: str) -> None:
    plan = make_plan(network(64, spec), Rule(optimizer, block_count=True, share_exponent=0.5), network(64, spec))
    assert {row.lr_scale for row in plan} == {1.0}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_relative_to_dense_it_is_the_rule_of_the_paper(spec: str, optimizer: str) -> None:
    plan = make_plan(layer("up", 1024, 4096, spec), optimizer)
    wanted = scales(so.structure(spec).plan(1024, 4096), optimizer)
    assert [row.lr_scale for row in plan] == [scale.lr_scale for scale in wanted]
    assert [row.init_std for row in plan] == [scale.init_std for scale in wanted]


def test_a_dense_base_is_the_reference_of_every_factor() -> None:
    """Width ratio times the multiplier against dense: the recipe of the paper, 3e-3 * (64/1024) * 16."""
    plan = make_plan(network(1024, "btt"), "adam", network(64))
    assert [plan[f"up.{k}"].lr_scale for k in (0, 1)] == [1.0, 1.0]
    assert [plan[f"down.{k}"].lr_scale for k in (0, 1)] == [2.0, 2.0]
    assert make_plan(layer("up", 1024, 4096, "btt"), "adam", 64)["up.0"].lr_scale == 1.0


@given(st.sampled_from(SPECS), st.sampled_from([(64, 64), (64, 256), (256, 64)]))
def test_fans_multiply_to_those_of_the_layer(spec: str, sizes: tuple[int, int]) -> None:
    """The product of fan_out / fan_in over a chain is d_out / d_in, since blocks times sharing is the state's width."""
    n, m = sizes
    factors = so.structure(spec).plan(n, m).factors
    product = math.prod([Fraction(f.fan_out, f.fan_in) for f in factors], start=Fraction(1))
    state = [f.blocks * f.sharing * f.fan_in for f in factors] + [m]
    ratios = [Fraction(f.blocks * f.sharing * f.fan_out, width) for f, width in zip(factors, state[1:], strict=True)]
    assert product * Fraction(n, m) == 1
    assert all(ratio == 1 for ratio in ratios)


@pytest.mark.parametrize("optimizer", sorted(FAMILIES))
def test_one_factor_is_the_dense_rule(optimizer: str) -> None:
    rule = Rule(optimizer)
    for n, m in ((64, 64), (64, 256), (256, 64)):
        assert lr_multiplier(dense_factor(n, m), n, m, 1, rule) == 1
        assert [row.lr_scale for row in make_plan(layer("up", n, m), rule)] == [1]
        (absolute,) = make_plan(layer("up", n, m), rule, "absolute")
        assert absolute.lr_scale == float(rule.scale(dense_factor(n, m)))


def test_absolute_scales_are_those_of_the_derivation() -> None:
    """Fan-in i, fan-out o, b blocks, k factors; numbers worked out by hand for b = 4, i = 16, o = 64 and k = 2."""
    factor = Factor("f", (4, 64, 16), fan_in=16, fan_out=64, blocks=4, sharing=9)
    weight = Weight("w", "w", "hidden", factor, 64, 256, 0, 2, "some")

    def absolute(rule: Rule) -> float:
        return make_plan([weight], rule, "absolute")["w"].lr_scale

    assert absolute(Rule("adam")) == 1 / 32
    assert absolute(Rule("adam", share_exponent=0.5)) == 3 / 32
    assert absolute(Rule("sgd")) == 2
    assert absolute(Rule("sgd", block_count=True)) == 8
    assert absolute(Rule("sgd", share_exponent=0.5)) == 6
    assert absolute(Rule("muon")) == 0.5
    assert absolute(Rule("muon_spectral")) == 0.5
    assert absolute(Rule("muon_unscaled")) == 1
    assert absolute(Rule("muon_match_rms")) == pytest.approx(2 / (0.2 * 8) / 2)
    assert absolute(Rule("adafactor")) == 1 / 8


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_every_known_optimizer_has_a_family(name: str) -> None:
    assert family(name.upper()) is FAMILIES[FAMILY[name]]


@pytest.mark.parametrize("name", [*NO_RULE, "magic"])
def test_no_rule_is_an_error_with_a_reason(name: str) -> None:
    with pytest.raises(
        so.StructureError, match=rf"no rule for optimizer '{name}'.+{NO_RULE.get(name, 'adam.*sgd')[:20]}"
    ):
        Rule(name)


def test_choices_are_checked() -> None:
    for options, message in (({"init": "xavier"}, "init.*orthogonal"), ({"decay": "none"}, "decay.*independent")):
        with pytest.raises(so.StructureError, match=message):
            Rule(**options)  # type: ignore[arg-type]
    with pytest.raises(so.StructureError, match="'absolut'"):
        make_plan(network(64), "adam", "absolut")
    with pytest.raises(so.StructureError, match="no layer 'up'"):
        make_plan(network(64), "adam", layer("other", 64, 64))


# --------------------------------------------------------------------------------------------------------- other scales


def test_weight_decay_follows_the_policy() -> None:
    """Per step, factors of a layer decay together as fast as the dense weight; or as fast as their rates."""
    weights = layer("up", 1024, 1024, "btt")
    for decay, wanted in (("independent", 1 / 32), ("sqrt", 1 / 8), ("coupled", 1.0)):
        assert make_plan(weights, Rule("adam", decay=decay))["up.0"].wd_scale == wanted
    independent = make_plan(weights, "adam")
    assert sum(row.lr_scale * row.wd_scale for row in independent) == 1


def test_eps_follows_the_gradient() -> None:
    weights = layer("up", 1024, 4096, "btt")
    plan = make_plan(weights, Rule("adam", scale_eps=True))
    assert [row.eps_scale for row in plan] == [4096 / (w.factor.blocks * w.factor.fan_out) for w in weights]
    assert {row.eps_scale for row in make_plan(weights, "adam")} == {1.0}


def test_initial_values() -> None:
    weights = [*network(64, "btt"), *layer("last", 64, 64, "btt", zero=True)]
    plan = make_plan(weights, "adam")
    assert [row.init for row in plan if row.weight.role == "vector"] == ["constant"] * 2
    assert plan["emb.0"].init_std == 1
    assert plan["up.0"].init_std == init_std(weights[1].factor)
    assert {plan[f"last.{k}"].init_std for k in (0, 1)} == {0.0}
    assert make_plan(weights, Rule(init="kaiming"))["up.0"].init_std == 1 / math.sqrt(weights[1].factor.fan_in)
    assert make_plan(weights, Rule(init="orthogonal"))["up.0"].init == "orthogonal"


def test_beside_an_optimizer_of_matrices_the_rest_takes_adam() -> None:
    plan = make_plan(network(256, "btt"), "muon", network(64, "btt"))
    assert {row.optimizer for row in plan if row.weight.role == "hidden"} == {"muon"}
    assert {row.optimizer for row in plan if row.weight.role != "hidden"} == {"adam"}
    assert plan["head.0"].lr_scale == 1 / 4


def test_the_naive_rule_gives_factors_the_rate_of_the_dense_layer() -> None:
    plan = make_plan(network(256, "btt"), Rule("adam", structure_aware=False), network(64))
    assert {plan[f"up.{k}"].lr_scale for k in (0, 1)} == {1 / 4}


# ----------------------------------------------------------------------------------------------------------- plain data


def test_a_plan_is_plain_data() -> None:
    plan = make_plan(network(256, "kron"), "adam", network(64))
    again = MupPlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.diff(plan) == ()
    assert json.loads(plan.to_json())["rule"]["optimizer"] == "adam"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.reference = "other"  # type: ignore[misc]
    for text in ("", "{}", "[1]", '{"rows": 3}'):
        with pytest.raises(so.StructureError, match="JSON of a plan"):
            MupPlan.from_json(text)
    other = make_plan(network(256, "kron"), Rule("adam", share_exponent=0.5), network(64))
    assert other.fingerprint != plan.fingerprint
    assert any("up.0: lr_scale" in line for line in plan.diff(other))
    assert make_plan(network(256)[:1], "adam").diff(plan)


def test_every_number_is_explained() -> None:
    plan = make_plan(network(1024, "btt"), "adam")
    table = str(plan)
    assert table.splitlines()[0] == "learning rates relative to the dense layers replaced"
    assert all(row.name in table for row in plan)
    text = plan.explain("up.0")
    for part in ("factor 1 of 2", "32 block(s) of 64x32", "x 16", "independent", "by the rule for adam"):
        assert part in text, part
    with pytest.raises(KeyError, match="nothing"):
        plan.explain("nothing")
    assert plan["up.0"] is plan[1]
    assert len(plan) == len(network(1024, "btt"))


@pytest.mark.parametrize(
    ("code", "weights", "rule"),
    [
        ("M001", [dataclasses.replace(layer("a", 8, 8)[0], known=False)], Rule()),
        ("M002", [dataclasses.replace(layer("a", 8, 8)[0], tied=True)], Rule()),
        ("M007", layer("a", 64, 64, "kron"), Rule()),
        ("M009", layer("a", 64, 64, zero=True), Rule("adafactor")),
        ("M010", layer("a", 256, 256, "btt(num_cores=4)"), Rule()),
        ("M012", layer("a", 1024, 1024, "btt"), Rule(decay="coupled")),
    ],
)
def test_what_will_not_transfer_is_said(code: str, weights: list[Weight], rule: Rule) -> None:
    plan = make_plan(weights, rule)
    assert {warning.partition(" ")[0] for warning in plan.warnings} == {code}
    assert code in plan.table()
    mended = {
        "M007": Rule(share_exponent=0.5),
        "M009": Rule("adam"),
        "M010": Rule(init="orthogonal"),
        "M012": Rule(decay="independent"),
    }
    if code in mended:
        assert make_plan(weights, mended[code]).warnings == ()


@pytest.mark.parametrize("optimizer", sorted(FAMILIES))
def test_a_base_width_may_fit_no_whole_number_of_outputs(optimizer: str) -> None:
    """784 to 100 features at base 64: the outputs of the base layer would be 8.16; the ratio of rates is a power."""
    power = {"adam": 1, "adafactor": 0.5, "muon_match_rms": 0.5}.get(optimizer, 0)
    (row,) = make_plan(layer("up", 784, 100), optimizer, 64)
    assert row.lr_scale == pytest.approx((64 / 784) ** power)
    (readout,) = make_plan(layer("head", 784, 10, role="readout"), Rule(optimizer), 64)
    rule = Rule(readout.optimizer)
    assert readout.lr_scale == pytest.approx(
        float(rule.scale(dense_factor(784, 10))) / float(rule.scale(dense_factor(64, 10)))
    )
