"""The chain: an index pattern, and everything that is read off it.  Pure Python, no arrays.

A structured matrix is a chain of block-dense factors, written as the labels of the axes::

    input, factor, factor, ... -> output            "cd, sbcd, abcs -> ab"   (block tensor-train, two cores)

Factors are applied in the order in which they are listed.  Seen by one factor, a label is

    ==========  =========================================  ==========================
    contracted  in the state and the factor, gone after    fan_in  = product of sizes
    emitted     in the factor only                         fan_out = product of sizes
    batch       in the state and the factor, still needed  blocks  = product of sizes
    shared      in the state only                          sharing = product of sizes
    ==========  =========================================  ==========================

so the factor is ``blocks`` independent dense ``fan_out x fan_in`` matrices, each used ``sharing`` times per
input vector.  A term ``kq=rl`` is no factor: it re-reads the whole state, flattened row-major as ``kq``, as ``rl``.

Mixed-radix indices are row-major: the first label of the input and of the output is the most significant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import SupportsIndex

from structops.errors import ShapeError
from structops.pattern import Regroup, Step, roles, split_terms
from structops.program import Move, copied_moves, shared_moves, strided_moves


@dataclass(frozen=True)
class Factor:
    """One dense component of a structure, as sizes: what counting and muP need to know about it.

    Attributes:
        name: The labels of its axes, or the name of the array where the structure is not a chain.
        shape: The shape of its parameters in the textbook order of axes.
        fan_in: Inputs that one output of a block sees.
        fan_out: Outputs of one block.
        blocks: Independent blocks.
        sharing: Times that every block is used per input vector.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    blocks: int = 1
    sharing: int = 1

    @property
    def num_params(self) -> int:
        """Number of parameters: the product of the shape (``blocks * fan_out * fan_in`` in a chain)."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per input vector: ``blocks * fan_out * fan_in * sharing``."""
        return self.blocks * self.fan_out * self.fan_in * self.sharing

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """The shape that layers and kernels use: ``(blocks, fan_out, fan_in)``."""
        return self.blocks, self.fan_out, self.fan_in

    @property
    def T(self) -> Factor:
        """The same parameters in the transposed chain: fan-in and fan-out trade places."""
        return Factor(self.name, self.shape, self.fan_out, self.fan_in, self.blocks, self.sharing)


