"""Which linear layers get which structure: by glob, regular expression, function or rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from structops.errors import StructureError, StructureWarning
from structops.mup.selection import READOUTS
from structops.spec import Structure, structure

ROUTERS = ("router", "gate", "gating", "switch", "shared_expert_gate")
"""Last parts of the names of layers that choose experts: small, and a rank cut there changes the choice."""

READ = ("dt_proj",)
"""Last parts of the names of layers whose weight Mamba multiplies itself."""

Spec = str | Structure | Mapping[str, Any]
Pattern = str | re.Pattern[str]
Names = Pattern | Sequence[Pattern] | Callable[[str, Any], Any] | None
Select = Pattern | Sequence[Pattern] | Callable[[str, Any], Any] | Mapping[Pattern, Any] | None


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model, as sizes.

    Attributes:
        name: Its dotted name in the model.
        kind: The name of its class.
        in_features: Input size.
        out_features: Output size.
        bias: Whether it has one.
        obstacle: Why it cannot be converted; empty if it can.
        reserved: Why it stays dense unless it is selected; empty if nothing speaks for that.
        module: The layer itself, for functions that select.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    bias: bool = False
    obstacle: str = ""
    reserved: str = ""
    module: Any = None


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer.

    Attributes:
        layer: The layer.
        structure: The structure that it gets, or None if it stays dense.
        reason: Why it stays dense.
    """

    layer: Layer
    structure: Structure | None
    reason: str = ""


def reserved_for(name: str) -> str:
    """Why a layer of this name stays dense unless it is selected, or nothing."""
    last = name.rpartition(".")[2]
    if last in READOUTS:
        return "output head"
    if last in READ:
        return "its weight is read by Mamba itself"
    return "router of experts" if last in ROUTERS else ""


def choose(layers: Iterable[Layer], spec: Spec | Mapping[Pattern, Any] | None, select: Select = None) -> list[Choice]:
    """The structure of every layer.

    Args:
        layers: The linear layers of a model.
        spec: The structure of what is selected, as `structops.structure` takes it; or rules, like ``select``, each with
            a structure of its own.
        select: What is selected:

            - None: all but output heads, routers and what cannot be converted;
            - a glob of names, such as ``"*.mlp.*"``; a compiled regular expression, found anywhere in a name; or a
              sequence of both, of which any fits;
            - a function of name and layer that returns whether, or the structure;
            - rules, ``{"*.mlp.*": "btt(rank=2)", "*.attn.*": True, "h.0.*": False}``: globs or regular expressions, and
              a structure, True for ``spec``, or False or None to keep the layer; a later rule wins.

            What is selected in one of the last three ways is taken at its word: heads and routers are converted, and a
            layer that cannot be is an error.

    Raises:
        StructureError: A structure is unknown or cannot have the sizes of its layer, a pattern fits no linear layer,
            or a layer that was selected cannot be converted.

    **Warnings.** What a structure says of a size (`StructureWarning`), once for all layers alike.
    """
    layers = list(layers)
    if _is_rules(spec):
        if select is not None:
            raise StructureError("give rules as the structure or as select, not both")
        spec, select = None, spec  # type: ignore[assignment]
    default = None if spec is None else structure(spec)  # type: ignore[arg-type]
    if select is None:
        if default is None:
            raise StructureError("expected a structure such as 'btt(rank=2)', or rules such as {'*.mlp.*': 'btt'}")
        choices = [Choice(layer, *_by_default(layer, default)) for layer in layers]
    else:
        choices = [
            Choice(layer, found, "" if found else "not selected") for layer, found in _asked(layers, default, select)
        ]
    told: dict[str, list[str]] = {}
    for choice in choices:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StructureWarning)
            _check(choice)
        for text in {str(warning.message) for warning in caught}:
            told.setdefault(text, []).append(choice.layer.name or "the model")
    for text, names in told.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"{names[0]}{more}: {text}", StructureWarning, stacklevel=3)
    return choices


