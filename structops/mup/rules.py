"""The paper's rule: init and learning rate of every factor, relative to the dense layer that the structure replaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from structops.algebra.counting import factors
from structops.chain import Factor
from structops.mup.families import Number, Rule, numbers

INIT_STD = "sqrt(min(i, o))/i"  # `init_std` in words, with i and o for fan-in and fan-out


def init_std(factor: Factor) -> float:
    r"""Standard deviation of a Gaussian init, \(\sqrt{\min(\text{fan-in}, \text{fan-out})} / \text{fan-in}\).

    It gives every block a spectral norm of the order of \(\sqrt{\text{fan-out} / \text{fan-in}}\) (arXiv 2406.06248,
    section 3).
    """
    return math.sqrt(min(factor.fan_in, factor.fan_out)) / factor.fan_in


def lr_multiplier(
    factor: Factor, in_features: int, out_features: int, count: int, optimizer: str | Rule = "adam"
) -> float:
    r"""Learning rate of a factor relative to that of a dense layer of the same size.

    \(\kappa = \frac{s(\text{factor})}{s(\text{dense})} / k\) with the absolute scale s of the optimiser's family.
    Adam: \(\kappa = (d_{in} / \text{fan-in}) / k\).  SGD: \(\kappa = \frac{\text{fan-out} / \text{fan-in}}{d_{out} /
    d_{in}} / k\).

    Args:
        factor: Sizes of the factor.
        in_features: Input size of the layer.
        out_features: Output size of the layer.
        count: \(k\), the number of learnable dense factors of the layer; the change of the output is a sum of k terms.
        optimizer: A name of `FAMILY`, or a `Rule`.

    Raises:
        StructureError: No rule is known for the optimiser.

    References:
        arXiv 2406.06248, section 3 and table 2; appendix H for SGD, here with the same 1/k.
    """
    rule = as_rule(optimizer)
    return float(rule.scale(factor) / rule.scale(dense_factor(in_features, out_features)) / count)


def as_rule(optimizer: str | Rule) -> Rule:
    """A rule from the name of an optimiser."""
    return optimizer if isinstance(optimizer, Rule) else Rule(optimizer)


def dense_factor(in_features: int, out_features: int) -> Factor:
    """The one block of a dense layer."""
    return Factor("dense", (out_features, in_features), fan_in=in_features, fan_out=out_features)


def init_stds(A: Any, zero_last: bool = False) -> tuple[float, ...]:
    """Standard deviations of all factors in order of application.

    Args:
        A: Anything with factors.
        zero_last: The last factor starts at zero, as at the end of a residual branch or in the readout.  Then a first
            factor that maps the whole input to fewer features (low rank) takes ``1 / sqrt(fan_in)``: with the plain
            rule the gradients of both factors would vanish with width.

    References:
        arXiv 2406.06248, section 3.2 and its exception for low rank.
    """
    first, *rest = factors(A)
    if not zero_last:
        return tuple(map(init_std, (first, *rest)))
    if not rest:
        return (0.0,)
    return (first_std(first, _shape(A)[1]), *map(init_std, rest[:-1]), 0.0)


def first_std(factor: Factor, in_features: int) -> float:
    """Standard deviation of the first of several factors where the last starts at zero; see `init_stds`."""
    return 1 / math.sqrt(factor.fan_in) if factor.fan_in == in_features else init_std(factor)


def width_ratio(base_in: int, layer: Any, optimizer: str | Rule = "adam", base_out: int | None = None) -> float:
    r"""Learning rate of a dense layer relative to the same layer at base width.

    Adam: \(d^0_{in} / d_{in}\).  SGD: \(\frac{d_{out} / d_{in}}{d^0_{out} / d^0_{in}}\), which is 1 where both sides
    grow alike.

    Args:
        base_in: Input size of the layer in the base model.
        layer: Anything with ``in_features`` and ``out_features``.
        optimizer: A name of `FAMILY`, or a `Rule`.
        base_out: Output size of the layer in the base model; both sides grow alike if not given.
    """
    return float(exact_width_ratio(as_rule(optimizer), layer.in_features, layer.out_features, base_in, base_out))


def exact_width_ratio(rule: Rule, n: int, m: int, base_in: int, base_out: int | None) -> Number:
    """`width_ratio` of a layer of n inputs and m outputs, as a fraction where it is one."""
    if base_out is not None:
        return rule.scale(dense_factor(n, m)) / rule.scale(dense_factor(base_in, base_out))
    # Scales are powers of a common factor of both sides, so that sides may be multiplied to be whole numbers.
    return rule.scale(dense_factor(n * n, m * n)) / rule.scale(dense_factor(n * base_in, m * base_in))


@dataclass(frozen=True)
class Scale:
    """Scales of one factor.

    Attributes:
        factor: Its sizes.
        init_std: Standard deviation of its init.
        lr_scale: Learning rate relative to the dense layer that the structure replaces.
        reason: The numbers behind both, in words.
    """

    factor: Factor
    init_std: float
    lr_scale: float
    reason: str


@dataclass(frozen=True)
class Scales(Sequence[Scale]):
    """One `Scale` per factor in order of application; prints as a table."""

    rows: tuple[Scale, ...]
    optimizer: str

    def __getitem__(self, index: Any) -> Any:
        """The scale of a factor."""
        return self.rows[index]

    def __len__(self) -> int:
        """Number of factors."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Scale]:
        """The scales in order of application."""
        return iter(self.rows)

    def __str__(self) -> str:
        """A table with one line a factor."""
        head = ("factor", "blocks", "fan_in", "fan_out", "sharing", "init_std", f"lr ({self.optimizer})", "reason")
        body = [
            (
                row.factor.name,
                str(row.factor.blocks),
                str(row.factor.fan_in),
                str(row.factor.fan_out),
                str(row.factor.sharing),
                f"{row.init_std:.6g}",
                f"{row.lr_scale:.6g}",
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *body)
        )


