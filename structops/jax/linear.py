"""What the layers of Flax NNX and of Equinox have in common: pure functions of a plan and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from structops._array import real_of
from structops.jax.product import product
from structops.mup import init_stds
from structops.normalise import rms_cap
from structops.spec import Plan

WeightNorm = bool | Literal["cap"]


def draw(plan: Plan, keys: Sequence[jax.Array], dtype: Any, zero_init: bool = False) -> list[jax.Array]:
    """Stored factors by the rule of `structops.mup.init_stds`, each from a key of its own."""
    stds = init_stds(plan, zero_last=zero_init)
    return [
        jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
        for key, shape, std in zip(keys, plan.stored_shapes, stds, strict=True)
    ]


def unit_gains(plan: Plan, dtype: Any) -> jax.Array:
    """The gains of weight normalisation at the start."""
    return jnp.ones(len(plan.stored_shapes), real_of(jnp.dtype(dtype)))


def effective(
    factors: Sequence[jax.Array], weight_norm: WeightNorm, caps: Sequence[float], gains: jax.Array | None
) -> list[jax.Array]:
    """The factors that the product takes: the parameters, or what weight normalisation makes of them."""
    return rms_cap(factors, caps, gains) if weight_norm else list(factors)


def affine(
    plan: Plan,
    factors: Sequence[jax.Array],
    bias: jax.Array | None,
    x: jax.Array,
    dtype: Any = None,
    recompute: bool = False,
) -> jax.Array:
    """``A x + bias`` on the last axis.

    Args:
        plan: The structure at its size.
        factors: The stored factors.
        bias: Shape (out_features,), or None.
        x: Shape (..., in_features).
        dtype: Dtype of the computation and of the result; by default the one that x and the parameters promote to.
        recompute: Whether the derivative computes the states between the factors again instead of keeping them.
    """
    arrays = [*factors, x] if bias is None else [*factors, x, bias]
    if all(isinstance(array, jax.Array) for array in arrays):  # else the product says what it takes
        dtype = jnp.result_type(*arrays) if dtype is None else dtype
        factors, x = [factor.astype(dtype) for factor in factors], x.astype(dtype)
    apply = partial(product, plan)
    y = (jax.checkpoint(apply) if recompute else apply)(factors, x)
    return y if bias is None else y + bias.astype(y.dtype)


def description(plan: Plan) -> str:
    """Parameters, and their ratio to those of a dense layer."""
    ratio = plan.num_params / (plan.in_features * plan.out_features)
    return f"{plan.num_params:,} params, {ratio:.3g} of dense"
