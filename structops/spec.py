"""Structure specs: frozen descriptions such as ``btt(rank=2, blocks=8)`` that need a size to become a matrix."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from structops._array import Array
from structops.chain import Chain, Factor
from structops.contract import check_product, contract
from structops.errors import StructureError, StructureWarning
from structops.modes import common_divisors, nearest_multiples


@dataclass(frozen=True)
class Plan:
    """A structure at one size: all that layers, muP and random draws need to know.

    A subclass adds what else it needs, and writes ``product`` and ``operator``, which use the stored arrays.

    Attributes:
        in_features: Size of the input.
        out_features: Size of the output.
        factors: The factors in order of application, as sizes.
        macs: Multiply-accumulates per input vector.
        stored_shapes: Shape of every stored factor, ``(blocks, fan_out, fan_in)``.
    """

    in_features: int
    out_features: int
    factors: tuple[Factor, ...] = field(repr=False)
    macs: int
    stored_shapes: tuple[tuple[int, int, int], ...]

    @property
    def num_params(self) -> int:
        """Parameters of all factors."""
        return sum(factor.num_params for factor in self.factors)

    def apply(self, factors: Sequence[Array], x: Array) -> Array:
        """The product with ``x`` on its last axis: a pure function of stored factors and x.

        Raises:
            ShapeError: The factors or x do not have the sizes of the plan.
            BackendError: numpy arrays, other objects, or arrays of two libraries.
        """
        check_product(self, factors, x)
        return self.product(factors, x)

    def product(self, factors: Sequence[Array], x: Array) -> Array:
        """The product with ``x`` on its last axis, when all sizes fit."""
        raise NotImplementedError

    def operator(self, factors: Sequence[Array]) -> Any:
        """The operator that views these factors."""
        raise NotImplementedError


@dataclass(frozen=True)
class ChainPlan(Plan):
    """The plan of a structure that is a chain."""

    chain: Chain
    build: Callable[[Chain, Sequence[Array]], Any] = field(repr=False)

    @classmethod
    def of(cls, chain: Chain, build: Callable[[Chain, Sequence[Array]], Any]) -> ChainPlan:
        """The plan that reads its sizes off a chain; ``build`` makes the operator from stored factors."""
        n, m = chain.in_features, chain.out_features
        return cls(n, m, chain.factors, chain.macs, chain.stored_shapes, chain, build)

    def apply(self, factors: Sequence[Array], x: Array) -> Array:
        """The product with ``x`` on its last axis; see `structops.contract`."""
        return contract(self.chain, factors, x)

    def operator(self, factors: Sequence[Array]) -> Any:
        """The operator that views these factors."""
        return self.build(self.chain, factors)


@dataclass(frozen=True)
class Structure:
    """Base class of specs: a frozen dataclass whose fields are the arguments of the structure.

    A subclass sets ``name`` and either ``chain`` or ``plan``.
    """

    name: ClassVar[str]

    def chain(self, in_features: int, out_features: int) -> Chain:
        """The pattern at this size; nothing is allocated.

        Raises:
            StructureError: The sizes cannot work; the message names them and the nearest that would.
            TypeError: The structure is no chain; use ``plan``.
        """
        raise TypeError(f"{self.name} is not a chain of block-dense factors; use .plan(in_features, out_features)")

    def plan(self, in_features: int, out_features: int) -> Plan:
        """The structure at this size: factors, parameters, MACs, and ``apply(factors, x)``."""
        return ChainPlan.of(self.chain(in_features, out_features), self.build)

    def build(self, chain: Chain, factors: Sequence[Array]) -> Any:
        """The operator of a chain from its stored factors; given by the operator class."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The arguments that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        """The string form, which `structure` parses: ``btt(rank=2, blocks=8)``."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())
        return f"{self.name}({arguments})" if arguments else self.name

    def to_json(self) -> str:
        """The spec as JSON; ``structure(json.loads(...))`` reads it back."""
        return json.dumps({"name": self.name, **self.arguments()})


REGISTRY: dict[str, type[Structure]] = {}


def registry() -> dict[str, type[Structure]]:
    """All structures by name.  They register themselves when their files are loaded, which this sees to."""
    importlib.import_module("structops.operators")
    return REGISTRY


def register(spec: type[Structure]) -> type[Structure]:
    """Make a spec known to `structure` by its name."""
    REGISTRY[spec.name] = spec
    return spec


def structure(spec: str | Structure | Mapping[str, Any], /, **arguments: Any) -> Structure:
    """A spec from a name and arguments, from its string form, from JSON data, or from a spec.

    Args:
        spec: ``"btt"``, ``"btt(rank=2, blocks=8)"``, ``{"name": "btt", "rank": 2}`` or a spec.
        **arguments: Arguments of the structure; they override those in ``spec``.

    Raises:
        StructureError: An unknown name, an unknown argument (the message lists the valid ones), or a bad value.

    Example:
        >>> structure("btt", rank=2, blocks=8) == structure("btt(rank=2, blocks=8)")
        True
        >>> print(structure("btt(rank=2)", blocks=8, num_cores=2))
        btt(rank=2, blocks=8)
    """
    if isinstance(spec, Structure):
        return dataclasses.replace(spec, **_checked(type(spec), arguments)) if arguments else spec
    if isinstance(spec, Mapping):
        given = dict(spec)
        name = str(given.pop("name", None))
    else:
        if str(spec).partition("(")[0].strip() == "routed":
            raise StructureError(
                f"{spec} is no matrix, because each vector chooses the experts that it meets; it is a layer: "
                f"structops.torch.RoutedLinear or structops.jax.RoutedLinear"
            )
        name, given = parse(spec)
    known = registry()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise StructureError(f"unknown structure {name!r}; {hint}known: {', '.join(known)}")
    cls = known[name]
    return cls(**_checked(cls, {**given, **arguments}))