def scales(A: Any, optimizer: str | Rule = "adam") -> Scales:
    """Init and learning-rate scales of every factor of an operator, a chain or a plan.

    Args:
        A: Anything with a shape and factors.  A padded chain takes its true input size.
        optimizer: A name of `FAMILY` such as ``"adam"``, ``"sgd"`` or ``"muon"``, or a `Rule`.

    Returns:
        One row a factor in order of application, with ``init_std``, ``lr_scale`` and ``reason``.

    Raises:
        StructureError: No rule is known for the optimiser.

    Example:
        >>> from structops import structure
        >>> print(scales(structure("btt").chain(256, 1024)))
        factor  blocks  fan_in  fan_out  sharing  init_std  lr (adam)  reason
        sbcd    16      16      32       1        0.25      8          std = sqrt(min(16, 32))/16; lr = (1/16)/(1/256)/2
        abcs    32      16      32       1        0.25      8          std = sqrt(min(16, 32))/16; lr = (1/16)/(1/256)/2
    """
    parts = factors(A)
    out_features, in_features = _shape(A)
    rows = []
    for factor in parts:
        lr = lr_multiplier(factor, in_features, out_features, len(parts), optimizer)
        rows.append(
            Scale(factor, init_std(factor), lr, _reason(factor, in_features, out_features, len(parts), optimizer))
        )
    return Scales(tuple(rows), as_rule(optimizer).optimizer)


def _shape(A: Any) -> tuple[int, int]:
    if hasattr(A, "in_features"):
        return A.out_features, A.in_features
    return A.shape[0], A.shape[1]


def _reason(factor: Factor, in_features: int, out_features: int, count: int, optimizer: str | Rule) -> str:
    rule, dense = as_rule(optimizer), dense_factor(in_features, out_features)
    ours, theirs = (numbers(rule.formula(f), f) for f in (factor, dense))
    return f"std = {numbers(INIT_STD, factor)}; lr = ({ours})/({theirs})/{count}"
