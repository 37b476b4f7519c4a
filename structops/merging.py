"""Which factors of a chain to multiply together in advance: the cheapest order of contraction for so many tokens.

Multiplying neighbours costs once what it saves per token.  Few tokens are best applied factor by factor; many may be
better off with fewer, larger factors: up to the dense matrix where it needs no more MACs than the chain, or where the
factors are so small that moving the states between them costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from structops._array import Array, namespace
from structops.chain import Chain
from structops.errors import PatternError
from structops.pattern import Step

Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Machine:
    """What decides about merging, relative to one multiply-accumulate of a large matrix product.

    Attributes:
        move: MACs in the time that a number of a state takes, written and read.
        side: Rows or columns of a factor at which a product runs at half of the speed of large ones.
        call: MACs in the time that it takes to call a product of nothing; merging two factors is taken as three calls.
    """

    move: float
    side: float
    call: float


CPU = Machine(move=50.0, side=8.0, call=1e6)
"""By hand, from products and copies measured on the machine of docs/speed.md."""
GPU = Machine(move=350.0, side=32.0, call=2e9)
"""From an H200's bfloat16 FLOP/s and bandwidth; not measured."""
GAIN = 0.8
"""Merging has to promise at most this share of the time; the estimates are no better."""


@dataclass(frozen=True)
class Merged:
    """A chain some of whose factors are products of neighbouring factors of another chain.

    Attributes:
        chain: The chain of the products.
        groups: For each of its factors the first, and the one after the last, of the factors that it is made of.
        equations: How each is made, for ``einsum``; empty where it is one factor.
        shapes: Sizes of the labels of every factor of the other chain, in stored order.
    """

    chain: Chain
    groups: Groups
    equations: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def factors(self, factors: Sequence[Array]) -> list[Array]:
        """The factors of this chain from those of the other, all ``(blocks, fan_out, fan_in)``."""
        merged = []
        for (start, end), equation, shape in zip(self.groups, self.equations, self.chain.stored_shapes, strict=True):
            if equation:
                arrays = [factors[k].reshape(self.shapes[k]) for k in range(start, end)]
                merged.append(namespace(arrays[0]).einsum(equation, *arrays).reshape(shape))
            else:
                merged.append(factors[start])
        return merged


def merge(chain: Chain, groups: Groups) -> Merged:
    """The chain with every group of neighbouring factors multiplied together.

    Args:
        chain: The chain.
        groups: First factor, and the one after the last, of each group; together all factors in order.

    Raises:
        PatternError: The groups are not the factors in order, or a regroup lies inside one.
    """
    if [k for start, end in groups for k in range(start, end)] != list(range(len(chain.factors))):
        raise PatternError(f"expected groups of the {len(chain.factors)} factors of {chain} in order, got {groups}")
    places = [place for place, step in enumerate(chain.steps, start=1) if isinstance(step, Step)]
    terms = list(chain.terms)
    for start, end in reversed(groups):  # from behind, so that the places before stay what they are
        if places[end - 1] - places[start] > end - 1 - start:
            raise PatternError(f"{chain}: a regroup lies between the factors {start} and {end - 1}")
        if end - start > 1:
            terms[places[start] : places[end - 1] + 1] = [_product_term(chain, start, end)]
    merged = Chain(", ".join(terms[:-1]) + " -> " + terms[-1], chain.sizes, chain.in_features, chain.out_features)
    stored = [step.stored for step in chain.factor_steps]
    equations = tuple(
        ",".join(stored[start:end]) + "->" + step.stored if end - start > 1 else ""
        for (start, end), step in zip(groups, merged.factor_steps, strict=True)
    )
    return Merged(merged, groups, equations, tuple(chain.shape_of(labels) for labels in stored))


