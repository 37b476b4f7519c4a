"""What tensor-train and block tensor-train share: cores, modes and ranks, and the spec that chooses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from structops import modes as factorising
from structops._array import Array
from structops.algebra.rounding import HasRank
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.errors import ShapeError, StructureError
from structops.operator import check_arrays
from structops.spec import (
    Structure,
    check_budget,
    check_count,
    check_sizes,
    largest_within,
    warn_capped_rank,
    warn_wasteful_rank,
)

Ranks = tuple[int, ...]
Modes = tuple[int, ...]


@cache
def train_chain(
    kind: str, out_modes: Modes, in_modes: Modes, ranks: Ranks, in_features: int = 0, out_features: int = 0
) -> Chain:
    """The chain of ``tt`` or ``btt`` cores; ``ranks`` are the inner ones, one fewer than there are modes.

    The true sizes, where the modes pad them, come last.

    Core t has the axes (rank before, output modes, input modes, rank after): of the modes, tensor-train gives it only
    the t-th of either side, block tensor-train also those that are in the state when it is applied.  Modes are labelled
    from a on, ranks from s on.
    """
    count = len(out_modes)
    modes, bonds = _labels("abcdefghijklmnopqr", 0x100, 2 * count), _labels("stuvwxyz", 0x180, count - 1)
    outputs, inputs = modes[:count], modes[count:]
    terms = []
    for t in range(count):
        left, right = bonds[t - 1] if t else "", bonds[t] if t < count - 1 else ""
        if kind == "tt":
            terms.append(left + outputs[t] + inputs[t] + right)
        else:
            terms.append(left + outputs[t:] + inputs[: t + 1] + right)
    sizes = dict(zip(outputs + inputs + bonds, (*out_modes, *in_modes, *ranks), strict=True))
    return Chain(", ".join([inputs, *reversed(terms)]) + " -> " + outputs, sizes, in_features, out_features)


def _labels(letters: str, further: int, count: int) -> str:
    """The first letters, and where they do not suffice those from a code point on."""
    return letters[:count] + "".join(chr(further + i) for i in range(count - len(letters)))


class TrainOperator(HasRank, ChainOperator):
    """Base of TT and BTT: cores in textbook order, the last applied first."""

    kind: str
    axes: str  # of a core, for messages

    def __init__(
        self, cores: Sequence[Array], *, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        name = type(self).__name__
        cores = tuple(cores)
        check_arrays(name, cores)
        out_modes, in_modes, ranks = self._sizes([tuple(core.shape) for core in cores])
        for what, true, modes in (("in_features", in_features, in_modes), ("out_features", out_features, out_modes)):
            if true is not None and not 1 <= true <= math.prod(modes):
                raise ShapeError(
                    f"{name}: {what} must lie between 1 and the {math.prod(modes)} of the modes {modes}, got {true}"
                )
        chain = train_chain(self.kind, out_modes, in_modes, ranks, in_features or 0, out_features or 0)
        self._set(chain, cores[::-1])

    @classmethod
    def _sizes(cls, shapes: list[tuple[int, ...]]) -> tuple[Modes, Modes, Ranks]:
        """Modes and ranks from the shapes of the cores.

        Raises:
            ShapeError: The cores do not fit together.
        """
        name, count = cls.__name__, len(shapes)
        expected_axes = 4 if cls.kind == "tt" else count + 3
        for t, shape in enumerate(shapes, start=1):
            if len(shape) != expected_axes:
                raise ShapeError(
                    f"{name}: core {t} of {count} must have the {expected_axes} axes {cls.axes}, got shape {shape}"
                )
        if cls.kind == "tt":
            out_modes = tuple(shape[1] for shape in shapes)
            in_modes = tuple(shape[2] for shape in shapes)
        else:
            out_modes, in_modes = shapes[0][1:-2], shapes[-1][2:-1]
        ranks = tuple(shape[-1] for shape in shapes[:-1])
        expected = list(cls.textbook_shapes(train_chain(cls.kind, out_modes, in_modes, ranks))[::-1])
        if shapes != expected:
            raise ShapeError(f"{name}: the cores {cls.axes} must chain, expected shapes {expected}, got {shapes}")
        return out_modes, in_modes, ranks

    @classmethod
    def textbook_shapes(cls, chain: Chain) -> tuple[tuple[int, ...], ...]:
        """The labels' sizes with the outer ranks of 1 put back."""
        first, *rest = (factor.shape for factor in chain.factors)
        shapes = [(*first, 1), *rest]
        shapes[-1] = (1, *shapes[-1])
        return tuple(shapes)

    @property
    def is_padded(self) -> bool:
        """Whether the modes hold more than the true sizes."""
        return self.shape != (self.chain.padded_out, self.chain.padded_in)

    @property
    def ranks(self) -> Ranks:
        """The inner ranks in textbook order."""
        return tuple(int(core.shape[-1]) for core in self.textbook[:-1])

    def describe(self) -> str:
        """Modes, ranks and padding."""
        out, inn = (
            "x".join(str(size) for size in self.chain.shape_of(labels))
            for labels in (self.chain.terms[-1], self.chain.terms[0])
        )
        ranks = ", ".join(map(str, self.ranks))
        padded = f", padded to {self.chain.padded_out}x{self.chain.padded_in}" if self.is_padded else ""
        return f"modes {out} by {inn}{', rank ' + ranks if ranks else ''}{padded}"


