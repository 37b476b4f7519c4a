"""What users say about parameters by glob: their roles, and which of them start at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup.plan import ROLES, Weight

# Last parts of the names of layers whose outputs are the model's.
READOUTS = (
    *("head", "lm_head", "classifier", "readout", "unembed", "fc_out", "output_layer", "logits", "score"),
    *("qa_outputs", "proj_out", "output_projection", "visual_projection", "text_projection"),
)
# Last parts of the names of layers whose outputs are added to a residual stream, in common code bases.
RESIDUAL_ENDS = (
    *("o_proj", "c_proj", "out_proj", "down_proj", "fc2", "output.dense", "linear2", "wo", "w2", "proj"),
    *("Attention.o", "attn.o", "attention.o", "dense_4h_to_h"),
)


def with_roles(found: list[Weight], roles: Mapping[str, str]) -> list[Weight]:
    """The weights with the roles that were given for their names or layers; a later glob wins.

    Raises:
        StructureError: A role is unknown, or a glob fits nothing.
    """
    for pattern, role in roles.items():
        if role not in ROLES:
            raise StructureError(f"roles: expected one of {', '.join(ROLES)} for {pattern!r}, got {role!r}")
        fits = [_fits(weight, pattern) for weight in found]
        check_glob("roles", pattern, any(fits), found)
        found = [_with_role(weight, role) if fit else weight for weight, fit in zip(found, fits, strict=True)]
    return found


def _with_role(weight: Weight, role: str) -> Weight:
    """A weight in another role.  What was guessed from a shape, or is no matrix any more, is fed by one number."""
    name, shape = weight.factor.name, weight.factor.shape
    if role not in ("scalar", "vector") and (role != "embedding" or weight.known):
        return replace(weight, role=role, known=True)
    size = {"scalar": 1, "vector": math.prod(shape), "embedding": shape[-1]}[role]
    factor = Factor(name, shape, fan_in=1, fan_out=size)
    return replace(weight, role=role, known=True, factor=factor, in_features=1, out_features=size)


def with_zeros(found: list[Weight], zero: str | Sequence[str]) -> list[Weight]:
    """The weights with those marked that start at zero: dense ones and last factors, never a first factor.

    Raises:
        StructureError: A glob fits no such weight.
    """
    for pattern in [zero] if isinstance(zero, str) else zero:
        fits = [w.is_matrix and w.position == w.count - 1 and _fits(w, pattern) for w in found]
        check_glob("zero", pattern, any(fits), [w for w in found if w.is_matrix])
        found = [replace(w, zero=True) if fit else w for w, fit in zip(found, fits, strict=True)]
    return found


def _fits(weight: Weight, pattern: str) -> bool:
    """Whether a glob names a parameter, or the layer of a matrix."""
    return fnmatchcase(weight.name, pattern) or (weight.is_matrix and fnmatchcase(weight.layer, pattern))


def check_glob(what: str, pattern: str, fits: bool, found: Sequence[Weight]) -> None:
    """A glob fits something.

    Raises:
        StructureError: It does not; the message names what there is.
    """
    if not fits:
        names = ", ".join(weight.name for weight in found[:8]) + (", ..." if len(found) > 8 else "")
        raise StructureError(f"{what}: {pattern!r} fits no parameter or layer of the model; it has {names}")
