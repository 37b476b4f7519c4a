"""The contestants in JAX, compiled by ``jax.jit``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structops.bench.cases import Case
from structops.bench.contestant import Absent, Contestant, sample
from structops.bench.equations import equations
from structops.chain import Chain
from structops.contract import store, unstore
from structops.errors import StructureWarning
from structops.jax import StructuredLinear

Product = Callable[[list[Any], Any], Any]  # of parameters and x


def jax_contestant(name: str, case: Case, numbers: Sequence[np.ndarray]) -> Contestant:
    """``jax``: our layer; ``jax einsum``: an einsum a factor.

    Args:
        name: Which of the two.
        case: What to compute.
        numbers: x, the cotangent and the stored factors.

    Raises:
        Absent: JAX has no such device or number format, or the structure is no chain.
    """
    device = _device(case)
    x, cotangent, *factors = (jax.device_put(jnp.asarray(array, dtype=case.dtype), device) for array in numbers)
    stored: Callable[[Sequence[Any]], Sequence[Any]] = list
    if name == "jax":
        product = layer_product(case)
    else:
        chain = case.chain
        if chain is None:
            raise Absent("the structure is no chain of factors")
        product, stored = einsum_product(chain, case.tokens), partial(store, chain)
        factors = list(unstore(chain, factors))
    run = _compiled(product, case, factors, x, cotangent)

    def results() -> dict[str, np.ndarray]:
        y, *gradients = run()
        found = {"y": y}
        if gradients:
            found["dx"] = gradients[1]
            found |= {f"d{index}": gradient for index, gradient in enumerate(stored(gradients[0]))}
        return {what: _numpy(array) for what, array in found.items()}

    return Contestant(name, run, results, dict)


def layer_product(case: Case) -> Product:
    """The layer as a function of its factors and x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StructureWarning)  # the case has it
        sizes = (case.in_features, case.out_features)
        layer = StructuredLinear(*sizes, case.structure, bias=False, param_dtype=case.dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    leaves = jax.tree.structure(state)
    return lambda factors, x: nnx.merge(graph, jax.tree.unflatten(leaves, factors))(x)


def einsum_product(chain: Chain, tokens: int) -> Product:
    """The product as an einsum a factor, of the textbook arrays and x."""
    steps = equations(chain, tokens)

    def product(arrays: list[Any], x: Any) -> Any:
        state, remaining = jnp.pad(x, ((0, 0), (0, chain.padded_in - chain.in_features))), iter(arrays)
        for step in steps:
            operands = (state.reshape(step.shape), *([next(remaining)] if step.has_factor else []))
            state = jnp.einsum(step.text, *operands)
        return state.reshape(tokens, chain.padded_out)[:, : chain.out_features]

    return product


def _compiled(product: Product, case: Case, parameters: list[Any], x: Any, cotangent: Any) -> Callable[[], Any]:
    """The compiled pass, which waits for its results: (y,), or y and the gradients of parameters and x."""

    def forward(parameters: list[Any], x: Any, cotangent: Any) -> Any:
        return (product(parameters, x),)

    def train(parameters: list[Any], x: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(product, parameters, x)
        return (y, *pull(cotangent))

    # As precise as torch, which has no shortcuts for float32 by default.
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(forward if case.run == "forward" else train).lower(parameters, x, cotangent).compile()
    return lambda: jax.block_until_ready(compiled(parameters, x, cotangent))


def _device(case: Case) -> Any:
    """The device of the case.

    Raises:
        Absent: JAX sees no such device, or computes in lower precision.
    """
    if case.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise Absent("JAX has no float64 unless JAX_ENABLE_X64=1 is set")
    kind, _, index = case.device.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError):
        raise Absent(f"JAX {jax.__version__} sees no device {case.device!r}") from None


def _numpy(array: Any) -> np.ndarray:
    wide = np.float64 if array.dtype == jnp.float64 else np.float32
    return np.asarray(array.reshape(-1)[sample(array.size)]).astype(wide)
