"""Run a chain on arrays: pure functions of torch or JAX arrays, nothing parsed or derived per call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from structops._array import Array, backend_of, matmul, pad, permute, repeat
from structops.chain import Chain
from structops.errors import BackendError, ShapeError
from structops.program import Move, inverse


def contract(chain: Chain, factors: Sequence[Array], x: Array) -> Array:
    """Apply the matrix of a chain to the last axis of ``x``.

    ``y[..., output] = sum over the other labels of x[..., input] * factors[0] * factors[1] * ...``

    The factors are applied in the order of the chain, as permutations and (batched) matrix products.  Works under
    ``torch.compile(fullgraph=True)``, ``torch.func``, ``jax.jit``, ``grad`` and ``vmap``.

    Args:
        chain: The pattern.
        factors: One array per factor in order of application, stored as ``(blocks, fan_out, fan_in)``; axes of size 1
            may be left out.  `store` makes them from arrays with the textbook axes.
        x: Shape ``(..., in_features)``, same library, dtype and device as the factors.

    Returns:
        Shape ``(..., out_features)``.

    Raises:
        ShapeError: The last axis of ``x`` is not ``in_features`` long, or the factors do not have the chain's sizes.
        BackendError: numpy arrays, other objects, or arrays of two libraries.

    Cost:
        ``chain.macs`` multiply-accumulates per vector, ``chain.saved_activations`` numbers per vector kept by autograd.
    """
    check_product(chain, factors, x)
    padded = pad(x, [(0, chain.padded_in - chain.in_features)]) if chain.padded_in != chain.in_features else x
    y = products(chain.moves if hasattr(x, "permute") else chain.xla_moves, factors, padded)
    if chain.padded_out != chain.out_features:
        y = y[:, : chain.out_features]
    return y.reshape((*x.shape[:-1], chain.out_features))


def products(moves: Sequence[Move], factors: Sequence[Array], x: Array) -> Array:
    """The moves of a chain, unchecked: x (..., padded_in) to y (vectors, padded_out); see `structops.program`."""
    state, remaining = x, iter(factors)
    for move in moves:
        if move.axes:
            state = permute(state.reshape(move.state), move.axes)
        if move.joins:
            state = state.reshape(move.matrix)
        if move.factor:
            factor = next(remaining)
            if factor.shape != move.factor:
                factor = factor.reshape(move.factor)
            if move.repeats != 1:
                factor = repeat(factor, state.shape[0])
            if move.is_turned:
                state = state.mT
            state = matmul(factor, state) if move.tokens_last else matmul(state, factor.mT)
    return state


def store(chain: Chain, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Factors with textbook axes (the labels of each factor, in order) as ``(blocks, fan_out, fan_in)``.

    Raises:
        ShapeError: There are more or fewer arrays than factors, or one does not hold the numbers that its factor needs.
    """
    _check_count(chain, arrays)
    stored = []
    for step, factor, array in zip(chain.factor_steps, chain.factors, arrays, strict=True):
        if math.prod(array.shape) != factor.num_params:
            raise ShapeError(f"factor {factor.name} of {chain} needs shape {factor.shape}, got {tuple(array.shape)}")
        stored.append(permute(array.reshape(factor.shape), step.axes).reshape(factor.stored_shape))
    return tuple(stored)


def unstore(chain: Chain, factors: Sequence[Array]) -> tuple[Array, ...]:
    """The inverse of `store`: factors ``(blocks, fan_out, fan_in)`` with one axis per label, in textbook order.

    Raises:
        ShapeError: The factors do not have the chain's sizes.
    """
    _check_stored(chain, factors)
    arrays = []
    for step, factor in zip(chain.factor_steps, factors, strict=True):
        array = factor.reshape(chain.shape_of(step.stored))
        arrays.append(permute(array, inverse(step.axes)))
    return tuple(arrays)


def check_product(matrix: Any, factors: Sequence[Array], x: Array) -> None:
    """Stored factors and x fit a chain, or anything else with ``in_features``, ``factors`` and ``stored_shapes``.

    Raises:
        ShapeError: The last axis of x, the number of factors or the shape of one is wrong.
        BackendError: numpy arrays, other objects, or arrays of two libraries.
    """
    if not all(hasattr(array, "permute") for array in (x, *factors)):  # else all are torch's, and may be being compiled
        backends = {backend_of(array) for array in (x, *factors)}
        if len(backends) > 1:
            raise BackendError(f"expected x and factors of one library, got {' and '.join(sorted(backends))}")
    if x.shape[-1:] != (matrix.in_features,):
        raise ShapeError(f"expected x of shape (..., {matrix.in_features}) for {matrix}, got {tuple(x.shape)}")
    _check_stored(matrix, factors)


def _check_count(matrix: Any, arrays: Sequence[Array]) -> None:
    if len(arrays) != len(matrix.factors):
        raise ShapeError(f"expected {len(matrix.factors)} factors for {matrix}, got {len(arrays)}")


def _check_stored(matrix: Any, factors: Sequence[Array]) -> None:
    """As many numbers in another order would give a wrong product without a word."""
    _check_count(matrix, factors)
    for factor, wanted, array in zip(matrix.factors, matrix.stored_shapes, factors, strict=True):
        if array.shape != wanted and [n for n in array.shape if n != 1] != [n for n in wanted if n != 1]:
            raise ShapeError(
                f"factor {factor.name} of {matrix} is stored as (blocks, fan_out, fan_in) = {wanted}, "
                f"got {tuple(array.shape)}"
            )
