"""Which layers are selected, and what the table of a conversion says; no arrays."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import structops as so
from structops.conversion import Layer, choose, row_of
from structops.conversion.report import Conversion, Kept
from structops.conversion.selection import named
from structops.merging import CPU, GPU, speed_up

NAMES = ("h.0.attn.qkv", "h.0.mlp.up", "h.0.mlp.down", "h.1.attn.qkv", "h.1.mlp.up", "h.1.mlp.down")
LAYERS = [Layer(name, "Linear", 16, 64 if name.endswith("up") else 32, module=name) for name in NAMES]
HEAD = Layer("lm_head", "Linear", 16, 100, reserved="output head")
TIED = Layer("embed_out", "Linear", 16, 100, obstacle="its weight is tied to wte.weight")


def chosen(*arguments, layers=(*LAYERS, HEAD, TIED)):
    """The structures of the layers that get one."""
    return {c.layer.name: str(c.structure) for c in choose(layers, *arguments) if c.structure}


def test_everything_but_what_is_reserved_or_cannot_be():
    assert chosen("btt") == dict.fromkeys(NAMES, "btt")
    reasons = {c.layer.name: c.reason for c in choose([*LAYERS, HEAD, TIED], "btt")}
    assert reasons["lm_head"] == "output head"
    assert reasons["embed_out"] == "its weight is tied to wte.weight"
    assert reasons["h.0.mlp.up"] == ""


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("*.mlp.*", [n for n in NAMES if "mlp" in n]),
        (re.compile(r"\.1\..*(up|qkv)$"), ["h.1.attn.qkv", "h.1.mlp.up"]),
        (["*.qkv", re.compile("h.0.mlp.up")], ["h.0.attn.qkv", "h.0.mlp.up", "h.1.attn.qkv"]),
        (lambda name, layer: name.endswith("down") and layer == name, ["h.0.mlp.down", "h.1.mlp.down"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_what_is_selected(select, expected):
    assert list(chosen("kron", select)) == expected


def test_a_later_rule_wins():
    rules = {"*.mlp.*": "btt(rank=2)", "*.attn.*": True, "h.1.*": False, "h.1.mlp.down": "low_rank(rank=2)"}
    assert chosen("kron", rules) == {
        "h.0.attn.qkv": "kron",
        "h.0.mlp.up": "btt(rank=2)",
        "h.0.mlp.down": "btt(rank=2)",
        "h.1.mlp.down": "low_rank(rank=2)",
    }


def test_rules_may_stand_for_the_structure():
    assert chosen({"*.up": "kron", re.compile("down"): {"name": "low_rank", "rank": 3}}) == {
        "h.0.mlp.up": "kron",
        "h.0.mlp.down": "low_rank(rank=3)",
        "h.1.mlp.up": "kron",
        "h.1.mlp.down": "low_rank(rank=3)",
    }
    # The JSON data of one structure is no rules.
    assert set(chosen({"name": "low_rank", "rank": 3}).values()) == {"low_rank(rank=3)"}


def test_a_function_may_name_the_structure():
    assert chosen("btt", lambda name, _: {"up": "kron", "down": True}.get(name.rpartition(".")[2])) == {
        "h.0.mlp.up": "kron",
        "h.0.mlp.down": "btt",
        "h.1.mlp.up": "kron",
        "h.1.mlp.down": "btt",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "expected a structure"),
        (("btt", "*.nothing"), r"'\*.nothing' fits no linear layer; there are h.0.attn.qkv, .*embed_out"),
        (("btt", [3]), "a glob, a compiled regular expression or a function, got 3"),
        (("bttt",), "did you mean 'btt'"),
        ((None, {"*": True}), "no structure is given"),
        (({"*": "btt"}, "*.mlp.*"), "not both"),
        (("btt", "embed_out"), "embed_out was selected, but its weight is tied to wte.weight; leave it out"),
        (("btt(blocks=5)", "*.up"), r"h.0.mlp.up \(64x16\): btt\(blocks=5\): 5 blocks do not divide"),
    ],
)
def test_what_cannot_be_selected(arguments, message):
    with pytest.raises(so.StructureError, match=message):
        choose([*LAYERS, HEAD, TIED], *arguments)


def test_names_by_patterns():
    layers = dict.fromkeys(NAMES, 1)
    assert named("select", None, layers) == list(NAMES)
    assert named("select", "*.up", layers) == ["h.0.mlp.up", "h.1.mlp.up"]
    assert named("select", lambda name, one: one and name.startswith("h.1"), layers) == list(NAMES[3:])
    with pytest.raises(so.StructureError, match="zero: 'x' fits no linear layer"):
        named("zero", "x", layers)


def test_the_table_counts():
    rows = [row_of(choice, 256, CPU) for choice in choose([*LAYERS, HEAD], "low_rank(rank=4)")]
    table = Conversion(tuple(rows), (Kept("wte.weight", (100, 16), "table of an embedding"),), 10_000, 256, "cpu")
    dense = sum(layer.in_features * layer.out_features for layer in (*LAYERS, HEAD))
    small = sum(4 * (layer.in_features + layer.out_features) for layer in LAYERS) + 1600
    assert sum(row.dense for row in table) == dense
    assert sum(row.params for row in table) == sum(row.macs for row in table) == small
    assert table.saved == dense - small
    assert len(table) == 7
    assert len(table.converted) == 6
    assert table["h.0.mlp.up"].params == 4 * (16 + 64)
    assert table["h.0.mlp.up"].speed_up == speed_up(so.structure("low_rank(rank=4)").chain(16, 64), CPU, 256)
    text = str(table)
    assert f"the model has {10_000 - table.saved:,} parameters" in text
    assert "6 of 7 linear layers structured" in text
    assert re.search(r"lm_head .*dense: output head", text)
    assert re.search(r"wte.weight +100x16 +table of an embedding", text)
    assert json.loads(table.to_json())["rows"][1]["structure"] == "low_rank(rank=4)"
    with pytest.raises(KeyError, match="no linear layer"):
        table["h.9"]


def test_what_has_no_chain_has_no_prediction():
    [choice] = choose(LAYERS[:1], "toeplitz")
    assert row_of(choice, 256, CPU).speed_up is None


def test_predictions_beside_measurements():
    """What the docstring of `speed_up` and docs/convert.md say about it."""
    data = json.loads((Path(__file__).parents[1] / "docs/assets/speed/bench.json").read_text())
    ratios = []
    for case in data["results"]:
        if case["pass"] == "forward" and "dense" in case["contestants"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", so.StructureWarning)  # ranks that are capped are measured, too
                chain = so.structure(case["structure"]).chain(case["in_features"], case["out_features"])
            ratios.append(speed_up(chain, CPU, case["tokens"]) / case["contestants"]["dense"]["ratio"])
    assert len(ratios) == 48
    assert np.round(np.quantile(ratios, [0.1, 0.5, 0.9]), 2).tolist() == [0.56, 0.98, 1.33]


def test_predictions_grow_with_the_width():
    for machine in (CPU, GPU):
        few = [
            speed_up(so.structure("btt(blocks=8, params=0.25)").chain(d, d), machine, 2048) for d in (512, 1024, 4096)
        ]
        assert few == sorted(few)
    assert speed_up(so.structure("dense").chain(64, 32), CPU, 100) == 1
