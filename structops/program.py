"""How a chain is computed: reshapes, permutations and (batched) matrix products, as plain numbers derived once.

The layout of the states between the factors decides the speed, and libraries differ in what they do fast.

`strided_moves` are for libraries whose products read operands through strides (PyTorch).  States are *tokens last*:

- every product ``factor @ state`` of ``(blocks, fan_out, fan_in)`` and ``(blocks, fan_in, tokens)`` writes the state
  that the next product reads through strides, in most chains without a copy in between;
- where a copy is needed after all, it moves whole runs of tokens.

The first product reads x as it comes, tokens first, wherever its contracted labels are the last of the input.  The last
product, ``state.T @ factor.T``, writes ``(blocks, tokens, fan_out)``, and the one copy that the order of the output
asks for is left.

`shared_moves` are for factors of one block each (Kronecker products, tensor-trains, low rank): tokens stay first, as in
x and y, and nothing is ever copied.

`copied_moves` are for XLA, which copies every operand into the order of its product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from structops.pattern import Regroup, Step

TOKENS = "*"  # stands for all leading axes of x; never a label


@dataclass(frozen=True)
class Move:
    """One operation on the state; -1 is the axis of all leading axes of x, and of what is shared beside it.

    Read the state as ``state``, permute it by ``axes`` and reshape it to ``matrix``, transposed if ``is_turned``.  Then
    multiply by the factor read as ``factor``: ``factor @ matrix`` if the tokens are last, else ``matrix @ factor.T``.
    Without a factor the matrix is the new state.

    Attributes:
        state: Sizes of the labels of the state, in the order in which it is stored; without those of size 1.
        axes: The permutation; state and axes are empty where the matrix is read as the state lies.
        matrix: Shape of the operand, ``(blocks, fan_in, -1)`` or ``(blocks, -1, fan_in)``; without the first axis where
            there is one block.
        factor: Shape of the factor, with as many axes as the operand; empty for no product.
        tokens_last: Whether the product is ``(blocks, fan_out, tokens)``.
        is_turned: Whether the operand is stored as the transpose of what ``factor @ matrix`` needs.
        repeats: Other than 1, the one block of the factor multiplies so many matrices of shared labels, one by one; 0
            is as many as there are.
        joins: Whether an axis of the operand is not simply one label.
        copies: Whether the permuted state is copied, since no strides describe it as such a matrix.
    """

    state: tuple[int, ...]
    axes: tuple[int, ...]
    matrix: tuple[int, ...]
    factor: tuple[int, ...] = ()
    tokens_last: bool = False
    is_turned: bool = False
    repeats: int = 1
    joins: bool = True
    copies: bool = True


# -------------------------------------------------------------------------------------------------- strided operands


def strided_moves(inputs: str, steps: Sequence[Step | Regroup], output: str, size: Mapping[str, int]) -> Iterator[Move]:
    """The operations that compute a chain, one for every factor and at the end one that puts the output in order.

    Args:
        inputs: Labels of the input.
        steps: The factors, and the regroups between them.
        output: Labels of the output.
        size: Size of every label.
    """
    order, last = _long(TOKENS + inputs, size), max(k for k, step in enumerate(steps) if isinstance(step, Step))
    for k, step in enumerate(steps):
        if isinstance(step, Step):
            batch, contracted, kept = _operand(order, step, size)
            yield _product(order, step, (batch, contracted, kept), k < last, size)
            order = _long(batch + kept + step.emitted if k == last else batch + step.emitted + kept, size)
            continue
        before, after = _long(step.before, size), _long(step.after, size)
        if order == before + TOKENS:  # the same numbers in the same places
            order = after + TOKENS
        else:
            if order != TOKENS + before:
                yield _reread(order, TOKENS + before, size)
            order = TOKENS + after
    yield _reread(order, _long(TOKENS + output, size), size)


def _operand(order: str, step: Step, size: Mapping[str, int]) -> tuple[str, str, str]:
    """Labels of the three axes of the operand: batch, contracted, and kept, which ends with the tokens.

    Labels that the factor does not have are kept beside the tokens; or, where the factor has one block, as a batch of
    products with that block.  What needs no copy is preferred.
    """
    batch, contracted = _long(step.batch, size), _long(step.contracted, size)
    shared = "".join(label for label in order if label in step.shared)
    choices = [(batch, contracted, shared + TOKENS)]
    if shared and not batch:
        start = order.index(contracted[0]) if contracted else 0
        ahead = "".join(label for label in shared if order[0] == TOKENS or order.index(label) < start)
        choices.append((ahead, contracted, shared[len(ahead) :] + TOKENS))
    return next((choice for choice in choices if _is_view(order, choice)), choices[0])


def _is_view(order: str, groups: tuple[str, str, str]) -> bool:
    """Whether strides describe a state in this order as a matrix with these axes, one of the last two contiguous."""
    batch = groups[0]
    return all(group in order for group in groups) and not (batch and order.endswith(batch))


def _product(order: str, step: Step, groups: tuple[str, str, str], tokens_last: bool, size: Mapping[str, int]) -> Move:
    batch, contracted, kept = groups
    blocks, ahead = _size(step.batch, size), _size(batch, size)
    rows, columns = _size(step.emitted, size), _size(contracted, size)
    inner = (columns, -1) if tokens_last else (-1, columns)
    target = batch + contracted + kept if tokens_last else batch + kept + contracted
    return Move(
        state=_shape(order, size),
        axes=tuple(order.index(label) for label in target),
        matrix=(ahead, *inner) if ahead > 1 else inner,
        factor=(blocks, rows, columns) if ahead > 1 else (rows, columns),
        tokens_last=tokens_last,
        repeats=ahead // blocks,
        joins=not len(batch) <= len(contracted) == len(kept) == 1,
        copies=not _is_view(order, groups),
    )


# --------------------------------------------------------------------------------------------------- shared factors


def shared_moves(
    inputs: str, steps: Sequence[Step | Regroup], output: str, size: Mapping[str, int]
) -> tuple[Move, ...] | None:
    """The operations that compute a chain whose factors have one block each, with the tokens first throughout.

    Every factor is applied in the place of the labels that it contracts: as a product with all the rest if they are the
    last of the state, else once for all that is before them.

    Returns:
        None if a factor has blocks, or the labels do not lie like that.
    """
    order, found = _long(TOKENS + inputs, size), []
    for step in steps:
        if isinstance(step, Regroup) or _size(step.batch, size) > 1:
            return None
        contracted = _long(step.contracted, size)
        ahead, place, behind = order.partition(contracted or "?")
        if not place:
            return None
        factor, rest = (_size(step.emitted, size), _size(step.contracted, size)), _size(behind, size)
        if behind:
            matrix, factor_shape = (-1, factor[1], rest), (1, *factor)
            found.append(Move((), (), matrix, factor_shape, tokens_last=True, repeats=0, copies=False))
        else:
            found.append(Move((), (), (-1, factor[1]), factor, copies=False))
        order = ahead + _long(step.emitted, size) + behind
    if order != _long(TOKENS + output, size):
        return None
    return (*found, Move((), (), (-1, _size(output, size)), copies=False))


# --------------------------------------------------------------------------------------------------- copied operands


def copied_moves(
    inputs: str, steps: Sequence[Step | Regroup], output: str, size: Mapping[str, int], tokens_last: bool
) -> Iterator[Move]:
    """The operations that compute a chain with the tokens last in every state, or before the emitted labels.

    Args:
        inputs: Labels of the input.
        steps: The factors, and the regroups between them.
        output: Labels of the output.
        size: Size of every label.
        tokens_last: Where the tokens are in the states between factors.
    """
    order = _long(TOKENS + inputs, size)
    for step in steps:
        if isinstance(step, Regroup):
            before = _long(step.before, size)
            yield _reread(order, TOKENS + before, size)
            order = TOKENS + _long(step.after, size)
            continue
        batch, contracted, emitted = (_long(labels, size) for labels in (step.batch, step.contracted, step.emitted))
        kept = "".join(label for label in order if label not in batch + contracted)
        is_turned = tokens_last and order[0] == TOKENS  # x and regrouped states come so: XLA turns them by itself
        move = _product(order, step, (batch, contracted, kept), tokens_last and not is_turned, size)
        yield replace(move, tokens_last=tokens_last, is_turned=is_turned)
        order = batch + emitted + kept if tokens_last else batch + kept + emitted
    yield _reread(order, _long(TOKENS + output, size), size)


# ------------------------------------------------------------------------------------------------------------- labels


def _reread(order: str, target: str, size: Mapping[str, int]) -> Move:
    """Bring the state into another order, tokens first, and flatten it."""
    axes = tuple(order.index(label) for label in target)
    flat = (-1, _size(target[1:], size))
    return Move(_shape(order, size), axes, flat, joins=len(target) != 2, copies=order != target)


def inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _long(labels: str, size: Mapping[str, int]) -> str:
    """The labels that are not of size 1, which have no place in memory."""
    return "".join(label for label in labels if label == TOKENS or size[label] > 1)


def _shape(order: str, size: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(-1 if label == TOKENS else size[label] for label in order)


def _size(labels: str, size: Mapping[str, int]) -> int:
    return math.prod(size[label] for label in labels)