def _product_term(chain: Chain, start: int, end: int) -> str:
    """Labels of the product of neighbouring factors.

    They are in the order of output and input, so that one factor for all of the chain is the dense matrix as it stands.
    """
    steps = chain.factor_steps[start:end]
    labels = "".join(step.labels for step in steps)
    inner = set("".join(step.emitted for step in steps)) & set("".join(step.contracted for step in steps))
    ordered = dict.fromkeys(chain.terms[-1] + chain.terms[0] + labels)
    return "".join(label for label in ordered if label in labels and label not in inner)


@cache
def plans(chain: Chain, machine: Machine) -> tuple[tuple[int, Merged], ...]:
    """From how many tokens on which factors are best multiplied in advance; the first entry holds from 0.

    The estimate of a product is its MACs, slower where a side of the factor is short, and ``move`` for every number
    that it writes.  Between none and all, the cheapest groups are found for every power of two of tokens.
    """
    each: Groups = tuple((k, k + 1) for k in range(len(chain.factors)))
    costs = _costs(chain, machine)
    found = [(0, each)]
    for tokens in (0, *(2**power for power in range(25))):
        price = {group: once + tokens * per_token for group, (once, per_token) in costs.items()}
        best = _cheapest(len(each), price)
        if sum(price[g] for g in best) > GAIN * sum(price[g] for g in each):
            best = each
        if best != found[-1][1]:
            found = [*(entry for entry in found if entry[0] < tokens), (tokens, best)]
    return tuple((tokens, merge(chain, groups)) for tokens, groups in found)


def speed_up(chain: Chain, machine: Machine, tokens: int) -> float:
    """The estimated time of the dense product over that of the chain, merged as is best for so many tokens.

    From sizes alone.  Over the 48 forward cases of docs/assets/speed/bench.json, prediction over measurement was 0.98
    in the median and 0.56 to 1.33 from the tenth to the ninetieth percentile; a test computes it again.

    Example:
        >>> from structops import structure
        >>> round(speed_up(structure("btt(blocks=8, params=0.25)").chain(4096, 4096), CPU, 2048), 1)
        3.6
    """
    merged = next(merged for least, merged in reversed(plans(chain, machine)) if tokens >= least)
    dense = Chain("j, ij -> i", {"i": chain.out_features, "j": chain.in_features})

    def estimate(chain: Chain, groups: Groups) -> float:
        costs = _costs(chain, machine)
        return sum(once + tokens * per_token for once, per_token in (costs[group] for group in groups))

    return estimate(dense, ((0, 1),)) / estimate(chain, merged.groups)


def _costs(chain: Chain, machine: Machine) -> dict[tuple[int, int], tuple[float, float]]:
    """MACs of every group of factors: once, to multiply them together, and per token."""
    count, costs = len(chain.factors), {}
    for start in range(count):
        for end in range(start + 1, count + 1):
            rest = [(k, k + 1) for k in range(count)]
            try:
                merged = merge(chain, (*rest[:start], (start, end), *rest[end:]))
            except PatternError:
                break  # a regroup; longer groups have it, too
            f = merged.chain.factors[start]
            slow = 1 + machine.side / f.fan_in + machine.side / f.fan_out
            per_token = slow * f.macs + machine.move * f.blocks * f.fan_out * f.sharing
            products = [
                set(_product_term(chain, start, k)) | set(chain.factor_steps[k].labels) for k in range(start + 1, end)
            ]
            once = sum(chain.size("".join(labels)) for labels in products)
            costs[start, end] = (once * slow + machine.call * (1 + 3 * (end - start - 1)), per_token)
    return costs


def _cheapest(count: int, price: dict[tuple[int, int], float]) -> Groups:
    """The groups that cover all factors at the least price."""
    best: list[tuple[float, Groups]] = [(0.0, ())]
    for end in range(1, count + 1):
        ways = [(best[s][0] + price[s, end], (*best[s][1], (s, end))) for s in range(end) if (s, end) in price]
        best.append(min(ways))
    return best[-1][1]
