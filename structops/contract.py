"""Run a chain on arrays: pure functions of torch or JAX arrays, nothing parsed or derived per call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from structops._array import Array, pad, permute
from structops.chain import Chain
from structops.errors import ShapeError


def contract(chain: Chain, factors: Sequence[Array], x: Array) -> Array:
    """Apply the matrix of a chain to the last axis of ``x``.

    ``y[..., output] = sum over the other labels of x[..., input] * factors[0] * factors[1] * ...``

    The factors are applied in the order of the chain, as permutations and (batched) matrix products.  Works under
    ``torch.compile(fullgraph=True)``, ``torch.func``, ``jax.jit``, ``grad`` and ``vmap``.

    Args:
        chain: The pattern.
        factors: One array per factor in order of application, stored as ``(blocks, fan_out, fan_in)``.  Any shape that
            a row-major reshape turns into it will do; `store` makes it from an array with the textbook axes.
        x: Shape ``(..., in_features)``, same library, dtype and device as the factors.

    Returns:
        Shape ``(..., out_features)``.

    Raises:
        ShapeError: The last axis of ``x`` is not ``in_features`` long, or the factors do not have the chain's sizes.

    Cost:
        ``chain.macs`` multiply-accumulates per vector, ``chain.saved_activations`` numbers per vector kept by autograd.
    """
    if x.shape[-1] != chain.in_features:
        raise ShapeError(f"expected x of shape (..., {chain.in_features}) for {chain}, got {tuple(x.shape)}")
    if len(factors) != len(chain.factor_steps):
        raise ShapeError(f"expected {len(chain.factor_steps)} factors for {chain}, got {len(factors)}")
    lead = x.shape[:-1]
    if chain.padded_in != chain.in_features:
        x = pad(x, [(0, chain.padded_in - chain.in_features)])
    state, remaining = x, iter(factors)
    for move in chain.schedule:
        state = permute(state.reshape(move.state), move.axes).reshape(move.matrix)
        if move.factor:
            state = state @ next(remaining).reshape(move.factor).mT
    if chain.padded_out != chain.out_features:
        state = state[:, : chain.out_features]
    return state.reshape((*lead, chain.out_features))


def store(chain: Chain, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Factors with textbook axes (the labels of each factor, in order) as ``(blocks, fan_out, fan_in)``.

    Raises:
        ShapeError: An array does not hold the numbers that its factor needs.
    """
    stored = []
    for step, factor, array in zip(chain.factor_steps, chain.factors, arrays, strict=True):
        if math.prod(array.shape) != factor.num_params:
            raise ShapeError(f"factor {factor.name} of {chain} needs shape {factor.shape}, got {tuple(array.shape)}")
        array = permute(array.reshape(factor.shape), step.axes)
        stored.append(array.reshape((factor.blocks, factor.fan_out, factor.fan_in)))
    return tuple(stored)


def unstore(chain: Chain, factors: Sequence[Array]) -> tuple[Array, ...]:
    """The inverse of `store`: factors ``(blocks, fan_out, fan_in)`` with one axis per label, in textbook order."""
    arrays = []
    for step, factor in zip(chain.factor_steps, factors, strict=True):
        array = factor.reshape(chain.shape_of(step.batch + step.emitted + step.contracted))
        back = tuple(step.axes.index(axis) for axis in range(len(step.axes)))
        arrays.append(permute(array, back))
    return tuple(arrays)
