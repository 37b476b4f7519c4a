"""Folders with safetensors and JSON, and Orbax checkpoints of sharded models that training resumes from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import structops as so  # noqa: E402
from structops.conversion import CheckpointConfig  # noqa: E402
from structops.jax import load, save_pretrained, structurize  # noqa: E402

pytestmark = pytest.mark.jax

PROGRAM = Path(__file__).parent / "jax_devices" / "train.py"


class Net(nnx.Module):
    """A table, attention, a layer that is used twice, dropout and statistics."""

    def __init__(self, seed=0, rate=0.0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(8, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, rngs=rngs, decode=False)
        self.layers = nnx.List([nnx.Linear(16, 16, param_dtype=jnp.bfloat16, rngs=rngs)])
        self.twice = self.layers[0]
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)
        if rate:
            self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(self.twice(self.layers[0](x + self.attention(x)))))


def same(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))


@pytest.fixture(scope="module")
def small():
    model = structurize(
        Net(),
        {"layers.0": "btt(rank=2)", "attention.*": "low_rank(rank=4)"},
        init="mup",
        weight_norm=True,
        key=jax.random.key(1),
    )
    model.norm.mean[...] = jnp.arange(16.0, dtype=jnp.float32)
    return model


@pytest.mark.parametrize("make", ["function", "dense", "structured"])
def test_nnx_there_and_back(small, tmp_path, make):
    save_pretrained(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "structops.json"]
    given = {"function": Net, "dense": Net(1), "structured": small}[make]
    before = None if make == "function" else jax.tree.leaves(nnx.state(given))
    again = load(tmp_path, given)
    assert again.twice is again.layers[0]
    assert again.twice.weight_norm is True
    assert str(again.attention.out.structure) == "low_rank(rank=4)"
    for one, other in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(small)), strict=True):
        same(one, other)
    tokens = jnp.zeros((1, 3), int)
    np.testing.assert_array_equal(again(tokens), small(tokens))
    if before is not None:
        assert all(one is other for one, other in zip(before, jax.tree.leaves(nnx.state(given)), strict=True))


def test_equinox_dtypes_and_random_streams(tmp_path):
    def dense():
        return eqx.nn.MLP(16, 4, 32, 1, key=jax.random.key(0))

    model = structurize(dense(), "btt")
    save_pretrained(model, tmp_path / "mlp")
    assert eqx.tree_equal(load(tmp_path / "mlp", dense), model)
    half = load(tmp_path / "mlp", dense(), dtype=jnp.bfloat16)
    assert half.layers[0].factors[0].dtype == jnp.bfloat16
    stack = structurize(
        eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 8, key=k))(jax.random.split(jax.random.key(0), 3)), "btt"
    )
    save_pretrained(stack, tmp_path / "stack")
    assert eqx.tree_equal(load(tmp_path / "stack", stack), stack)
    net = Net(2, rate=0.5)
    save_pretrained(net, tmp_path / "net")
    again = load(tmp_path / "net", lambda: Net(3, rate=0.5))
    assert (
        jax.random.key_data(again.drop.rngs.key[...]) == jax.random.key_data(Net(3, rate=0.5).drop.rngs.key[...])
    ).all()
    same(again.head.kernel[...], net.head.kernel[...])


def test_the_config_is_that_of_torch(small, tmp_path):
    save_pretrained(small, tmp_path)
    config = CheckpointConfig.from_json((tmp_path / "structops.json").read_text())
    assert config.framework == "jax"
    layer = config.layers["layers.0"]
    assert (layer.in_features, layer.out_features, layer.dtype, layer.kind) == (16, 16, "bfloat16", "Linear")
    assert config.layers["attention.query"].kind == "LinearGeneral"
    assert not any(name.endswith((".pkl", ".pt")) for name in os.listdir(tmp_path))


def test_errors(small, tmp_path):
    save_pretrained(small, tmp_path)
    with pytest.raises(so.CheckpointError, match="expected a module of Flax NNX or Equinox, got dict"):
        save_pretrained({}, tmp_path)
    with pytest.raises(so.CheckpointError, match="is abstract"):
        save_pretrained(nnx.eval_shape(Net), tmp_path)
    with pytest.raises(so.CheckpointError, match="is no folder"):
        load(tmp_path / "none", Net)
    with pytest.raises(so.CheckpointError, match="expected a module or a function"):
        load(tmp_path, 3)
    with pytest.raises(so.CheckpointError, match=r"the model has no layer .attention\.key."):
        load(tmp_path, nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    other = structurize(Net(), "btt", "attention.key")
    with pytest.raises(so.CheckpointError, match=r"attention.key is btt in the model and low_rank\(rank=4\)"):
        load(tmp_path, other)
    wide = Net()
    wide.head = nnx.Linear(16, 9, rngs=nnx.Rngs(0))
    with pytest.raises(so.CheckpointError, match=r"head.bias is \(9,\) in the model and \(8,\) in the checkpoint"):
        load(tmp_path, wide)
    wide.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(so.CheckpointError, match=r"the checkpoint lacks extra\.bias, extra\.kernel"):
        load(tmp_path, wide)
    text = (tmp_path / "structops.json").read_text()
    (tmp_path / "structops.json").write_text(text.replace('"jax"', '"torch"'))
    with pytest.raises(so.CheckpointError, match=r"was written by structops.torch"):
        load(tmp_path, Net)
    (tmp_path / "structops.json").write_text(text)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(so.CheckpointError, match="was cut off"):
        load(tmp_path, Net)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(so.CheckpointError, match="does not exist"):
        load(tmp_path, Net)


def test_a_run_that_is_killed_goes_on_in_another_layout(tmp_path):
    """Orbax saves sharded parameters and moments; another mesh with other rules resumes from them."""
    pytest.importorskip("orbax.checkpoint", reason="needs Orbax")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    with open(tmp_path / "errors.txt", "w") as errors:
        killed = subprocess.Popen([*command, "both", "no"], stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.strip() == "step 3":
                break
        killed.kill()  # while it trains, and saves in the background
        assert killed.wait() == -9, (tmp_path / "errors.txt").read_text()[-3000:]
        killed.stdout.close()
    done = subprocess.run([*command, "parameters", "yes"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert 1 <= seen["start"] < 10
    assert seen["places"] == [["data", None, None]] * 2
    assert seen["far"] < 1e-10 < seen["size"]