@dataclass(frozen=True, repr=False)
class Chain:
    """An index pattern with sizes; the whole description of a structured matrix but for its numbers.

    ``y[output] = sum over all other labels of x[input] * factor * factor * ...``

    A chain may be *padded*: ``in_features`` and ``out_features`` smaller than the sizes of the labels mean that x is
    padded with zeros and y is cut.  Parameters and MACs count the padded factors.

    Args:
        pattern: ``"input, factor, ..., factor -> output"``, one letter or digit a label, factors in order of
            application; blanks do not count.
        sizes: Size of every label.
        in_features: True input size, by default the product of the sizes of the input labels.
        out_features: True output size, by default the product of the sizes of the output labels.

    Raises:
        PatternError: The pattern is no chain; the message names the label and the term.
        ShapeError: A size is missing or no positive whole number, a regroup changes the number of entries, or a true
            size exceeds the padded one.

    Example:
        >>> chain = Chain("cd, sbcd, abcs -> ab", dict(a=4, b=3, c=2, d=5, s=1))
        >>> chain
        Chain('cd, sbcd, abcs -> ab', a=4, b=3, c=2, d=5, s=1)
        >>> chain.in_features, chain.out_features, chain.num_params, chain.macs
        (10, 12, 54, 54)
        >>> chain.transpose()
        Chain('ab, abcs, sbcd -> cd', a=4, b=3, c=2, d=5, s=1)

    References:
        Qiu et al., "Compute Better Spent" (arXiv 2406.06248), section 2, writes each structure this way; the family of
        all two-factor patterns is that of Potapczynski et al. (arXiv 2410.02117).
    """

    pattern: str
    sizes: Mapping[str, int] | tuple[tuple[str, int], ...]
    in_features: int = 0
    out_features: int = 0
    # Derived once, as plain attributes: a forward pass that is being compiled only looks them up.
    terms: tuple[str, ...] = field(init=False, repr=False, compare=False)
    steps: tuple[Step | Regroup, ...] = field(init=False, repr=False, compare=False)
    factor_steps: tuple[Step, ...] = field(init=False, repr=False, compare=False)
    factors: tuple[Factor, ...] = field(init=False, repr=False, compare=False)
    moves: tuple[Move, ...] = field(init=False, repr=False, compare=False)
    strided_moves: tuple[Move, ...] = field(init=False, repr=False, compare=False)
    padded_in: int = field(init=False, repr=False, compare=False)
    padded_out: int = field(init=False, repr=False, compare=False)
    _size: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the pattern, then derive the roles, the factors and the moves."""
        put = object.__setattr__
        terms, output = split_terms(self.pattern)
        put(self, "pattern", ", ".join(terms) + " -> " + output)
        put(self, "terms", (*terms, output))
        given = dict(self.sizes)
        used = sorted(set("".join(self.terms)) - {"="})
        if missing := [label for label in used if label not in given]:
            raise ShapeError(f"{self.pattern!r}: no size for label(s) {', '.join(missing)}; sizes has {given}")
        if bad := {label: given[label] for label in used if not _is_size(given[label])}:
            raise ShapeError(f"{self.pattern!r}: every size must be a whole number of at least 1, got {bad}")
        put(self, "_size", {label: int(given[label]) for label in used})
        put(self, "sizes", tuple(self._size.items()))
        put(self, "steps", tuple(roles(terms, output, self.pattern)))
        for step in self.steps:
            if isinstance(step, Regroup) and self.size(step.before) != self.size(step.after):
                raise ShapeError(
                    f"{self.pattern!r}: {step.before} has {self.size(step.before)} entries and "
                    f"{step.after} has {self.size(step.after)}; a regroup must keep their number"
                )
        put(self, "padded_in", self.size(terms[0]))
        put(self, "padded_out", self.size(output))
        for name, padded in (("in_features", self.padded_in), ("out_features", self.padded_out)):
            true = getattr(self, name) or padded
            if not 1 <= true <= padded:
                raise ShapeError(f"{self.pattern!r}: {name}={true}, but its labels hold {padded} entries")
            put(self, name, true)
        put(self, "factor_steps", tuple(step for step in self.steps if isinstance(step, Step)))
        put(self, "factors", tuple(self._factor(step) for step in self.factor_steps))
        put(self, "strided_moves", tuple(strided_moves(terms[0], self.steps, output, self._size)))
        put(self, "moves", shared_moves(terms[0], self.steps, output, self._size) or self.strided_moves)

    # ------------------------------------------------------------------------------------------------ labels and sizes

    def size(self, labels: str) -> int:
        """Product of the sizes of ``labels``."""
        return math.prod(self._size[label] for label in labels)

    def shape_of(self, labels: str) -> tuple[int, ...]:
        """Sizes of ``labels``, one by one."""
        return tuple(self._size[label] for label in labels)

    def _factor(self, step: Step) -> Factor:
        """The sizes behind the roles of a step."""
        return Factor(
            name=step.labels,
            shape=self.shape_of(step.labels),
            fan_in=self.size(step.contracted),
            fan_out=self.size(step.emitted),
            blocks=self.size(step.batch),
            sharing=self.size(step.shared),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``, the shape of the matrix."""
        return self.out_features, self.in_features

    # --------------------------------------------------------------------------------------------------------- numbers

    @property
    def num_params(self) -> int:
        """Parameters of all factors."""
        return sum(factor.num_params for factor in self.factors)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per input vector; the paper calls them FLOPs."""
        return sum(factor.macs for factor in self.factors)

    @property
    def flops(self) -> int:
        """Floating-point operations per input vector: two per multiply-accumulate."""
        return 2 * self.macs

    @property
    def xi(self) -> float:
        """Compute per dimension: MACs per input feature (paper, section 5)."""
        return self.macs / self.in_features

    @property
    def stored_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shape of every factor as layers keep it, ``(blocks, fan_out, fan_in)``."""
        return tuple(factor.stored_shape for factor in self.factors)

    @property
    def intermediate_widths(self) -> tuple[int, ...]:
        """Numbers per token between one factor and the next; one fewer than there are factors."""
        return tuple(f.blocks * f.fan_out * f.sharing for f in self.factors[:-1])

    @property
    def saved_activations(self) -> int:
        """Numbers per token that the backward pass needs: the input of every factor, with its padding."""
        return self.padded_in + sum(self.intermediate_widths)

    @cached_property
    def rank_bound(self) -> int:
        """Upper bound of the matrix rank: the smallest cut between input and output.

        Generic factors nearly always reach it.  Where factors are shared they can fall short by a little: two Kronecker
        products of 3x5 and 5x3 matrices add up to rank 14 of 15.

        A cut puts every factor on the side of the input or of the output; the matrix factors through the labels that
        occur on both sides.  A regroup is a cut that nothing crosses, so the parts before and after count alone.
        """
        return min(self.in_features, self.out_features, *map(self._smallest_cut, self._parts()))

    def _smallest_cut(self, part: list[str]) -> int:
        """The smallest product of the labels on both sides of a cut.

        The factors take sides one after the other.  Cuts go on alike where the labels that later factors have are on
        the same sides, so only the cheapest of them is kept: a few cuts in place of ``2**num_factors``.
        """
        first, *factors, last = part
        cuts = {(frozenset(first), frozenset(last)): 1}
        for position, term in enumerate([*factors, ""]):  # the empty term: labels that no factor has
            later = frozenset("".join(factors[position + 1 :]))
            extended: dict[tuple[frozenset[str], frozenset[str]], int] = {}
            for (near, far), product in cuts.items():
                for n, f in ((near.union(term), far), (near, far.union(term))):
                    cost = product * self.size("".join((n & f) - later))
                    key = (n & later, f & later)
                    extended[key] = min(cost, extended.get(key, cost))
            cuts = extended
        return min(cuts.values())

    def _parts(self) -> Iterator[list[str]]:
        """The terms, cut at every regroup."""
        part: list[str] = []
        for term in self.terms:
            if "=" in term:
                before, _, after = term.partition("=")
                yield [*part, before]
                part = [after]
            else:
                part.append(term)
        yield part

    @property
    def _width_log(self) -> float:
        """Log of the geometric mean width, the base of the exponents; 1 for the 1 x 1 matrix, where it is arbitrary."""
        return math.log(self.in_features * self.out_features) / 2 or 1.0

    @property
    def nu(self) -> float:
        """Compute intensity: MACs of the dominant factor = width^(1 + nu); 1 for dense (arXiv 2410.02117)."""
        return math.log(max(f.macs for f in self.factors)) / self._width_log - 1

    @property
    def omega(self) -> float:
        """Parameter sharing: MACs / parameters of the dominant factors = width^omega; 0 is none (arXiv 2410.02117)."""
        macs = max(f.macs for f in self.factors)
        return math.log(macs / max(f.num_params for f in self.factors)) / self._width_log

    @property
    def psi(self) -> float:
        """Rank exponent: rank = min(shape)^psi; 1 is full rank (arXiv 2410.02117)."""
        full = min(self.in_features, self.out_features)
        return math.log(self.rank_bound) / math.log(full) if full > 1 else 1.0

    # ------------------------------------------------------------------------------------------------------- transpose

    def transpose(self) -> Chain:
        """The chain of the transposed matrix: the terms in reverse order, the same factors with the same axes."""
        terms = ["=".join(reversed(term.split("="))) for term in reversed(self.terms)]
        pattern = ", ".join(terms[:-1]) + " -> " + terms[-1]
        return Chain(pattern, self.sizes, self.out_features, self.in_features)

    @property
    def T(self) -> Chain:
        """The chain of the transposed matrix."""
        return self.transpose()

    @cached_property
    def xla_moves(self) -> tuple[Move, ...]:
        """The moves for XLA.

        It copies states between factors in any layout, and multiplies a quarter more slowly where the tokens are last;
        but then it copies runs of tokens, five times as fast.  That pays where states are wide (measured on a CPU, see
        docs/speed.md); never with shared factors, which need no batch of products.
        """
        wide = max(self.intermediate_widths, default=0) >= 2 * max(self.padded_in, self.padded_out)
        batched = all(f.blocks > 1 and f.sharing == 1 for f in self.factors)
        return tuple(copied_moves(self.terms[0], self.steps, self.terms[-1], self._size, wide and batched))

    def __repr__(self) -> str:
        """The pattern, the sizes and, where padded, the true shape."""
        sizes = ", ".join(f"{label}={size}" for label, size in self._size.items())
        padded = self.shape != (self.padded_out, self.padded_in)
        true = f", padded from {self.out_features}x{self.in_features}" if padded else ""
        return f"Chain({self.pattern!r}, {sizes}{true})"


def _is_size(size: object) -> bool:
    return isinstance(size, SupportsIndex) and index(size) >= 1