@contextmanager
def quiet() -> Iterator[None]:
    """What `choose` has told about the ranks of structures is not told again for every layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StructureWarning)
        yield


def _by_default(layer: Layer, default: Structure) -> tuple[Structure | None, str]:
    reason = layer.obstacle or layer.reserved
    return (None, reason) if reason else (default, "")


def _asked(layers: Sequence[Layer], default: Structure | None, select: Any) -> Iterator[tuple[Layer, Structure | None]]:
    """Every layer with the structure that the user asked for."""
    if callable(select):
        yield from ((layer, _structure(select(layer.name, layer.module), default, layer.name)) for layer in layers)
        return
    if isinstance(select, Mapping):
        rules = list(select.items())
    else:
        patterns = [select] if isinstance(select, str | re.Pattern) else list(select)
        rules = [(pattern, True) for pattern in patterns]
    _check_patterns("select", [pattern for pattern, _ in rules], [layer.name for layer in layers])
    for layer in layers:
        answers = [answer for pattern, answer in rules if fits(pattern, layer.name)]
        yield layer, _structure(answers[-1], default, _text(rules[0][0])) if answers else None


def named(what: str, select: Names, layers: Mapping[str, Any]) -> list[str]:
    """The names of the layers that patterns or a function select; all for None.

    Args:
        what: The argument, for messages.
        select: A glob, a compiled regular expression, a sequence of both, or a function of name and layer.
        layers: The layers by name.

    Raises:
        StructureError: A pattern fits none.
    """
    if select is None:
        return list(layers)
    if callable(select):
        return [name for name, layer in layers.items() if select(name, layer)]
    patterns = [select] if isinstance(select, str | re.Pattern) else list(select)
    _check_patterns(what, patterns, list(layers))
    return [name for name in layers if any(fits(pattern, name) for pattern in patterns)]


def _check_patterns(what: str, patterns: Sequence[Any], names: Sequence[str]) -> None:
    """Every pattern fits a name.

    Raises:
        StructureError: One is no pattern, or fits none.
    """
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise StructureError(
                f"{what}: expected a glob, a compiled regular expression or a function, got {pattern!r}"
            )
        if not any(fits(pattern, name) for name in names):
            some = ", ".join(name or "the model itself" for name in names[:8]) or "none"
            more = ", ..." if len(names) > 8 else ""
            raise StructureError(f"{what}: {_text(pattern)} fits no linear layer; there are {some}{more}")


def fits(pattern: Pattern, name: str) -> bool:
    """Whether a glob is the whole of a name, or a regular expression is found in it."""
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None


def _structure(answer: Any, default: Structure | None, where: str) -> Structure | None:
    """What a rule or a function says: a structure, yes or no.

    Raises:
        StructureError: Yes without a structure to take.
    """
    if answer is None or answer is False:
        return None
    if answer is True:
        if default is None:
            raise StructureError(f"select: {where} is True, but no structure is given that it could have")
        return default
    return structure(answer)


def _check(choice: Choice) -> None:
    """What is to be converted can be.

    Raises:
        StructureError: It cannot; the message names the layer.
    """
    layer, spec = choice.layer, choice.structure
    if spec is None:
        return
    if layer.obstacle:
        raise StructureError(
            f"{layer.name or 'the model'} was selected, but {layer.obstacle}; leave it out, for example with the rule "
            f"{{{layer.name!r}: False}}"
        )
    try:
        spec.plan(layer.in_features, layer.out_features)
    except StructureError as error:
        raise StructureError(
            f"{layer.name or 'the model'} ({layer.out_features}x{layer.in_features}): {error}"
        ) from error


def _is_rules(spec: Any) -> bool:
    """Whether a mapping is rules rather than the JSON data of one structure."""
    return isinstance(spec, Mapping) and not isinstance(spec.get("name"), str)


def _text(pattern: Pattern) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)