def _checked(cls: type[Structure], arguments: Mapping[str, Any]) -> dict[str, Any]:
    valid = [f.name for f in dataclasses.fields(cls)]
    if unknown := [name for name in arguments if name not in valid]:
        accepts = f"accepts {', '.join(valid)}" if valid else "takes no arguments"
        raise StructureError(f"unknown argument(s) {', '.join(unknown)}: {cls.name} {accepts}")
    return {name: _frozen(value) for name, value in arguments.items()}


def _frozen(value: Any) -> Any:
    """Lists, as JSON gives them, become tuples, so that a spec can be hashed and printed."""
    if isinstance(value, np.generic):
        return value.item()  # numpy's numbers print and hash in their own ways
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return _frozen(sorted(value.items()))
    return value


def parse(text: str, nested: str = "") -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a text such as ``btt(rank=2, blocks=8)``.

    Args:
        text: A name, or a call of literals.
        nested: The argument that is a structure itself, and is returned as text.

    Raises:
        StructureError: The text is something else.
    """
    problem = StructureError(f"expected a structure such as 'btt' or 'btt(rank=2, blocks=8)', got {text!r}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise problem
        given = {
            str(keyword.arg): ast.unparse(keyword.value)
            if keyword.arg == nested and isinstance(keyword.value, ast.Name | ast.Call)
            else ast.literal_eval(keyword.value)
            for keyword in node.keywords
        }
        if len(given) < len(node.keywords):
            raise problem
        return node.func.id, given
    except (SyntaxError, ValueError, AttributeError) as error:
        if error is problem:
            raise
        raise problem from error


# ------------------------------------------------------------------------------------------------- checks of arguments


def check_sizes(spec: Structure, in_features: Any, out_features: Any) -> None:
    """The sizes of a layer are positive whole numbers.

    Raises:
        StructureError: One is not.
    """
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(size, Integral) or size < 1:
            raise StructureError(f"{spec}: {what} must be a whole number of at least 1, got {size!r}")


def check_blocks(spec: Structure, blocks: int, in_features: int, out_features: int) -> None:
    """The blocks divide both sizes.

    Raises:
        StructureError: They do not; the message names the blocks and the sizes that would work.
    """
    if in_features % blocks or out_features % blocks:
        common = ", ".join(map(str, common_divisors(in_features, out_features)))
        near_in, near_out = (nearest_multiples(size, blocks) for size in (in_features, out_features))
        raise StructureError(
            f"{spec}: {blocks} blocks do not divide in_features={in_features} and out_features={out_features}; "
            f"blocks that would: {common}; nearest sizes for {blocks} blocks: in {near_in}, out {near_out}"
        )


def check_count(spec: Structure, name: str, value: Any, least: int = 1) -> None:
    """A positive whole number, or None where that is the default.

    Raises:
        StructureError: Anything else; a float is pointed to the budget ``params=``.
    """
    if value is None and spec.__dataclass_fields__[name].default is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        share = isinstance(value, float) and hasattr(spec, "params")
        hint = "; a share of the dense parameters is given as params=" if share else ""
        raise StructureError(f"{spec.name}: {name} must be a whole number of at least {least}, got {value!r}{hint}")


def check_budget(spec: Structure, params: Any, rival: str, value: Any) -> None:
    """A share of the dense parameters, not given together with the number it stands for.

    Raises:
        StructureError: The budget is no positive number, or both are given.
    """
    if params is None:
        return
    if value is not None:
        raise StructureError(f"{spec.name}: give either {rival}={value!r} or params={params!r}, not both")
    if isinstance(params, bool) or not isinstance(params, (int, float)) or not params > 0:
        raise StructureError(
            f"{spec.name}: params is a share of the dense parameters such as 0.25, got {params!r}; "
            f"the {rival} itself is given as {rival}="
        )


def largest_within(spec: Structure, params: float, dense: int, cost: Callable[[int], int], what: str) -> int:
    """The largest whole number whose ``cost`` stays within ``params * dense``; cost grows with the number.

    Raises:
        StructureError: Even 1 costs more.
    """
    budget = math.floor(params * dense + 1e-9)
    if cost(1) > budget:
        raise StructureError(
            f"{spec}: {what} 1 already needs {cost(1)} parameters, more than the budget of {budget} "
            f"(params={params}); use params>={math.ceil(1e4 * cost(1) / dense) / 1e4:g}"
        )
    low, high = 1, 2
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def warn_wasteful_rank(spec: Structure, name: str, given: int, useful: int) -> None:
    """Warn about a rank beyond which the structure gains nothing."""
    if given > useful:
        message = f"{spec}: {name} {given} is more than useful; {useful} already represents every matrix of these sizes"
        warnings.warn(message, StructureWarning, stacklevel=4)


def warn_capped_rank(spec: Structure, chain: Chain, remedy: str) -> None:
    """Warn when the factorisation of the sizes caps the matrix rank below that of the shape."""
    full = min(chain.shape)
    if chain.rank_bound < full:
        message = (
            f"{spec}: at {chain.out_features}x{chain.in_features} the modes cap the rank at "
            f"{chain.rank_bound} of {full}; {remedy}"
        )
        warnings.warn(message, StructureWarning, stacklevel=4)
