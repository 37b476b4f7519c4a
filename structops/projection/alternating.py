"""Alternating least squares: the best value of one factor of a chain while the others stay, one after another.

The matrix is linear in each factor, so every step is a least-squares problem, and the error never grows.  A step solves
for the *correction* of a factor by normal equations ``gram @ correction = descent``; where their matrix is singular the
correction is the shortest one, which leaves alone what the error does not depend on.

In the Frobenius norm one row of the problem is one value of the labels of input and output that the factor has, and the
unknowns are its bonds alone.  A covariance couples columns: then the input labels of a factor are unknowns, too.  If
that makes more than ``JOINT`` of them, the values of the input labels that other factors have as well take turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product as tuples

import numpy as np

from structops import _array
from structops._array import Array
from structops.errors import StructureError
from structops.projection.solving import positive_inverse
from structops.projection.target import Factors, Target, column_labels, contract, ordered, passing_labels, primed

JOINT = 1024  # unknowns that are solved for together
MOST = 8192
Operands = list[tuple[str, Array]]
TOLERANCE = 1e-5  # of the error that a sweep must take away for another to follow


def refined(target: Target, factors: Sequence[Array], sweeps: int) -> Factors:
    """Factors after some sweeps over all of them, or fewer where a sweep no longer helps.

    After each sweep all factors go on in the direction in which they went, further if that helped the last time, and
    come back if it did not.  That saves more than half of the sweeps.
    """
    factors, stride, left = list(factors), 1.0, target.loss(factors)
    for _ in range(sweeps):
        start, before = list(factors), left
        for k in range(len(factors)):
            factors[k] = improved(target, factors, k)
        left = target.loss(factors)
        if has_converged(before, left, target.total):
            break
        if len(factors) > 1 and _array.is_concrete(left):
            further = [new + stride * (new - old) for new, old in zip(factors, start, strict=True)]
            reached = target.loss(further)
            helped = bool(reached < left)
            factors, left = (further, reached) if helped else (factors, left)
            stride = 1.5 * stride if helped else max(stride / 3, 0.5)
    return factors


def random(target: Target, seed: int) -> Factors:
    """Gaussian factors, the same in every library, that map unit vectors to vectors of about unit norm."""
    rng, xp, like = np.random.default_rng(seed), _array.namespace(target.tensor), target.tensor
    drawn = [rng.standard_normal(f.shape) / math.sqrt(f.fan_in) for f in target.chain.factors]
    return [xp.asarray(values, dtype=like.dtype, device=like.device) for values in drawn]


def has_converged(before: Array, after: Array, total: Array) -> bool:
    """Whether a sweep that took the squared error from ``before`` to ``after`` was the last that helps."""
    eps = float(_array.namespace(after).finfo(after.dtype).eps)
    return _array.is_concrete(after) and bool(before - after <= TOLERANCE * after + eps * total)


def improved(target: Target, factors: Sequence[Array], k: int) -> Array:
    """Factor k, corrected."""
    problem, name = _Problem(target, factors, k), target.names[k]
    step = target.descent(factors)
    if not problem.turns:
        return factors[k] + ordered(problem.correction(step, {}), problem.axes, name)
    changes = []
    for values in problem.values():
        change = problem.correction(step, values)
        step = step - problem.consequence(change, values)
        changes.append(change)
    stacked = _array.namespace(step).stack(changes)
    stacked = stacked.reshape((*target.chain.shape_of(problem.turns), *changes[0].shape))
    return factors[k] + ordered(stacked, problem.turns + problem.axes, name)


class _Problem:
    """The least-squares problem of one factor.

    Attributes:
        free: Its labels of the output, and in the Frobenius norm of the input: rows that do not meet.
        unknown: Its other labels but for those that take turns.
        turns: Input labels whose values take turns.
    """

    def __init__(self, target: Target, factors: Sequence[Array], k: int) -> None:
        self.target, name, chain = target, target.names[k], target.chain
        # Never multiplied out: bonds that all factors share would make more of them than the matrix has entries.
        self.rest = [(n, f) for i, (n, f) in enumerate(zip(target.names, factors, strict=True)) if i != k]
        around = "".join(dict.fromkeys("".join(n for n, _ in self.rest)))
        self.around = "".join(n for n in around if n in target.labels or n in name)
        self.hidden = "".join(n for n in around if n not in self.around)
        inputs = "".join(n for n in name if n in target.labels and n not in chain.terms[-1])
        inner = "".join(n for n in name if n not in target.labels)
        self.passing, self.turns = passing_labels(chain), ""
        if target.covariance is None:
            self.free, self.unknown = "".join(n for n in name if n in target.labels), inner
            alone = [n for n in target.labels if n not in name + self.around]
            self.times = chain.size("".join(alone))
            return
        self.free, self.unknown = "".join(n for n in name if n in chain.terms[-1]), inputs + inner
        self.columns = column_labels(chain)
        shared = "".join(n for n in inputs if n in self.around)
        # Without input labels of its own around a value of the shared ones, the problem splits in two small ones.
        splits = all(n in shared for n in self.columns if n in self.around) and all(n in name for n in self.passing)
        self.splits = splits and bool(inputs)
        if chain.size(self.unknown) > JOINT or (self.splits and shared):
            self.turns = shared
            self.unknown = "".join(n for n in self.unknown if n not in shared)
        self.own = "".join(n for n in self.unknown if n in inputs)
        if not self.splits and chain.size(self.unknown) > MOST:
            raise StructureError(
                f"{chain}: with a covariance, factor {name} has {chain.size(self.unknown)} unknowns that depend on "
                f"each other, more than {MOST}; use more or smaller cores, or project without a covariance"
            )

    @property
    def axes(self) -> str:
        """The axes of a correction."""
        return self.free + self.unknown

    def values(self) -> Iterator[dict[str, int]]:
        """All values of the labels that take turns."""
        for indices in tuples(*(range(n) for n in self.target.chain.shape_of(self.turns))):
            yield dict(zip(self.turns, indices, strict=True))

    def correction(self, step: Array, values: Mapping[str, int]) -> Array:
        """The change of the factor at these values of the labels that take turns."""
        rest = [_at(*pair, values) for pair in self.rest]
        right = contract([*_conjugate(rest), _at(self.target.labels, step, values)], self.axes)
        size = self.target.chain.size
        if self.target.covariance is not None and self.splits:
            return self._split(rest, right, values)
        same, gram = self._gram(rest, values)
        order = same + "".join(n for n in self.free if n not in same) + self.unknown
        moved = ordered(right, self.axes, order)
        flat = moved.reshape((size(same), -1, size(self.unknown)))
        solved = flat @ positive_inverse(gram.reshape((size(same), *(size(self.unknown),) * 2))).mT
        return ordered(solved.reshape(moved.shape), order, self.axes)

    def _gram(self, rest: Operands, values: Mapping[str, int]) -> tuple[str, Array]:
        """The matrix of the normal equations and the free labels that it depends on; its axes: those, rows, columns."""
        covariance = self.target.covariance
        if covariance is None:
            free = "".join(n for n in self.free if n in self.around)
            both = [*_conjugate(rest), *_second(rest, self.unknown + self.hidden)] or self._unit()
            return free, self.times * contract(both, free + self.unknown + primed(self.unknown))
        twice = {primed(n): value for n, value in values.items()} | dict(values)
        spread = _at(self.passing + primed(self.columns) + self.columns, covariance, twice)
        free = "".join(n for n in self.free if n in self.around + self.passing)
        all_three = [*_conjugate(rest), spread, *_second(rest, self.unknown + self.columns + self.hidden)]
        return free, contract(all_three, free + self.unknown + primed(self.unknown))

    def _unit(self) -> Operands:
        return [("", _array.ones((), self.target.tensor))]

    def _split(self, rest: Operands, right: Array, values: Mapping[str, int]) -> Array:
        """Where the matrix is a Kronecker product, of the bonds' and of the covariance of the factor's own inputs."""
        size = self.target.chain.size
        inner = "".join(n for n in self.unknown if n not in self.own)
        free = "".join(n for n in self.free if n in self.around)
        both = [*_conjugate(rest), *_second(rest, inner + self.hidden)] or self._unit()
        gram = contract(both, free + inner + primed(inner))
        bonds = positive_inverse(gram.reshape((size(free), *(size(inner),) * 2)))
        bonds = bonds.reshape(self.target.chain.shape_of(free + inner + inner))
        twice = {primed(n): value for n, value in values.items()} | dict(values)
        names, spread = _at(self.passing + self.columns + primed(self.columns), self.target.covariance, twice)
        inputs = positive_inverse(spread.reshape((size(self.passing), *(size(self.own),) * 2))).reshape(spread.shape)
        back = self.free + primed(self.own) + primed(inner)
        solved = contract(
            [(free + primed(inner) + inner, bonds), (names, inputs), (self.free + self.own + inner, right)], back
        )
        return ordered(solved, self.free + self.own + inner, self.axes)

    def consequence(self, change: Array, values: Mapping[str, int]) -> Array:
        """What the descent loses when the factor changes at these values of the labels that take turns."""
        target = self.target
        spread = target.covariance
        labels = "".join(n for n in target.labels if n not in values)
        moved = contract([(self.axes, change), *(_at(*pair, values) for pair in self.rest)], labels)
        names, local = _at(self.passing + self.columns + primed(self.columns), spread, values)
        lost = contract([(labels, moved), (names, local)], target.chain.terms[-1] + primed(self.columns))
        return lost if target.weight is None else lost * target.weight


def _conjugate(operands: Operands) -> Operands:
    return [(labels, _array.namespace(array).conj(array)) for labels, array in operands]


def _second(operands: Operands, apart: str) -> Operands:
    """The same arrays again, with labels of their own in place of some."""
    return [("".join(primed(n) if n in apart else n for n in labels), array) for labels, array in operands]


def _at(labels: str, array: Array, values: Mapping[str, int]) -> tuple[str, Array]:
    """An array at fixed values of some labels, and the labels that are left."""
    index = tuple(values.get(label, slice(None)) for label in labels)
    return "".join(label for label in labels if label not in values), array[index]
