"""The residual MLP in JAX (Flax NNX), and its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from structops.jax import StructuredLinear, scale_by_mup
from structops.studies.data import Split
from structops.studies.mlp import MLP
from structops.studies.training import Recipe, Result, epochs


class Block(nnx.Module):
    """``h + down(gelu(up(norm(h))))``."""

    def __init__(self, up: nnx.Module, down: nnx.Module, width: int, rngs: nnx.Rngs) -> None:
        self.norm, self.up, self.down = nnx.LayerNorm(width, rngs=rngs), up, down

    def __call__(self, h: jax.Array) -> jax.Array:
        """Shape (..., width) to the same."""
        return h + self.down(jax.nn.gelu(self.up(self.norm(h)), approximate=False))


class JaxMLP(nnx.Module):
    """The network that `MLP` describes."""

    def __init__(self, sizes: MLP, rngs: nnx.Rngs) -> None:
        layers = {
            layer.name: StructuredLinear(
                layer.in_features, layer.out_features, layer.structure, zero_init=layer.zero_init, rngs=rngs
            )
            for layer in sizes.layers()
        }
        self.embed, self.head = layers["embed"], layers["head"]
        self.blocks = nnx.List(
            [Block(layers[f"blocks.{i}.up"], layers[f"blocks.{i}.down"], sizes.width, rngs) for i in range(sizes.depth)]
        )
        self.norm = nnx.LayerNorm(sizes.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pixels (..., 64) to logits (..., 10)."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def train(sizes: MLP, recipe: Recipe, data: Split, seeds: Sequence[int]) -> list[Result]:
    """Train a network from every seed, all at once: compiled once, and mapped over the seeds."""
    model, base = (
        nnx.eval_shape(lambda shape=shape: JaxMLP(shape, nnx.Rngs(0)))  # type: ignore[misc]
        for shape in (sizes, sizes.base(recipe.base_width))
    )
    graph = nnx.graphdef(model)
    scaling = scale_by_mup(model, base=base, structure_aware=recipe.structure_aware)
    schedule = optax.cosine_decay_schedule(recipe.lr, recipe.steps(data))
    transform = optax.chain(optax.adamw(schedule, weight_decay=0.0), scaling)

    def start(key: jax.Array) -> Any:
        params = nnx.state(JaxMLP(sizes, nnx.Rngs(key)))
        return params, transform.init(params)

    def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state: Any, batch: Any) -> Any:
        params, memory = state
        loss, gradient = jax.value_and_grad(loss_of)(params, *batch)
        update, memory = transform.update(gradient, memory, params)
        return (optax.apply_updates(params, update), memory), loss

    def classify(state: Any) -> jax.Array:
        return nnx.merge(graph, state[0])(jnp.asarray(data.test_x)).argmax(-1)

    # Everything is compiled: op by op, each new shape would be compiled by itself.
    state = jax.jit(jax.vmap(start))(jnp.stack([jax.random.key(seed) for seed in seeds]))
    run_epoch = jax.jit(jax.vmap(lambda state, batches: jax.lax.scan(step, state, batches)))
    losses = []
    for per_seed in zip(*(epochs(data, recipe, seed) for seed in seeds), strict=True):
        images, labels = (jnp.asarray(np.stack(arrays)) for arrays in zip(*per_seed, strict=True))
        state, epoch = run_epoch(state, (images, labels))
        losses.append(np.asarray(epoch).mean(axis=1))
    guesses = jax.jit(jax.vmap(classify))(state)
    hits = np.asarray(guesses) == data.test_y
    return [Result([float(epoch[k]) for epoch in losses], float(np.mean(hits[k]))) for k in range(len(seeds))]
