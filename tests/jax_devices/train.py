"""Run by tests/test_jax_checkpoint.py with eight devices: trains, saves with Orbax, and goes on from what is there.

Arguments: the folder of the checkpoints, the layout, and whether to compare with a run that was never interrupted.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from structops.jax import StructuredLinear, scale_by_mup, shard

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
STEPS = 10
LAYOUTS = {
    "both": ((2, 4), {"fsdp": "data", "tensor": "model", "colwise": "up", "rowwise": "down"}),
    "parameters": ((8, 1), {"fsdp": "data"}),
}


class Net(nnx.Module):
    """Two layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = StructuredLinear(16, 32, "btt(blocks=8, rank=2)", param_dtype=jnp.float64, rngs=rngs)
        self.down = StructuredLinear(32, 16, "btt(blocks=8, rank=2)", param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def trained(layout, folder=None):
    """The parameters after all steps, where training started, and what was restored."""
    sizes, how = LAYOUTS[layout]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = shard(Net(), mesh, **how)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), scale_by_mup(model)), wrt=nnx.Param)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    manager = None if folder is None else ocp.CheckpointManager(folder, options=options)

    def abstract(array):
        # Counts of the optimiser are on no mesh yet.
        place = array.sharding if isinstance(array.sharding, NamedSharding) else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    start, places = 0, []
    if manager is not None and manager.latest_step() is not None:
        start = manager.latest_step()
        here = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
        found = manager.restore(start, args=ocp.args.StandardRestore(jax.tree.map(abstract, here)))
        nnx.update(model, found["model"])
        nnx.update(optimizer, found["optimizer"])
        places = [list(factor[...].sharding.spec) for factor in model.down.factors]

    @nnx.jit
    def step(model, optimizer, x):
        gradient = nnx.grad(lambda model: ((model(x) - jnp.roll(x, 1, -1)) ** 2).mean())(model)
        optimizer.update(model, gradient)

    for k in range(start, STEPS):
        x = jax.random.normal(jax.random.key(k), (16, 16), jnp.float64)
        step(model, optimizer, jax.device_put(x, NamedSharding(mesh, P("data", None))))
        if manager is not None:
            state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
            manager.save(k + 1, args=ocp.args.StandardSave(state))
            print(f"step {k + 1}", flush=True)
    if manager is not None:
        manager.wait_until_finished()
    return jax.tree.leaves(jax.device_get(nnx.state(model, nnx.Param))), start, places


folder, layout, compare = sys.argv[1:]
found, start, places = trained(layout, folder)
if compare == "yes":
    expected, _, _ = trained(layout)
    print(
        json.dumps(
            {
                "start": start,
                "places": places,
                "far": max(float(abs(one - other).max()) for one, other in zip(found, expected, strict=True)),
                "size": max(float(abs(one).max()) for one in expected),
            }
        )
    )
