"""The rules of learning rates that the muP studies compare, and the rates of their dense network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from structops.errors import StructureError

if TYPE_CHECKING:
    from structops.mup import Rule

# Learning rate of the dense network of width 64; that of Adam also beside Muon.  SGD from a head of zeros is a race
# between blocks, which at 0.3 amplifies chance differences of the start; at 0.1 and below slopes do not depend on it.
RATES = {"adam": 3e-3, "sgd": 0.1, "muon": 2e-2}

RULES: dict[str, dict[str, Any]] = {
    "paper": {},
    "blocks": {"block_count": True},
    "corrected": {"block_count": True, "share_exponent": 0.5},
    "naive": {"structure_aware": False},
}
"""Arguments of `structops.mup.Rule` beside the optimiser."""


def rule_of(name: str, optimizer: str, **changes: Any) -> Rule:
    """A rule by its name."""
    from structops.mup import Rule  # and with it CoLA, which takes seconds

    return Rule(optimizer, **{**RULES[name], **changes})


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise StructureError for a name that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise StructureError(f"{', '.join(unknown)} not among {'; '.join(known)}")
