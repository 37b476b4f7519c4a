"""Any chain, written as its pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from structops._array import Array
from structops.algebra.rounding import HasRank
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.einsum_family import POINTS, Theta, check_order
from structops.errors import ShapeError, StructureError
from structops.operator import check_arrays
from structops.spec import Structure, check_sizes, register

THETA = "abgdefr"  # alpha, beta, gamma, delta, epsilon, phi, rho of the follow-up paper
FIRST_A = "gba, fdrga, ferbg -> fed"
FIRST_B = "gba, ferbg, fdrga -> fed"
MOST_PADDING = 1.15  # as the authors: rounding the sizes may add 15 %


def infer_chain(pattern: str, shapes: Sequence[tuple[int, ...]], sizes: Mapping[str, int] | None = None) -> Chain:
    """The chain of a pattern with the sizes that the factors' shapes give.

    Raises:
        ShapeError: The number of factors, of axes, or two sizes of one label disagree.
    """
    known = dict(sizes or {})
    names = [term for term in pattern.replace(" ", "").partition("->")[0].split(",")[1:] if "=" not in term]
    if len(names) != len(shapes):
        raise ShapeError(f"Einsum: {pattern!r} has {len(names)} factors, got {len(shapes)} arrays")
    for name, shape in zip(names, shapes, strict=True):
        if len(name) != len(shape):
            raise ShapeError(f"Einsum: factor {name!r} of {pattern!r} has {len(name)} axes, got shape {shape}")
        for label, size in zip(name, shape, strict=True):
            if known.setdefault(label, size) != size:
                raise ShapeError(
                    f"Einsum: {pattern!r}: label {label!r} is {known[label]} elsewhere and {size} in {name!r}"
                )
    return Chain(pattern, known)


class Einsum(HasRank, ChainOperator):
    r"""The matrix of any chain.

    **Definition.** \(y_{\mathrm{output}} = \sum x_{\mathrm{input}} \prod_k F_k\) over all labels that the output lacks;
    the pattern lists the input, the factors in order of application, and the output.

    Args:
        factors: One array a factor, in the order of the pattern, its axes in the order of the factor's labels.
        pattern: Such as ``"cd, sbcd, abcs -> ab"``; see `structops.Chain`.
        sizes: Sizes of labels that no factor has (a mode that passes through).

    Raises:
        PatternError: The pattern is no chain.
        ShapeError: The arrays do not fit the pattern.
        BackendError: No torch or JAX arrays, or a mixture.

    **Shapes.** ``A @ X``: (in,) or (in, k); ``X @ A``: (..., out).

    **Cost.** ``A.chain.num_params`` parameters, ``A.chain.macs`` MACs per vector, in the order that the pattern gives.

    **Numerics.** One (batched) matrix product a factor in the dtype of the inputs.

    **References.** Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured
    Matrices" (arXiv 2410.02117); "Compute Better Spent" (arXiv 2406.06248).

    Example:
        >>> import torch
        >>> Einsum([torch.ones(3, 5), torch.ones(4, 2)], "cd, bd, ac -> ab")
        Einsum(12x10; cd, bd, ac -> ab; factors 3x5, 4x2; 23 params, 0.192 of dense; torch.float32)
    """

    def __init__(self, factors: Sequence[Array], pattern: str, sizes: Mapping[str, int] | None = None) -> None:
        check_arrays("Einsum", list(factors))
        self._set(infer_chain(pattern, [tuple(factor.shape) for factor in factors], sizes), list(factors))

    @property
    def pattern(self) -> str:
        """The pattern in canonical form."""
        return self.chain.pattern

    def describe(self) -> str:
        """The pattern and the shape of every factor."""
        return f"{self.chain.pattern}; {super().describe()}"

    @staticmethod
    def from_theta(
        theta: Theta | Sequence[float], in_features: int, out_features: int, order: str = "cheapest"
    ) -> Chain:
        """The chain of a point of the follow-up paper's two-factor family.

        Args:
            theta: A `Theta`, or its exponents (alpha, beta, gamma, delta, epsilon, phi, rho): the first three share
                ``in_features``, the next three ``out_features``, and rho is that of the rank, ``min(in, out) ** rho``.
            in_features: Size of the input.
            out_features: Size of the output.
            order: ``"cheapest"`` (fewer MACs; A if equal), ``"a"`` or ``"b"``: which factor is applied first.

        Returns:
            A chain, padded where the rounded sizes exceed the true ones; its pattern says which order was taken.

        Raises:
            StructureError: Not seven exponents in [0, 1], or three that do not sum to 1, or padding above 15 %.
        """
        theta = Theta.of(theta)
        check_order(order)
        inputs = _split_size(in_features, theta.inputs)
        outputs = _split_size(out_features, theta.outputs)
        rank = max(1, round(min(in_features, out_features) ** theta.rho))
        sizes = dict(zip(THETA, (*inputs, *outputs, rank), strict=True))
        for what, true, padded in (("in", in_features, math.prod(inputs)), ("out", out_features, math.prod(outputs))):
            if padded > MOST_PADDING * true:
                part = theta.inputs if what == "in" else theta.outputs
                near = [next(n for n in sizes if _fits(n, part)) for sizes in (range(true, 0, -1), count(true))]
                raise StructureError(
                    f"theta={tuple(theta)} pads {what}_features={true} to {padded}, more than 15 %; "
                    f"nearest sizes that work: {near[0]}, {near[1]}"
                )
        a_first, b_first = (Chain(pattern, sizes, in_features, out_features) for pattern in (FIRST_A, FIRST_B))
        if order == "cheapest":
            return a_first if a_first.macs <= b_first.macs else b_first
        return a_first if order == "a" else b_first


def _fits(size: int, exponents: Sequence[float]) -> bool:
    return math.prod(_split_size(size, exponents)) <= MOST_PADDING * size


def _split_size(size: int, exponents: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers near ``size ** exponent`` with the smallest product that is at least ``size``."""
    exact = [size**exponent for exponent in exponents]
    parts = [max(1, round(value)) for value in exact]
    while math.prod(parts) < size:
        # Grow the part that the rounding cut most.
        grow = max(range(len(parts)), key=lambda i: (exponents[i] > 0, exact[i] / parts[i]))
        parts[grow] += 1
    return tuple(parts)


