"""The product of a layer in the order and layout that XLA runs fastest: plain operations, decided by sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from structops.chain import Chain
from structops.contract import check_product
from structops.merging import Machine, Merged, plans
from structops.pattern import Regroup
from structops.program import TOKENS
from structops.spec import ChainPlan, Plan

XLA_CPU = Machine(move=90.0, side=32.0, call=1e6)
"""XLA on a CPU for `structops.merging`: products of small matrices at half of PyTorch's rate, and slower copies.

Measured as for `is_token_minor`, factors multiplied together where this says so against each by itself: a tensor-train
of rank 16 at width 1024 3.0 times as fast with gradients and 4 times forward, a block tensor-train of 3 cores 1.2 times
with gradients and 0.9 to 1.2 times forward.
"""


def product(plan: Plan, factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """``A x`` on the last axis of x, from the stored factors of a plan.

    On a CPU, a chain is computed as batched matrix products with one of two layouts of the state; see `is_token_minor`.
    For many tokens, factors that cost more than their product are multiplied together first; see `structops.merging`.
    Elsewhere, and for what is no chain, this is ``plan.apply``.

    Only reshapes, transpositions and products are used, so that every transformation of JAX works: ``jit``, ``vmap``,
    forward and reverse derivatives of any order.

    Args:
        plan: The structure at its size.
        factors: One array per factor in order of application, ``(blocks, fan_out, fan_in)``.
        x: Shape ``(..., in_features)``.

    Returns:
        Shape ``(..., out_features)``.

    Raises:
        ShapeError: The factors or x do not have the sizes of the plan.
        BackendError: numpy arrays, other objects, or arrays of another library.
    """
    if not isinstance(plan, ChainPlan) or jax.default_backend() != "cpu":
        return plan.apply(factors, x)
    check_product(plan, factors, x)
    tokens = math.prod(x.shape[:-1])
    merged = _merged(plan.chain, tokens)
    chain = merged.chain
    y = run(program(chain, is_token_minor(chain)), merged.factors(factors), _padded(x, chain.padded_in))
    return y[:, : chain.out_features].reshape((*x.shape[:-1], chain.out_features))


def is_token_minor(chain: Chain) -> bool:
    """Whether the state is best kept as (labels, tokens) rather than (labels, tokens, labels).

    XLA copies the state between two factors whatever the layout, and multiplies about a quarter more slowly where the
    tokens come last.  In return the copy moves whole runs of tokens instead of single numbers, five times as fast.  So
    the wider the state is beside x and y, the more the copy matters.  Measured on two cores, float32, 1024 tokens,
    two-factor block tensor-trains, as the time with tokens inside over that with tokens last:

        ==================  ====  ====  =====  ====  ====  ====  ====  ====
        width               2048  1024   4096   512  1024  1024  4096  1024
        blocks                16     8     64    16    16    32    64    32
        rank                   1     8      1     4    16     2     2     4
        state / width        1/8   1/2      1     2     4     2     2     4
        forward             0.81  1.04   1.00  1.20  1.30  1.55  1.54  1.50
        with gradients      0.77  0.90   0.97  0.90  1.14  1.29  1.40  1.35
        ==================  ====  ====  =====  ====  ====  ====  ====  ====

    With shared factors, which need no batch of products, tokens last is slower (0.5 for a Kronecker product).
    """
    if len(chain.factors) == 1 or any(f.blocks == 1 or f.sharing > 1 for f in chain.factors):
        return False
    return max(chain.intermediate_widths) >= 2 * max(chain.padded_in, chain.padded_out)


@dataclass(frozen=True)
class Move:
    """Read the state as ``state``, permute it by ``axes``, reshape it to ``matrix``, and multiply by a factor.

    Attributes:
        state: Sizes of the labels of the state, -1 for the tokens.
        axes: The permutation.
        matrix: Shape of the operand, with or without a first axis of blocks.
        factor: Shape of the factor; empty for no product.
        is_minor: Whether the result has the tokens last, ``factor @ matrix``; else it is ``matrix @ factor.T``.
        is_turned: Whether the operand of ``factor @ matrix`` is stored transposed.
    """

    state: tuple[int, ...]
    axes: tuple[int, ...]
    matrix: tuple[int, ...]
    factor: tuple[int, ...] = ()
    is_minor: bool = False
    is_turned: bool = False


def run(moves: Sequence[Move], factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The moves of a program: x (..., padded_in) to y (tokens, padded_out)."""
    state, remaining = x, iter(factors)
    for move in moves:
        state = state.reshape(move.state).transpose(move.axes).reshape(move.matrix)
        if move.factor:
            factor = next(remaining).reshape(move.factor)
            state = factor @ (state.mT if move.is_turned else state) if move.is_minor else state @ factor.mT
    return state


@cache
def program(chain: Chain, is_minor: bool) -> tuple[Move, ...]:
    """The moves that compute a chain with the tokens last in the states between factors, or inside."""
    return tuple(_moves(chain, is_minor))


def _moves(chain: Chain, is_minor: bool) -> Iterator[Move]:
    order = TOKENS + chain.terms[0]
    for step in chain.steps:
        if isinstance(step, Regroup):
            yield _move(chain, order, TOKENS + step.before, (-1, chain.size(step.before)))
            order = TOKENS + step.after
            continue
        kept = "".join(label for label in order if label not in step.batch + step.contracted)
        blocks, rows, columns = chain.size(step.batch), chain.size(step.emitted), chain.size(step.contracted)
        is_turned = is_minor and order[0] == TOKENS
        if is_minor and not is_turned:
            target, matrix = step.batch + step.contracted + kept, (columns, -1)
        else:
            target, matrix = step.batch + kept + step.contracted, (-1, columns)
        batch = (blocks,) if blocks > 1 else ()
        yield _move(chain, order, target, (*batch, *matrix), (*batch, rows, columns), is_minor, is_turned)
        order = step.batch + step.emitted + kept if is_minor else step.batch + kept + step.emitted
    yield _move(chain, order, TOKENS + chain.terms[-1], (-1, chain.padded_out))


def _move(
    chain: Chain,
    order: str,
    target: str,
    matrix: tuple[int, ...],
    factor: tuple[int, ...] = (),
    is_minor: bool = False,
    is_turned: bool = False,
) -> Move:
    state = tuple(-1 if label == TOKENS else chain.size(label) for label in order)
    return Move(state, tuple(order.index(label) for label in target), matrix, factor, is_minor, is_turned)


def _merged(chain: Chain, tokens: int) -> Merged:
    """Which factors are multiplied together for so many tokens."""
    return next(merged for least, merged in reversed(plans(chain, XLA_CPU)) if tokens >= least)


def _padded(x: jax.Array, size: int) -> jax.Array:
    """X with zeros up to this size of the last axis."""
    short = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
