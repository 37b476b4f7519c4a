"""The pair: chains of two factors without shared labels, as views of stored factors, input and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from structops.chain import Chain
from structops.program import inverse


class Sizes(NamedTuple):
    """Sizes of the labels of a pair: what a program that computes one needs to know.

    ``z[t, c, s, b] = sum_d first[c, s, b, d] x[t, c, d]``, then
    ``y[t, a, b] = sum_{c, s} second[b, a, c, s] z[t, c, s, b]``.
    """

    a: int
    b: int
    c: int
    d: int
    s: int

    @property
    def T(self) -> Sizes:
        """Those of the transposed pair."""
        return Sizes(self.d, self.c, self.b, self.a, self.s)


@dataclass(frozen=True)
class View:
    """How to see a tensor with the axes of a pair; never a copy, since axes are split and permuted, not merged.

    Attributes:
        shape: The axes as they lie in memory; an axis of tokens before them is kept.
        axes: Their permutation.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The view."""
        return tensor.view(tensor.shape[: len(self.axes) - len(self.shape)] + self.shape).permute(self.axes)

    def back(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this shape that is seen like that."""
        return view.permute(inverse(self.axes)).reshape(shape)


@dataclass(frozen=True)
class Pair:
    """The axes of a chain that is a pair.

    Attributes:
        sizes: Sizes of the labels.
        x: Of the input (tokens, in_features), as (t, c, d).
        first: Of the first factor (blocks, fan_out, fan_in), as (c, s, b, d).
        second: Of the second factor (blocks, fan_out, fan_in), as (b, a, c, s).
        y: Of the output (tokens, out_features), as (t, a, b).
    """

    sizes: Sizes
    x: View
    first: View
    second: View
    y: View


def pair_of(chain: Chain) -> Pair | None:
    """The axes with which a chain is a pair, for a layer to derive once.

    Labels of size 1 do not count, and several labels count as one where they are neighbours, in the same order, in
    every term.

    Returns:
        None if the chain has another number of factors, shared labels, labels that both factors keep, a regroup,
        padding, or an order of labels for which a view would need a copy.

    Example:
        >>> pair = pair_of(Chain("cd, sbcd, abcs -> ab", dict(a=4, b=3, c=2, d=5, s=6)))
        >>> pair.sizes
        Sizes(a=4, b=3, c=2, d=5, s=6)
        >>> pair.first
        View(shape=(2, 6, 3, 5), axes=(0, 1, 2, 3))
        >>> pair_of(Chain("cd, bd, ac -> ab", dict(a=4, b=3, c=2, d=5)))  # a Kronecker product shares
    """
    if len(chain.steps) != 2 or len(chain.factor_steps) != 2:
        return None
    if chain.shape != (chain.padded_out, chain.padded_in):
        return None

    def large(labels: str) -> str:
        return "".join(label for label in labels if chain.size(label) > 1)

    one, two = chain.factor_steps
    if large(one.shared + two.shared):
        return None
    c, d, b, a = (large(labels) for labels in (one.batch, one.contracted, two.batch, two.emitted))
    emitted = large(one.emitted)
    s = "".join(label for label in emitted if label not in b)
    x, first, second, y = (
        _order(large(chain.terms[0]), c, d),
        _order(emitted, s, b),
        _order(large(two.contracted), c, s),
        _order(large(chain.terms[-1]), a, b),
    )
    if x is None or first is None or second is None or y is None:
        return None
    sizes = Sizes(*map(chain.size, (a, b, c, d, s)))
    return Pair(
        sizes,
        _view((), (sizes.c, sizes.d), (), x, tokens=1),
        _view((sizes.c,), (sizes.s, sizes.b), (sizes.d,), first),
        _view((sizes.b, sizes.a), (sizes.c, sizes.s), (), second),
        _view((), (sizes.a, sizes.b), (), y, tokens=1),
    )


def _order(labels: str, one: str, other: str) -> bool | None:
    """Whether ``labels`` are these two groups, True, or the other way round, False; None if neither."""
    return True if labels == one + other else False if labels == other + one else None


def _view(
    before: tuple[int, ...], two: tuple[int, int], after: tuple[int, ...], in_order: bool, tokens: int = 0
) -> View:
    """Axes of which ``two`` neighbours may lie the other way round."""
    axes = list(range(tokens + len(before) + 2 + len(after)))
    if not in_order:
        first = tokens + len(before)
        axes[first], axes[first + 1] = axes[first + 1], axes[first]
        two = two[::-1]
    return View(before + two + after, tuple(axes))
