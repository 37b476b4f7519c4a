"""Optimiser families: how far one update moves a block, and so which learning rate each block needs.

A block of fan-in i and fan-out o should change by a spectral norm of the order of sqrt(o/i).  Dividing that by the norm
of the optimiser's update for a gradient of rank one gives the absolute scale s of its learning rate.  The scales of a
structured and of a dense layer, compared, give every multiplier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from structops.chain import Factor
from structops.errors import StructureError

Number = Fraction | float  # ratios of whole numbers stay exact


@dataclass(frozen=True)
class Family:
    """What all optimisers of a kind have in common.

    Attributes:
        name: Its name, which is also a valid ``optimizer``.
        formula: The absolute scale in words, with i, o and b for fan-in, fan-out and blocks.
        scale: The absolute scale of a factor's learning rate.
        shared: The power of the sharing by which incoherent copies shrink the change, relative to the formula.
        matrices_only: Whether it updates matrices alone, so that embeddings, readout and vectors go to Adam.
        relative: Whether updates are relative to the parameter's size, so that a factor of zeros never moves.
    """

    name: str
    formula: str
    scale: Callable[[Factor], Number]
    shared: float = 0.0
    matrices_only: bool = False
    relative: bool = False


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("adam", "1/i", lambda f: Fraction(1, f.fan_in), shared=0.5),
        Family("sgd", "o/i", lambda f: Fraction(f.fan_out, f.fan_in), shared=0.5),
        Family("muon", "sqrt(min(1, o/i))", lambda f: math.sqrt(min(1.0, f.fan_out / f.fan_in)), matrices_only=True),
        Family(
            "muon_match_rms",
            "sqrt(o/i)/(0.2 sqrt(max(o, i)))",
            lambda f: math.sqrt(f.fan_out / f.fan_in) / (0.2 * math.sqrt(max(f.fan_out, f.fan_in))),
            matrices_only=True,
        ),
        Family("muon_spectral", "1", lambda f: Fraction(1), matrices_only=True),
        Family("muon_unscaled", "sqrt(o/i)", lambda f: math.sqrt(f.fan_out / f.fan_in), matrices_only=True),
        Family(
            "adafactor",
            "max(1, sqrt(i/o))/sqrt(i)",
            lambda f: max(1.0, math.sqrt(f.fan_in / f.fan_out)) / math.sqrt(f.fan_in),
            relative=True,
        ),
    )
}

# Names of optimisers, and the family of each.  An update that does not depend on the gradient's size is Adam's.
FAMILY: dict[str, str] = {
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "radam", "adamax", "adopt"), "adam"),
    **dict.fromkeys(("rmsprop", "adagrad", "rprop", "lion", "signsgd", "sign_sgd"), "adam"),
    **dict.fromkeys(("sgd", "momentum", "nesterov"), "sgd"),
    **dict.fromkeys(("adafactor", "lamb"), "adafactor"),
    **{name: name for name in FAMILIES if name.startswith("muon")},
}

# Optimisers for which no rule is known, and why.
NO_RULE: dict[str, str] = {
    "adadelta": "its update follows no power of fan-in and fan-out",
    "lbfgs": "it searches along a line and has no learning rate of its own",
    "soap": "it lies between sign-like and orthogonalised updates; measure it with probe()",
    "sophia": "its clipping decides between sign-like and plain updates; measure it with probe()",
    "sparseadam": "it skips rows without a gradient, so that the size of an update depends on the data",
    "lars": "it scales whole layers by the norm of their weight; measure it with probe()",
}


def numbers(formula: str, factor: Factor) -> str:
    """A formula in words with the numbers of a factor for i, o and b."""
    sizes = {"i": factor.fan_in, "o": factor.fan_out, "b": factor.blocks}
    return re.sub(r"\b[iob]\b", lambda match: str(sizes[match[0]]), formula)


def family(optimizer: str) -> Family:
    """The family of an optimiser.

    Args:
        optimizer: A name of ``FAMILY``, in any case.

    Raises:
        StructureError: No rule is known for it; the message says why, or names those that are known.
    """
    name = optimizer.lower()
    if name in FAMILY:
        return FAMILIES[FAMILY[name]]
    if name in NO_RULE:
        raise StructureError(f"no rule for optimizer {optimizer!r}: {NO_RULE[name]}")
    raise StructureError(f"no rule for optimizer {optimizer!r}; known: {', '.join(FAMILY)}")


@dataclass(frozen=True)
class Rule:
    """The choices that a rule leaves open; the defaults are the paper's.

    Attributes:
        optimizer: A name of ``FAMILY``.
        block_count: For SGD, multiply by the number of blocks: the gradient of one block among b is b times smaller,
            which the paper leaves out.  Measured with ``structops study coordinate-check`` (widths 64 to 1024, ten
            steps): the change of features of BTT follows width^-0.56 without it and width^-0.07 with it.
        share_exponent: Multiply by ``sharing ** share_exponent`` for factors that are used several times per vector
            (Kron, TT), whose uses are not aligned; 0 is the paper's rule.  Measured as above, Adam: Kron follows
            width^-0.15 at 0 and width^+0.03 at 0.5; SGD, with the block count: width^-0.53 at 0, width^-0.29 at 0.5,
            and flat at 1.
        init: ``"paper"``: Gaussian of std sqrt(min(i, o))/i; ``"orthogonal"``: semi-orthogonal blocks times sqrt(o/i),
            with spectral norms exact; ``"kaiming"``: Gaussian of std 1/sqrt(i), for comparisons.
        decay: How weight decay follows the learning rate: ``"independent"`` (decay per step as in the dense layer),
            ``"sqrt"``, or ``"coupled"`` (left alone: factors with a larger rate decay faster).
        structure_aware: If false, every factor gets the learning rate of the dense layer: the paper's naive baseline.
        scale_eps: Whether Adam's eps follows the predicted size of the gradient, 1 / (blocks * fan_out).
    """

    optimizer: str = "adam"
    block_count: bool = False
    share_exponent: float = 0.0
    init: str = "paper"
    decay: str = "independent"
    scale_eps: bool = False
    structure_aware: bool = True

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            StructureError: One is unknown.
        """
        family(self.optimizer)
        for name, value, known in (
            ("init", self.init, ("paper", "orthogonal", "kaiming")),
            ("decay", self.decay, ("independent", "sqrt", "coupled")),
        ):
            if value not in known:
                raise StructureError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def family(self) -> Family:
        """The optimiser's family."""
        return family(self.optimizer)

    def scale(self, factor: Factor) -> Number:
        """The absolute scale of a factor's learning rate, before it is shared among the factors of a layer."""
        kind = self.family
        value = kind.scale(factor)
        if kind.name == "sgd" and self.block_count:
            value = value * factor.blocks
        if kind.shared and self.share_exponent:
            value = value * factor.sharing**self.share_exponent
        return value

    def formula(self, factor: Factor) -> str:
        """The absolute scale in words and with its numbers."""
        kind = self.family
        text = kind.formula
        if kind.name == "sgd" and self.block_count:
            text = "b*" + text
        if kind.shared and self.share_exponent and factor.sharing > 1:
            text += f" * {factor.sharing}^{self.share_exponent:g}"
        return text
