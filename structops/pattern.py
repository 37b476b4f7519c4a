"""The text of a chain: terms between commas, and the role of every label in every factor.  Strings only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from structops.errors import PatternError


@dataclass(frozen=True)
class Step:
    """One factor of a chain with the role of every label; each string is in the order of the factor or state."""

    labels: str
    batch: str
    emitted: str
    contracted: str
    shared: str

    @property
    def stored(self) -> str:
        """The labels in the order in which the factor is stored."""
        return self.batch + self.emitted + self.contracted

    @property
    def axes(self) -> tuple[int, ...]:
        """The permutation of the factor's axes that stores it as batch, emitted, contracted."""
        return tuple(self.labels.index(label) for label in self.stored)


@dataclass(frozen=True)
class Regroup:
    """A reversible re-reading of the whole state: flattened as ``before``, read as ``after``."""

    before: str
    after: str


def split_terms(pattern: str) -> tuple[list[str], str]:
    """Terms left of the arrow and the output, without blanks."""
    left, arrow, output = "".join(pattern.split()).partition("->")
    terms = left.split(",")
    if not arrow or "->" in output or "," in output or not all(terms) or not output:
        raise PatternError(f"expected 'input, factor, ... -> output' like 'cd, sbcd, abcs -> ab', got {pattern!r}")
    if all("=" in term for term in terms[1:]):
        raise PatternError(f"{pattern!r} has no factor; the identity is no chain")
    for term in (*terms, output):
        for labels in term.split("="):
            if len(set(labels)) != len(labels) or not labels.isalnum():
                raise PatternError(f"{pattern!r}: {term!r} must be distinct labels, each a letter or digit")
    if any(term.count("=") > 1 for term in terms) or "=" in terms[0] + output:
        raise PatternError(f"{pattern!r}: a regroup is one term 'before=after' between input and output")
    return terms, output


def roles(terms: list[str], output: str, pattern: str) -> Iterator[Step | Regroup]:
    """Give every label of every factor its role, from what the later terms still need."""
    state = terms[0]
    for position, term in enumerate(terms[1:], start=1):
        if "=" in term:
            before, after = term.split("=")
            if set(before) != set(state):
                raise PatternError(f"{pattern!r}: the regroup {term!r} must list the whole state {state!r}")
            state = after
            yield Regroup(before, after)
            continue
        needed = _needed(terms[position + 1 :], output)
        batch = "".join(label for label in term if label in state and label in needed)
        emitted = "".join(label for label in term if label not in state)
        contracted = "".join(label for label in term if label in state and label not in needed)
        shared = "".join(label for label in state if label not in term)
        for label in emitted + shared:
            if label not in needed:
                raise PatternError(
                    f"{pattern!r}: label {label!r} is in no later factor, and not in the next regroup or the output, "
                    f"when {term!r} is applied; a chain never sums a label away, so let a later term use it"
                )
        yield Step(term, batch, emitted, contracted, shared)
        state = batch + shared + emitted
    if set(state) != set(output):
        raise PatternError(f"{pattern!r}: the factors leave the labels {state!r}, the output asks for {output!r}")


def _needed(later: list[str], output: str) -> str:
    """Labels that the terms up to the next regroup, or the output, still use."""
    labels = ""
    for term in later:
        if "=" in term:
            return labels + term.split("=")[0]
        labels += term
    return labels + output
