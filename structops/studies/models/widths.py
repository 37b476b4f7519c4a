"""The width at which a model meets a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from structops.errors import StructureError
from structops.studies.models.layers import family
from structops.studies.models.sizes import Model

UNIT = 4  # widths are multiples of this
GAP = 64  # candidates in a row, and as many again as the number of the first, that are tried for sizes that can be had
LARGEST = 2**40


def width_for(model: Model, macs: int, count: Callable[[Model], int] = lambda model: model.macs) -> int:
    """The width whose MACs are nearest to a budget, among widths that suit the structure and the heads.

    Structures whose modes are roots of the width (Kronecker products, tensor-trains, block tensor-trains and Monarch
    matrices without given blocks) take squares, or cubes with three cores, whose modes are equal.  Others take
    multiples of 4, of their blocks and of the heads.  The count grows with the width, so that it is bisected.

    Args:
        model: The model; its own width does not matter.
        macs: The budget.
        count: What is budgeted, if not `Model.macs`.

    Raises:
        StructureError: The structure cannot have any width of the model.

    Example:
        >>> from structops.studies.models import ResidualMLP
        >>> width_for(ResidualMLP("btt", 64), ResidualMLP("dense", 64).macs)
        324
    """
    candidate = _candidates(model)

    @cache
    def at(k: int) -> tuple[int, int]:
        """The first width from the k-th candidate on that is possible, and its count."""
        for j in range(k, 2 * k + GAP):
            try:
                width = candidate(j)
                return width, count(replace(model, width=width))
            except StructureError as error:
                cause = error
        raise StructureError(f"no width from {candidate(k)} on suits {model.structure!r}: {cause}") from cause

    low, high = 1, 2
    while at(high)[1] < macs and at(high)[0] < LARGEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[1] <= macs else (low, middle)
    found = (at(low), at(high))
    return min(found, key=lambda pair: (abs(pair[1] - macs), -pair[0]))[0]


def _candidates(model: Model) -> Callable[[int], int]:
    """The k-th width, k = 1, 2, ...; it grows with k."""
    spec = family(model.structure)
    blocks = getattr(spec, "blocks", None)
    if spec.name in ("kron", "tt", "btt", "monarch") and blocks is None:
        power = getattr(spec, "num_cores", 2)
        # The smallest root whose power the heads divide; k = 1 would be a width of one.
        root = next(n for n in range(1, model.width_unit + 1) if n**power % model.width_unit == 0)
        return lambda k: (root * (k + (root == 1))) ** power
    unit = math.lcm(UNIT, model.width_unit, blocks if isinstance(blocks, int) else 1)
    first = 8 // unit if unit < 8 else 1
    return lambda k: unit * (k - 1 + first)
