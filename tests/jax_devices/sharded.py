"""Run by tests/test_jax_sharding.py in a process with eight devices: prints what it saw as JSON."""

import json
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import structops as so
from structops.jax import StructuredLinear, scale_by_mup, shard
from structops.jax.equinox import StructuredLinear as EquinoxLinear

warnings.simplefilter("error")
warnings.simplefilter("ignore", so.StructureWarning)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # what is sent between devices is the same
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Net(nnx.Module):
    """Two structured layers and a dense one."""

    def __init__(self, spec):
        rngs = nnx.Rngs(0)
        self.up = StructuredLinear(32, 64, spec, param_dtype=jnp.float64, rngs=rngs)
        self.down = StructuredLinear(64, 32, spec, param_dtype=jnp.float64, rngs=rngs)
        self.head = nnx.Linear(32, 8, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.block(x))

    def block(self, x):
        """The part that is cut."""
        return self.down(jax.nn.gelu(self.up(x)))


HOW = {
    "one device": None,
    "sharded data": {},
    "sharded parameters": {"fsdp": "data"},
    "cut layers": {"tensor": "model", "colwise": "up", "rowwise": "down"},
    "both": {"fsdp": "data", "tensor": "model", "colwise": "up", "rowwise": "down"},
}


def arrays(state):
    """Paths and arrays of a state."""
    return [(path, variable.get_value()) for path, variable in nnx.to_flat_state(state)]


def local(array):
    """The shape of what a device has of an array."""
    return list(array.sharding.shard_shape(array.shape))


def curve(spec, how):
    """Losses of a few steps of Adam, and where the parameters and the state of the optimiser lie."""
    model = Net(spec)
    if how is not None:
        shard(model, MESH, **how)
    placed = {
        ".".join(map(str, path)): [list(leaf.sharding.spec) if how is not None else [], local(leaf)]
        for path, leaf in arrays(nnx.state(model, nnx.Param))
    }
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), scale_by_mup(model)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, gradient = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        optimizer.update(model, gradient)
        return loss

    losses = []
    for k in range(4):
        x = jax.random.normal(jax.random.key(k), (16, 32), jnp.float64)
        y = jnp.roll(x, 1, -1)[:, :8]
        if how is not None:
            x, y = (jax.device_put(array, NamedSharding(MESH, P("data", None))) for array in (x, y))
        losses.append(float(step(model, optimizer, x, y)))
    trained = [local(leaf) for _, leaf in arrays(nnx.state(model, nnx.Param)) if leaf.ndim == 3]
    moments = sorted(local(leaf) for _, leaf in arrays(nnx.state(optimizer, nnx.optimizer.OptState)) if leaf.ndim == 3)
    return {"losses": losses, "placed": placed, "trained": sorted(trained), "moments": moments}


def collectives(spec, mesh, tokens):
    """What XLA sends between devices in a column-parallel layer followed by a row-parallel one."""
    model = shard(Net(spec), mesh, tensor="model", colwise="up", rowwise="down")
    x = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, P(tokens, None)))
    graph, state = nnx.split(model)
    sent = {}
    for name, run in {
        "up": lambda state, x: nnx.merge(graph, state).up(x),
        "block": lambda state, x: nnx.merge(graph, state).block(x),
    }.items():
        axis = "model" if name == "up" else None
        out = NamedSharding(mesh, P(tokens, axis))
        text = jax.jit(run, out_shardings=out).lower(state, x).compile().as_text()
        kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        sent[name] = re.findall(rf"= \S+ ({kinds})(?:-start)?\(", text)
    return sent


def equinox():
    """The Equinox layer, sharded and stacked."""
    stack = jax.vmap(lambda key: EquinoxLinear(32, 32, "btt(blocks=4, rank=2)", key=key))(
        jax.random.split(jax.random.key(0), 3)
    )
    placed = shard(stack, MESH, fsdp="data", tensor="model", rowwise="*")
    x = jnp.ones((3, 5, 32))
    near = jnp.allclose(jax.vmap(lambda one, x: one(x))(placed, x), jax.vmap(lambda one, x: one(x))(stack, x))
    return {"specs": [str(tuple(f.sharding.spec)) for f in placed.factors], "near": bool(near)}


SPECS = json.loads(sys.argv[1])
ONE = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
print(
    json.dumps(
        {
            "curves": {name: curve("btt(blocks=4, rank=2)", how) for name, how in HOW.items()},
            "collectives": {spec: collectives(spec, MESH, "data") for spec in SPECS},
            "alone": collectives("kron", ONE, None),
            "equinox": equinox(),
        }
    )
)
