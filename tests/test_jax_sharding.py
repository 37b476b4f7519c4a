"""Where parameters lie on a mesh of devices, what XLA sends between them, and that training is the same everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AbstractMesh, AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import structops as so  # noqa: E402
from structops.jax import StructuredLinear, shard, shardings  # noqa: E402

pytestmark = pytest.mark.jax

PROGRAMS = Path(__file__).parent / "jax_devices"
CUT = ("dense", "low_rank(rank=4)", "btt(blocks=4, rank=2)", "blast(rank=3, blocks=4)", "block_diag(blocks=4)", "kron")
MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def seen():
    """What a process with eight devices saw."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAMS / "sharded.py"), json.dumps(CUT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_training_is_that_of_one_device(seen):
    curves = seen["curves"]
    assert set(curves) == {"one device", "sharded data", "sharded parameters", "cut layers", "both"}
    expected = curves["one device"]["losses"]
    assert len(set(expected)) == 4
    for curve in curves.values():
        np.testing.assert_allclose(curve["losses"], expected, rtol=1e-12)


def test_parameters_and_the_state_of_the_optimiser_are_sharded(seen):
    placed = {name: curve["placed"] for name, curve in seen["curves"].items()}
    assert all(spec == [] for spec, _ in placed["sharded data"].values())
    assert placed["sharded parameters"]["up.factors.1"] == [["data", None, None], [2, 16, 8]]
    assert placed["sharded parameters"]["head.kernel"] == [["data", None], [16, 8]]
    cut = placed["cut layers"]
    assert cut["up.factors.0"] == [[], [4, 8, 8]]
    assert cut["up.factors.1"] == [[None, "model", None], [4, 4, 8]]
    assert cut["up.bias"] == [["model"], [16]]
    assert cut["down.factors.0"] == [["model", None, None], [1, 8, 16]]
    assert cut["down.factors.1"] == [[None, None, "model"], [4, 8, 2]]
    assert cut["down.bias"] == [[], [32]]
    assert placed["both"]["down.factors.1"] == [["data", None, "model"], [2, 8, 2]]
    for curve in seen["curves"].values():
        factors = sorted(local for name, (_, local) in curve["placed"].items() if "factors" in name)
        assert curve["trained"] == factors  # XLA left them where they were
        assert curve["moments"] == sorted([*factors, *factors])  # of Adam, two for every parameter


@pytest.mark.parametrize("spec", CUT)
def test_what_xla_sends(seen, spec):
    sent = seen["collectives"][spec]
    assert sent["up"] == []
    expected = {
        "block_diag(blocks=4)": ["all-gather"],  # y itself is cut, and was asked for whole
        "kron": ["all-gather", "all-reduce"],  # x first: see the docstring
    }
    assert sent["block"] == expected.get(spec, ["all-reduce"])
    if spec == "kron":
        assert seen["alone"] == sent


def test_equinox_layers_that_are_stacked(seen):
    assert seen["equinox"] == {
        "specs": ["(None, 'model', 'data', None)", "(None, 'data', None, 'model')"],
        "near": True,
    }


# ------------------------------------------------------------------------------------------------- without any devices


def spec_of(tree):
    return [leaf.spec for leaf in jax.tree.leaves(tree)]


def test_axes_for_sharded_parameters():
    shapes = {
        "btt(blocks=4, rank=4)": [P("data", None, None)] * 2,
        "low_rank(rank=4)": [P(None, "data", None)] * 2,
        "low_rank(rank=3)": [P(None, None, "data"), P(None, "data", None)],
        "kron": [P(None, "data", None)] * 2,
    }
    for spec, expected in shapes.items():
        layer = nnx.eval_shape(lambda spec=spec: StructuredLinear(64, 64, spec, bias=False, rngs=nnx.Rngs(0)))
        assert spec_of(shardings(layer, MESH, fsdp="data")) == expected, spec
    odd = nnx.eval_shape(lambda: StructuredLinear(15, 9, "dense", rngs=nnx.Rngs(0)))
    assert spec_of(shardings(odd, MESH, fsdp="data")) == [P()] * 2


def test_plain_trees_tables_and_rules():
    plan = so.structure("btt").plan(64, 64)
    params = {
        "up": {"factors": [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in plan.stored_shapes]},
        "head": {"kernel": jax.ShapeDtypeStruct((64, 10), jnp.float32)},
    }
    specs = {"up.factors": plan, "head.kernel": (64, 10)}
    found = shardings(params, MESH, fsdp="data", tensor="model", rowwise=["up", "head"], specs=specs)
    assert found["up"]["factors"][0].spec == P("model", "data", None)
    assert found["head"]["kernel"].spec == P("model", "data")
    rules = {"*": P(), "head.*": P(None, "data")}
    found = shardings(params, MESH, fsdp="data", rules=rules, specs=specs)
    assert found["up"]["factors"][1].spec == P()
    assert found["head"]["kernel"].spec == P(None, "data")
    table = nnx.eval_shape(lambda: nnx.Dict(embed=nnx.Embed(32, 64, rngs=nnx.Rngs(0))))
    assert spec_of(shardings(table, MESH, tensor="model", colwise="embed")) == [P(None, "model")]
    assert spec_of(shardings(table, MESH, tensor="model", rowwise="embed")) == [P("model", None)]


def test_errors():
    def layer(spec, n=64, m=64):
        return nnx.eval_shape(lambda: StructuredLinear(n, m, spec, rngs=nnx.Rngs(0)))

    with pytest.raises(so.StructureError, match=r"fsdp: the mesh has the axes data, model, not 'batch'"):
        shardings(layer("btt"), MESH, fsdp="batch")
    with pytest.raises(so.StructureError, match="need tensor="):
        shardings(layer("btt"), MESH, colwise="*")
    with pytest.raises(so.StructureError, match=r"colwise: 'up' fits no layer of the model; it has the model itself"):
        shardings(layer("btt"), MESH, tensor="model", colwise="up")
    with pytest.raises(so.StructureError, match="in colwise and in rowwise"):
        shardings(layer("btt"), MESH, tensor="model", colwise="*", rowwise="*")
    with pytest.raises(so.StructureError, match=r"the model: .*not the most significant one of 'cd'"):
        shardings(layer("btt(num_cores=3)"), MESH, tensor="model", rowwise="*")
    with pytest.raises(so.StructureError, match=r"size 3, which 4 processes do not divide"):
        shardings(layer("btt(blocks=3, rank=7)", 63, 63), MESH, tensor="model", rowwise="*")
    with pytest.raises(so.StructureError, match="no chain of factors"):
        shardings(layer("toeplitz"), MESH, tensor="model", rowwise="*")
    with pytest.raises(so.StructureError, match="4 devices do not divide its output axis of size 10"):
        shardings({"head": jnp.ones((64, 10))}, MESH, tensor="model", colwise="head", specs={"head": (64, 10)})
    with pytest.raises(so.StructureError, match="rules: 'x' fits no parameter"):
        shardings(layer("btt"), MESH, rules={"x": P()})
    explicit = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(so.StructureError, match=r"axis_types=\(jax.sharding.AxisType.Auto,\) \* 1"):
        shard(layer("btt"), explicit, fsdp="data")