@dataclass(frozen=True)
class TrainStructure(Structure):
    """Base of the specs ``tt`` and ``btt``.

    Args:
        rank: Inner rank, or a tuple of ``num_cores - 1`` of them; 1 by default.
        num_cores: Number of cores.
        modes: ``"balanced"``, ``"greedy"`` or explicit ``((m...), (n...))``, output first.
        params: In place of the rank, the largest that keeps within this share of the dense parameters.
        pad: Whether sizes without suitable modes are padded to the next that has them, see `padded_size`; explicit
            modes may then multiply to more than the sizes.  Padded parameters are counted.
    """

    rank: int | Ranks | None = None
    num_cores: int = 2
    modes: str | tuple[Modes, Modes] = "balanced"
    params: float | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        check_count(self, "num_cores", self.num_cores)
        check_budget(self, self.params, "rank", self.rank)
        if self.params is not None and self.num_cores == 1:
            raise StructureError(f"{self.name}: num_cores=1 has no rank that params={self.params} could choose")
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        for rank in ranks:
            check_count(self, "rank", rank)
        if isinstance(self.rank, tuple) and len(self.rank) != self.num_cores - 1:
            raise StructureError(
                f"{self.name}: {self.num_cores} cores have {self.num_cores - 1} inner ranks, got rank={self.rank}"
            )
        check_modes(self, self.modes, self.num_cores)
        check_pad(self, self.pad)

    def mode_sizes(self, in_features: int, out_features: int) -> tuple[Modes, Modes]:
        """Output and input modes at this size, most significant first."""
        return resolve_modes(self, self.modes, self.num_cores, in_features, out_features, self.pad)

    def chain(self, in_features: int, out_features: int) -> Chain:
        """One factor a core, the last core first."""
        check_sizes(self, in_features, out_features)
        out_modes, in_modes = self.mode_sizes(in_features, out_features)
        inner = self.num_cores - 1

        def at(ranks: Ranks) -> Chain:
            return train_chain(self.name, out_modes, in_modes, ranks, in_features, out_features)

        if self.params is not None:
            dense = in_features * out_features
            ranks = (largest_within(self, self.params, dense, lambda r: at((r,) * inner).num_params, "rank"),) * inner
        else:
            ranks = self.rank if isinstance(self.rank, tuple) else (self.rank or 1,) * inner
        for t, rank in enumerate(ranks, start=1):
            warn_wasteful_rank(
                self, f"rank {t} of {inner}:" if inner > 1 else "rank", rank, self._useful(out_modes, in_modes, t)
            )
        chain = at(ranks)
        warn_capped_rank(self, chain, "raise the rank, or choose modes")
        return chain

    def _useful(self, out_modes: Modes, in_modes: Modes, t: int) -> int:
        """The rank between core t and t + 1 at which any matrix is representable as far as that bond goes."""
        if self.name == "tt":
            return min(
                math.prod(out_modes[:t]) * math.prod(in_modes[:t]), math.prod(out_modes[t:]) * math.prod(in_modes[t:])
            )
        return min(math.prod(out_modes[:t]), math.prod(in_modes[t:]))


def check_modes(spec: Structure, modes: Any, count: int) -> None:
    """A rule, or explicit output and input modes.

    Raises:
        StructureError: Neither, or not ``count`` modes a side.
    """
    if modes in factorising.RULES:
        return
    explicit = (
        isinstance(modes, tuple)
        and len(modes) == 2
        and all(
            isinstance(side, tuple) and len(side) == count and all(isinstance(m, int) and m > 0 for m in side)
            for side in modes
        )
    )
    if not explicit:
        raise StructureError(
            f"{spec.name}: modes must be one of {', '.join(factorising.RULES)}, or output and input modes "
            f"((m1, ...), (n1, ...)) with {count} each, got {modes!r}"
        )


def check_pad(spec: Structure, pad: Any) -> None:
    """A yes or no.

    Raises:
        StructureError: Anything else.
    """
    if not isinstance(pad, bool):
        raise StructureError(f"{spec.name}: pad must be True or False, got {pad!r}")


@cache
def padded_size(size: int, count: int, rule: Any) -> int:
    """The next size, from ``size`` on, whose largest mode is at most twice its smallest.

    Raises:
        StructureError: The rule is unknown, or the size or the number of modes is below 1.

    Example:
        >>> padded_size(50257, 2, "balanced"), padded_size(7, 2, "balanced"), padded_size(13, 3, "balanced")
        (50264, 8, 16)
    """
    while True:
        found = factorising.modes(size, count, rule)
        if found[0] <= 2 * found[-1]:
            return size
        size += 1


def resolve_modes(
    spec: Structure, modes: Any, count: int, in_features: int, out_features: int, pad: bool = False
) -> tuple[Modes, Modes]:
    """Output and input modes for the sizes of a layer, or with ``pad`` for sizes that hold them.

    Raises:
        StructureError: Explicit modes do not multiply to the sizes, or with ``pad`` to less.
    """
    if isinstance(modes, str):
        rule: Any = modes
        sizes = (padded_size(size, count, rule) if pad else size for size in (out_features, in_features))
        out_modes, in_modes = (factorising.modes(size, count, rule) for size in sizes)
        return out_modes, in_modes
    out_modes, in_modes = modes
    for side, size, what in ((out_modes, out_features, "out_features"), (in_modes, in_features, "in_features")):
        product = math.prod(side)
        if product < size or (product > size and not pad):
            balanced = factorising.modes(size, count)
            hint = "; pad=True would pad it" if product > size else ""
            raise StructureError(
                f"{spec}: the modes {side} multiply to {product}, but {what}={size}; {balanced} would work{hint}"
            )
    return out_modes, in_modes
