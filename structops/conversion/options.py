"""What both libraries check before they convert a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from structops.conversion.selection import Choice, named
from structops.errors import StructureError, StructureWarning
from structops.mup.selection import READOUTS, RESIDUAL_ENDS

Init = Literal["project", "mup"]
Covariances = Mapping[str, Any]  # Moments, or second moments as arrays
Zero = bool | str | Sequence[str]


def check_init(init: str, zero: Zero, calibration: Covariances | None) -> None:
    """Options that go together.

    Raises:
        StructureError: They do not.
    """
    if init not in ("project", "mup"):
        raise StructureError(f"init: expected 'project' or 'mup', got {init!r}")
    if init == "project" and zero:
        raise StructureError("zero: projected weights keep their values; give zero with init='mup'")
    if init == "mup" and calibration is not None:
        raise StructureError("calibration: weights that are drawn anew need none; give it with init='project'")


def chosen_of(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that give a layer a structure.

    **Warnings.** `StructureWarning` if there are none: a conversion that does nothing is seldom what was meant.
    """
    chosen = [choice for choice in choices if choice.structure is not None]
    if not chosen:
        reasons = (
            "; ".join(f"{c.layer.name or 'the model'}: {c.reason}" for c in choices[:5]) or "it has no linear layer"
        )
        warnings.warn(f"structurize: no layer was converted ({reasons})", StructureWarning, stacklevel=3)
    return chosen


def check_calibration(calibration: Covariances | None, chosen: Sequence[Choice]) -> None:
    """There are moments for every layer.

    Raises:
        StructureError: Some are missing.
    """
    names = [] if calibration is None else [c.layer.name for c in chosen if c.layer.name not in calibration]
    if names:
        raise StructureError(
            f"calibration: no moments for {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}; calibrate the "
            f"same model with the same selection, on data that reach every layer"
        )


def zero_layers(chosen: Sequence[Choice], zero: Zero) -> set[str]:
    """The names of the layers whose last factor starts at zero: named by globs, or found by their names.

    Raises:
        StructureError: A glob fits none, or none has the name of the end of a residual branch.
    """
    names = {choice.layer.name: choice.layer.module for choice in chosen}
    if zero is False:
        return set()
    if zero is not True:
        return set(named("zero", zero, names))
    ends = tuple(f".{end}" for end in (*RESIDUAL_ENDS, *READOUTS))
    found = {name for name in names if f".{name}".endswith(ends)}
    if not found:
        raise StructureError(
            f"zero: none of the layers has the name of the end of a residual branch ({', '.join(RESIDUAL_ENDS)}) or of "
            f"a readout; name them by globs"
        )
    return found
