"""A chain cut along one label: what every device of a tensor-parallel group computes.  Pure Python, no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from structops.chain import Chain
from structops.errors import StructureError
from structops.pattern import Regroup, Step

Side = Literal["output", "input"]


@dataclass(frozen=True)
class ChainShard:
    r"""One of ``parts`` equal shares of a chain, cut along one of its labels.

    A label is a sum, or an axis of x or y.  Cut into equal ranges, it leaves chains of the same pattern, one a process,
    in which only the size of that label is smaller.  Factors that have the label are cut; the others are the same
    everywhere.  Nothing is approximated and no number moves between the factors.

    Attributes:
        chain: The chain of one process.
        label: The label that is cut.
        parts: Number of processes.
        dims: For every factor the axis of ``(blocks, fan_out, fan_in)`` that is cut, or None.
        cuts_input: Whether a process needs only its slice of x; otherwise all of it.
        cuts_output: Whether a process computes its slice of y; otherwise a summand of all of it.
    """

    chain: Chain
    label: str
    parts: int
    dims: tuple[int | None, ...]
    cuts_input: bool
    cuts_output: bool


def shard_chain(chain: Chain, parts: int, side: Side) -> ChainShard:
    """Cut a chain along the most significant label of its output or its input.

    That label makes the slice of y or x of a process a contiguous range of features, as ``Shard(-1)`` says it is.

    Args:
        chain: The chain.
        parts: Number of processes.
        side: ``"output"`` for column-parallel layers, ``"input"`` for row-parallel ones.

    Raises:
        StructureError: The label has a size that ``parts`` does not divide, is regrouped, belongs to a padded side, or
            is not the most significant one wherever it occurs.

    Example:
        >>> from structops import structure
        >>> shard = shard_chain(structure("btt(rank=2)").chain(64, 64), 4, "input")
        >>> shard.chain
        Chain('cd, sbcd, abcs -> ab', a=8, b=8, c=2, d=8, s=2)
        >>> shard.dims, shard.cuts_output  # both factors are cut, and a process computes a summand of y
        ((0, 2), False)
    """
    first, last = chain.terms[0], chain.terms[-1]
    label = _leading(chain, last if side == "output" else first)
    size = chain.size(label)
    if parts < 1 or size % parts:
        fits = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0) or "no number"
        raise StructureError(
            f"{chain}: the most significant label of the {side}, {label!r}, has size {size}, which {parts} processes "
            f"do not divide; {fits} would, or other modes or blocks"
        )
    sides = {
        "input": (first, chain.in_features, chain.padded_in),
        "output": (last, chain.out_features, chain.padded_out),
    }
    for name, (labels, true, padded) in sides.items():
        if label in labels and true != padded:
            raise StructureError(
                f"{chain}: the {name} is padded from {true} to {padded}, so that its slices are not equal; use sizes "
                f"that need no padding"
            )
        if label in labels and _leading(chain, labels) != label:
            raise StructureError(
                f"{chain}: label {label!r} is not the most significant one of the {name}, whose slices are therefore "
                f"not contiguous"
            )
    dims = tuple(_dim(chain, step, label) for step in chain.steps if not _is_regroup(chain, step, label))
    sizes = dict(chain.sizes) | {label: size // parts}
    shares = {name: true // parts if label in labels else true for name, (labels, true, _) in sides.items()}
    local = Chain(chain.pattern, sizes, shares["input"], shares["output"])
    return ChainShard(local, label, parts, dims, label in first, label in last)


def _leading(chain: Chain, labels: Sequence[str]) -> str:
    """The most significant label; those of size 1 say nothing about the order."""
    return next((label for label in labels if chain.size(label) > 1), labels[0])


def _is_regroup(chain: Chain, step: Step | Regroup, label: str) -> bool:
    if isinstance(step, Regroup) and label in step.before + step.after:
        raise StructureError(
            f"{chain}: label {label!r} is re-read by {step.before}={step.after}, which needs the whole state; use "
            f"blocks that need no regroup"
        )
    return isinstance(step, Regroup)


def _dim(chain: Chain, step: Step | Regroup, label: str) -> int | None:
    """The axis of the stored factor whose contiguous slices are those of the label."""
    assert isinstance(step, Step)
    for dim, labels in enumerate((step.batch, step.emitted, step.contracted)):
        if label in labels:
            if _leading(chain, labels) != label:
                raise StructureError(
                    f"{chain}: in factor {step.labels} label {label!r} is not the most significant one of {labels!r}, "
                    f"so that slices of the stored factor are not contiguous; shard the other side of the layer"
                )
            return dim
    return None
