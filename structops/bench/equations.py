"""How others would write a chain: as einsums on textbook arrays, or as batched products with copies.  No arrays."""

from __future__ import annotations

import string
from dataclasses import dataclass

from structops.chain import Chain
from structops.pattern import Regroup, Step

TOKENS = "Z"  # einsum knows letters only; the labels of a chain get the others


@dataclass(frozen=True)
class Equation:
    """One einsum of a state and a factor, or of a state alone.

    Attributes:
        shape: The shape in which the state is read, the tokens first.
        text: The equation, such as ``"Zcd,sbcd->Zscb"``.
        has_factor: Whether the next factor is its second operand.
    """

    shape: tuple[int, ...]
    text: str
    has_factor: bool


def equations(chain: Chain, tokens: int) -> list[Equation]:
    """The einsums of a chain, a factor each, in its order, on factors with their textbook axes.

    A regroup is a reshape between two einsums; the state is permuted for it by the einsum before it.
    """
    labels = sorted(set("".join(chain.terms)) - {"="})
    letter = str.maketrans(dict(zip(labels, string.ascii_letters.replace(TOKENS, ""), strict=False)))
    state, found = chain.terms[0], []

    def add(target: str, factor: str) -> None:
        inputs = TOKENS + state.translate(letter) + ("," + factor.translate(letter) if factor else "")
        text = f"{inputs}->{TOKENS}{target.translate(letter)}"
        found.append(Equation((tokens, *chain.shape_of(state)), text, bool(factor)))

    for step, following in zip(chain.steps, [*chain.steps[1:], None], strict=True):
        if isinstance(step, Step):
            target = _target(following, chain, step.batch + step.shared + step.emitted)
            add(target, step.labels)
            state = target
        else:
            if state != step.before:
                add(step.before, "")
            state = step.after
    if state != chain.terms[-1]:
        add(chain.terms[-1], "")
    return found


def _target(following: Step | Regroup | None, chain: Chain, free: str) -> str:
    """The order of labels that what comes next asks for, or the free one."""
    if following is None:
        return chain.terms[-1]
    return following.before if isinstance(following, Regroup) else free


@dataclass(frozen=True)
class Copy:
    """Read the state as ``shape``, permute it by ``axes``, and copy it as ``rows``, ready for a batched product."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rows: tuple[int, ...]


def copies(chain: Chain, tokens: int) -> list[Copy]:
    """What stands before every batched product, and after the last; the published research codes go this way.

    The labels of the state are the tokens ``*`` and those of the chain.  Only for chains without regroup and padding.
    """
    state, found = "*" + chain.terms[0], []

    def add(target: str, rows: tuple[int, ...]) -> None:
        shape = tuple(tokens if label == "*" else chain.size(label) for label in state)
        found.append(Copy(shape, tuple(state.index(label) for label in target), rows))

    for step, factor in zip(chain.factor_steps, chain.factors, strict=True):
        add(step.batch + "*" + step.shared + step.contracted, (factor.blocks, tokens * factor.sharing, factor.fan_in))
        state = step.batch + "*" + step.shared + step.emitted
    add("*" + chain.terms[-1], (tokens, chain.out_features))
    return found


def why_no_copies(chain: Chain) -> str:
    """The reason why a chain has no such schedule, or nothing."""
    if any(isinstance(step, Regroup) for step in chain.steps):
        return "the chain has a regroup"
    padded = (chain.padded_out, chain.padded_in) != chain.shape
    return "the chain is padded" if padded else ""
