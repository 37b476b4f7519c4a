"""The initialisation of a plan."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from structops.jax.optimizer import matrix_axes, row_finder
from structops.mup import MupPlan, PlanRow


def init(model: Any, plan: MupPlan, key: jax.Array) -> Any:
    """Draw the matrices of a model anew, as its plan says; vectors and scalars keep what they have.

    Every parameter has a key of its own, made of ``key`` and its name, so that it does not change when others are
    added.  Compile it where drawing op by op takes long: ``jax.jit(lambda key: init(params, plan, key))``.

    Args:
        model: A module of Flax NNX, which is changed in place; or a module of Equinox or a tree, of which a new one
            is made.
        plan: Its plan; ``Rule(init=...)`` chooses between ``"paper"``, ``"orthogonal"`` and ``"kaiming"``.
        key: Source of the random numbers.

    Returns:
        The model.

    Raises:
        StructureError: The plan is that of another model.

    Example:
        >>> from structops.jax import StructuredLinear, plan
        >>> from structops.mup import Rule
        >>> layer = StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(0))
        >>> layer = init(layer, plan(layer, Rule(init="orthogonal")), jax.random.key(1))
        >>> block = layer.factors[0][...][0]
        >>> bool(jnp.allclose(block.T @ block, jnp.eye(4), atol=1e-6))
        True
    """
    find = row_finder(plan)

    def drawn(path: Any, array: Any) -> Any:
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.inexact):
            return array
        row = find(path)
        return array if row.init == "constant" else _draw(row, array, jax.random.fold_in(key, digits(row.name)))

    if isinstance(model, nnx.Module):
        nnx.update(model, jax.tree_util.tree_map_with_path(drawn, nnx.state(model, nnx.Param)))
        return model
    return jax.tree_util.tree_map_with_path(drawn, model)


def digits(name: str) -> int:
    """A number that depends on the name alone, in every process alike."""
    return zlib.crc32(name.encode())


def _draw(row: PlanRow, array: Any, key: jax.Array) -> jax.Array:
    shape, dtype = tuple(array.shape), array.dtype
    if row.init == "zero":
        return jnp.zeros(shape, dtype)
    factor = row.weight.factor
    if row.init == "orthogonal":
        inputs, outputs = matrix_axes(row.weight)
        fans = (math.prod(shape[axis] for axis in inputs), math.prod(shape[axis] for axis in outputs))
        # The vector behind a Toeplitz matrix is no block of it, so it cannot be orthogonal.
        if fans == (factor.fan_in, factor.fan_out):
            return _orthogonal(key, shape, dtype, inputs, outputs) * jnp.asarray(math.sqrt(fans[1] / fans[0]), dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(row.init_std, dtype)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any, inputs: Any, outputs: Any) -> jax.Array:
    """Blocks with all singular values 1, uniform among them; the axes in front of the matrix are blocks."""
    batch = shape[: len(shape) - len(inputs) - len(outputs)]
    n, m = (math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs))
    # There is no QR in half precision.
    precise = jnp.promote_types(dtype, jnp.float32)
    q, r = jnp.linalg.qr(jax.random.normal(key, (*batch, max(m, n), min(m, n)), precise))
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    q = q * jnp.where(diagonal < 0, -1, 1)[..., None, :]  # else LAPACK's choice of signs decides
    first, second = (n, m) if inputs[0] < outputs[0] else (m, n)
    return (q if first >= second else jnp.swapaxes(q, -1, -2)).reshape(shape).astype(dtype)