@register
@dataclass(frozen=True)
class EinsumStructure(Structure):
    """``einsum(theta=(...))``, or ``einsum(pattern=..., sizes=...)`` for one size.

    Args:
        theta: A point of the two-factor family, a `Theta` or its exponents; see `Einsum.from_theta`.
        pattern: A pattern, with ``sizes`` of all its labels.
        sizes: Sizes of the labels of ``pattern``, a mapping or pairs.
        order: Which factor of the family is applied first.
    """

    name = "einsum"
    theta: tuple[float, ...] | Theta | None = None
    pattern: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    order: str = "cheapest"

    def __post_init__(self) -> None:
        """At most one of theta and pattern, and that a point or a chain; without either, the BTT point.

        Raises:
            StructureError: Both are given, or theta is no point of the family.
            PatternError: The pattern is no chain.
            ShapeError: A size of the pattern is missing or wrong.
        """
        if isinstance(self.theta, Theta):
            object.__setattr__(self, "theta", tuple(self.theta))  # numbers print, and go to JSON
        if self.theta is not None and self.pattern is not None:
            raise StructureError("einsum: give either theta or pattern, not both")
        if not isinstance(self.theta, tuple | None) or not isinstance(self.pattern, str | None):
            raise StructureError(
                f"einsum: theta is a tuple of 7 exponents and pattern a string such as 'cd, bd, ac -> ab', "
                f"got theta={self.theta!r} and pattern={self.pattern!r}"
            )
        if not isinstance(self.sizes, tuple) or not all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in self.sizes
        ):
            raise StructureError(f"einsum: sizes is a mapping of labels to sizes, or pairs, got {self.sizes!r}")
        Theta.of(self.theta or POINTS["btt"])
        check_order(self.order)
        if self.pattern is not None:
            Chain(self.pattern, dict(self.sizes))

    def chain(self, in_features: int, out_features: int) -> Chain:
        """The chain of the point or of the pattern.

        Raises:
            StructureError: The pattern has other sizes.
        """
        check_sizes(self, in_features, out_features)
        if self.pattern is None:
            return Einsum.from_theta(self.theta or POINTS["btt"], in_features, out_features, self.order)
        chain = Chain(self.pattern, dict(self.sizes))
        if chain.shape != (out_features, in_features):
            raise StructureError(
                f"{self}: the pattern is {chain.out_features}x{chain.in_features}, "
                f"the layer {out_features}x{in_features}"
            )
        return chain

    build = staticmethod(Einsum.from_factors)
