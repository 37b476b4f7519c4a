"""Write a size as a product of modes, and find sizes near one that does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Literal

from structops.errors import StructureError

Rule = Literal["balanced", "greedy"]
RULES: tuple[Rule, ...] = ("balanced", "greedy")


def modes(size: int, count: int, rule: Rule = "balanced") -> tuple[int, ...]:
    """``count`` factors of ``size`` in descending order, the most significant mode first.

    * ``balanced``: the factors with the smallest sum, and among those with the smallest largest factor; two factors
      are the closest pair of divisors.
    * ``greedy``: the rule of the paper's code, which reproduces its published counts: primes in ascending order, each
      multiplied onto the smallest factor so far.

    A prime is ``size x 1``.

    Raises:
        StructureError: The rule is unknown, or the size or the number of modes is below 1.

    Example:
        >>> modes(768, 2), modes(768, 2, "greedy"), modes(4096, 3)
        ((32, 24), (48, 16), (16, 16, 16))
    """
    if size < 1 or count < 1:
        raise StructureError(f"expected a size of at least 1 and at least one mode, got {size} and {count}")
    if rule == "balanced":
        return _balanced(size, count, size)
    if rule == "greedy":
        return _greedy(size, count)
    raise StructureError(f"unknown rule {rule!r} for modes; expected one of {', '.join(RULES)} or explicit modes")


@cache
def divisors(size: int) -> tuple[int, ...]:
    """All divisors in ascending order."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return tuple(sorted({*small, *(size // d for d in small)}))


def common_divisors(a: int, b: int) -> tuple[int, ...]:
    """All numbers that divide both, in ascending order."""
    return divisors(math.gcd(a, b))


@cache
def _balanced(size: int, count: int, largest: int) -> tuple[int, ...]:
    """Descending factors, none above ``largest``, with the smallest sum; empty if there are none."""
    if count == 1:
        return (size,) if size <= largest else ()
    best: tuple[int, ...] = ()
    for first in divisors(size):
        if first > largest or first**count < size:
            continue
        if best and first >= sum(best):
            break
        rest = _balanced(size // first, count - 1, first)
        if rest and (not best or (sum(rest) + first, first) < (sum(best), best[0])):
            best = (first, *rest)
    return best


def _greedy(size: int, count: int) -> tuple[int, ...]:
    buckets = [1] * count
    for prime in _primes(size):
        buckets[buckets.index(min(buckets))] *= prime
    return tuple(sorted(buckets, reverse=True))


def _primes(size: int) -> Iterable[int]:
    prime = 2
    while prime * prime <= size:
        while size % prime == 0:
            yield prime
            size //= prime
        prime += 1
    if size > 1:
        yield size


def nearest_multiples(size: int, unit: int) -> tuple[int, ...]:
    """The multiples of ``unit`` next to ``size``, for messages that say what would work."""
    below = size // unit * unit
    return tuple(n for n in (below, below + unit) if n > 0)
