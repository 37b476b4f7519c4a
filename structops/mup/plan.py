"""One plan for a whole model: init, learning rate, weight decay and eps of every parameter, as plain data.

A model is described by its weights as sizes (`Weight`), which `structops.torch.plan` and `structops.jax.plan` read off
its layers.  Everything here is numbers and text; no arrays, no libraries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup.families import Number, Rule
from structops.mup.rules import dense_factor, exact_width_ratio, first_std, init_std

ROLES = ("hidden", "embedding", "readout", "vector", "scalar")


@dataclass(frozen=True)
class Weight:
    """One parameter of a model, as sizes.

    Attributes:
        name: Its name in the model.
        layer: The name of the layer that it belongs to.
        role: One of `ROLES`; hidden weights, embeddings and the readout are matrices.
        factor: Its sizes: of a dense weight one block, of a bias one block of fan-in 1.
        in_features: Input size of the layer.
        out_features: Output size of the layer.
        position: Its place among the factors of the layer, in order of application.
        count: Learnable dense factors of the layer.
        structure: The structure of the layer, in words.
        zero: Whether it starts at zero.
        tied: Whether another parameter of the model is the same array.
        known: Whether its role follows from its layer; if not, it was guessed from its shape.
    """

    name: str
    layer: str
    role: str
    factor: Factor
    in_features: int
    out_features: int
    position: int = 0
    count: int = 1
    structure: str = ""
    zero: bool = False
    tied: bool = False
    known: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight matrix or a factor of one."""
        return self.role in ("hidden", "embedding", "readout")


@dataclass(frozen=True)
class PlanRow:
    """The scales of one parameter.

    Attributes:
        weight: Its sizes.
        optimizer: The name of the rule that it takes: that of the plan, or ``"adam"`` beside an optimiser of matrices.
        init: ``"zero"``, ``"constant"`` (vectors keep what their module gives them), or the rule's ``init``.
        init_std: Standard deviation of its entries.
        lr_scale: Learning rate relative to the reference.
        wd_scale: Weight decay relative to that of a dense weight; 0 for vectors and scalars.
        eps_scale: Adam's eps relative to that of the reference.
        reason: The numbers behind the learning rate.
    """

    weight: Weight
    optimizer: str
    init: str
    init_std: float
    lr_scale: float
    wd_scale: float
    eps_scale: float
    reason: str

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.weight.name


@dataclass(frozen=True)
class MupPlan(Sequence[PlanRow]):
    """The plan of a model: immutable, comparable, prints as a table, goes to JSON and back.

    Attributes:
        rows: One row a parameter, in the order of the model.
        rule: The choices behind the numbers.
        reference: What a learning rate of scale 1 is: that of the dense layers replaced, of a base, or absolute.
        warnings: What will not transfer, each with a code.
    """

    rows: tuple[PlanRow, ...]
    rule: Rule
    reference: str
    warnings: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        """A row by its number or by the name of its parameter.

        Raises:
            KeyError: There is no parameter of this name.
        """
        if isinstance(key, str):
            for row in self.rows:
                if row.name == key:
                    return row
            raise KeyError(f"the plan has no parameter {key!r}")
        return self.rows[key]

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.rows)

    def __iter__(self) -> Iterator[PlanRow]:
        """The rows in the order of the model."""
        return iter(self.rows)

    # ------------------------------------------------------------------------------------------------------------ text

    def table(self) -> str:
        """One line a parameter with all scales and where they come from, and the warnings below."""
        head: tuple[str, ...] = ("parameter", "role", "structure", "blocks", "fan_in", "fan_out", "sharing")
        head += ("init", "std", "lr", "wd", "eps", "reason")
        body = [
            (
                row.name,
                row.weight.role + (" (tied)" if row.weight.tied else ""),
                row.weight.structure,
                *map(str, (row.weight.factor.blocks, row.weight.factor.fan_in, row.weight.factor.fan_out)),
                str(row.weight.factor.sharing),
                row.init,
                *(f"{x:.4g}" for x in (row.init_std, row.lr_scale, row.wd_scale, row.eps_scale)),
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *body)
        ]
        return "\n".join([f"learning rates relative to {self.reference}", *lines, *self.warnings])

    __str__ = table

    def explain(self, name: str) -> str:
        """Every number of one parameter, in sentences.

        Raises:
            KeyError: There is no parameter of this name.
        """
        row = self[name]
        w, f = row.weight, row.weight.factor
        copies = f", each used {f.sharing} times per vector" if f.sharing > 1 else ""
        place = f", factor {w.position + 1} of {w.count}" if w.count > 1 else ""
        return "\n".join(
            [
                f"{row.name}: {w.role} parameter of {w.layer or 'the model'} "
                f"({w.structure or 'plain'}, {w.out_features}x{w.in_features}{place})",
                f"  sizes: {f.blocks} block(s) of {f.fan_out}x{f.fan_in}{copies}",
                f"  init: {row.init}, entries of std {row.init_std:.6g}",
                f"  learning rate: x {row.lr_scale:.6g} = {row.reason}, relative to {self.reference}, by the rule for "
                f"{row.optimizer}",
                f"  weight decay: x {row.wd_scale:.6g} ({self.rule.decay}), x {row.wd_scale * row.lr_scale:.6g} a step",
                f"  eps: x {row.eps_scale:.6g}",
            ]
        )

    # ------------------------------------------------------------------------------------------------------------ data

    def to_json(self) -> str:
        """The whole plan as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MupPlan:
        """The plan that `to_json` wrote.

        Raises:
            StructureError: The text is no plan.
        """
        try:
            data = json.loads(text)
            rows = []
            for row in data["rows"]:
                weight = dict(row["weight"])
                factor = Factor(**{**weight["factor"], "shape": tuple(weight["factor"]["shape"])})
                rows.append(PlanRow(**{**row, "weight": Weight(**{**weight, "factor": factor})}))
            return cls(tuple(rows), Rule(**data["rule"]), data["reference"], tuple(data["warnings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StructureError(f"expected the JSON of a plan: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Sixteen digits that change with any number of the plan; to notice another recipe when resuming."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def diff(self, other: MupPlan) -> tuple[str, ...]:
        """The differences to another plan, one line each; empty if they are the same."""
        mine, theirs = ({row.name: row for row in plan} for plan in (self, other))
        lines = [f"{name}: only in the first" for name in mine if name not in theirs]
        lines += [f"{name}: only in the second" for name in theirs if name not in mine]
        for name, row in mine.items():
            if name in theirs:
                lines += [
                    f"{name}: {what} {getattr(row, what)!r} became {getattr(theirs[name], what)!r}"
                    for what in ("optimizer", "init", "init_std", "lr_scale", "wd_scale", "eps_scale")
                    if getattr(row, what) != getattr(theirs[name], what)
                ]
        return tuple(lines)


def make_plan(
    weights: Sequence[Weight],
    optimizer: str | Rule = "adam",
    base: int | str | Sequence[Weight] | None = None,
) -> MupPlan:
    r"""The plan of a model from its weights as sizes.

    With the absolute scale s of a factor (see `structops.mup.FAMILIES`) and k factors in the layer, its learning rate
    is \(s / k\) relative to a reference: s of the dense layer that is replaced (``base=None``, the paper's
    \(\kappa\)), s / k of the same parameter in a base model, or 1 (``"absolute"``).

    Args:
        weights: The model.
        optimizer: A name of ``FAMILY``, or a `Rule` with further choices.
        base: None; the fan-in at which the rate was tuned; ``"absolute"``; or the weights of the base model, whose
            layers have the same names.  A base layer that is dense is the reference of all factors of a structured one.

    Raises:
        StructureError: No rule for the optimiser, or the base lacks a layer.
    """
    rule = optimizer if isinstance(optimizer, Rule) else Rule(optimizer)
    if isinstance(base, str) and base != "absolute":
        raise StructureError(f"base is None, a fan-in, 'absolute' or the base model, got {base!r}")
    ends = {weight.layer for weight in weights if weight.zero and weight.count > 1}
    rows = tuple(_row(weight, _rule_for(weight, rule), base, weight.layer in ends) for weight in weights)
    return MupPlan(rows, rule, _reference(base), tuple(_warnings(rows, rule)))


def _rule_for(weight: Weight, rule: Rule) -> Rule:
    """That of the plan, or Adam's for what an optimiser of matrices does not take."""
    return replace(rule, optimizer="adam") if rule.family.matrices_only and weight.role != "hidden" else rule


def _reference(base: Any) -> str:
    if base is None:
        return "the dense layers replaced"
    if base == "absolute":
        return "1 (absolute scales)"
    return f"a dense layer of fan-in {base}" if isinstance(base, int) else "the base model"


def _row(weight: Weight, rule: Rule, base: Any, zero_last: bool) -> PlanRow:
    factor = weight.factor
    lr, words = _lr(weight, rule, base)
    init, std = _init(weight, rule, zero_last)
    power = {"independent": 1.0, "sqrt": 0.5, "coupled": 0.0}[rule.decay]
    wd = lr**-power / (weight.count if power else 1) if weight.is_matrix else 0.0
    eps = _eps(factor, weight) if rule.scale_eps else 1.0
    return PlanRow(weight, rule.optimizer, init, std, lr, wd, eps, words)


def _lr(weight: Weight, rule: Rule, base: Any) -> tuple[float, str]:
    """The learning-rate scale and its numbers."""
    factor, count = weight.factor, weight.count
    if not rule.structure_aware and weight.is_matrix:
        factor, count = dense_factor(weight.in_features, weight.out_features), 1
    ours: Number = rule.scale(factor) / count
    text = f"s/k = {_text(rule.scale(factor))}/{count}, s = {rule.formula(factor)}"
    if base == "absolute":
        return float(ours), text
    if base is None:
        if not weight.is_matrix or (weight.count == 1 and not weight.structure):
            return 1.0, "1: as in the dense model"
        dense = rule.scale(dense_factor(weight.in_features, weight.out_features))
        return float(ours / dense), f"{text}, over {_text(dense)} of the dense layer"
    if isinstance(base, int):
        if not weight.is_matrix or weight.role == "embedding":
            return 1.0, "1: its fan-in does not grow"
        n, m = weight.in_features, weight.out_features
        # Both sides of a hidden layer grow alike, the output of a readout does not grow.
        ratio = exact_width_ratio(rule, n, m, base, None if weight.role == "hidden" else m)
        reference = rule.scale(dense_factor(n, m)) / ratio
        return float(ours / reference), f"{text}, over {_text(reference)} of a dense layer of fan-in {base}"
    theirs = _counterpart(weight, base)
    if theirs is None:
        return 1.0, "1: it has no counterpart in the base model"
    reference = rule.scale(theirs.factor) / theirs.count
    return float(ours / reference), f"{text}, over {_text(reference)} in the base model"


def _text(value: Number) -> str:
    if isinstance(value, Fraction) and value.denominator > 1:
        return f"({value.numerator}/{value.denominator})"
    return f"{float(value):.4g}"


def _counterpart(weight: Weight, base: Sequence[Weight]) -> Weight | None:
    """The parameter of the base model: of the same name, or the dense weight of the same layer; a vector may have none.

    Raises:
        StructureError: The base model has no such layer.
    """
    for other in base:
        if other.name == weight.name and other.count == weight.count:
            return other
    dense = [w for w in base if w.layer == weight.layer and w.role == weight.role and w.count == 1]
    if len(dense) == 1:
        return dense[0]
    if weight.role not in ("hidden", "readout"):
        return None
    beside = [w for w in base if w.layer == weight.layer and w.role == "hidden" and w.count == 1]
    if weight.role == "readout" and len(beside) == 1:  # the gate of a mixture, where the base model has a dense layer
        return replace(weight, factor=dense_factor(beside[0].in_features, weight.out_features))
    raise StructureError(
        f"the base model has no layer {weight.layer!r} with a counterpart of {weight.name!r}; it needs the same layers "
        f"at another width"
    )


def _init(weight: Weight, rule: Rule, zero_last: bool) -> tuple[str, float]:
    """How a parameter starts, and the std of its entries; ``zero_last`` if the last factor of its layer is zero."""
    if weight.zero:
        return "zero", 0.0
    if not weight.is_matrix:
        return "constant", 0.0
    if weight.role == "embedding":
        return "gaussian", init_std(weight.factor)  # of a table, with fan-in 1: one
    if rule.init == "kaiming":
        return rule.init, 1 / math.sqrt(weight.factor.fan_in)
    if zero_last and weight.position == 0:
        return rule.init, first_std(weight.factor, weight.in_features)
    return rule.init, init_std(weight.factor)


def _eps(factor: Factor, weight: Weight) -> float:
    """The predicted size of a gradient's entries, 1 / (blocks * fan_out), relative to the dense layer's."""
    return weight.out_features / (factor.blocks * factor.fan_out) if weight.is_matrix else 1.0


def _warnings(rows: Sequence[PlanRow], rule: Rule) -> Iterator[str]:
    """What will not transfer."""
    for row in rows:
        w = row.weight
        if not w.known:
            yield (
                f"M001 {w.name}: no layer says what it is; taken as {w.role} from its shape. Name its role: "
                f"roles={{{w.name!r}: ...}}"
            )
        if w.tied and w.is_matrix:
            yield (
                f"M002 {w.name} is shared by two layers: it takes one rate, and a tied readout needs its output "
                f"multiplied by 1/width"
            )
        if w.factor.sharing > 1 and rule.family.shared and not rule.share_exponent and w.is_matrix:
            yield (
                f"M007 {w.name} is used {w.factor.sharing} times per vector: under {rule.optimizer} its change drifts "
                f"with width; share_exponent=0.5 (1 for SGD) corrects for it"
            )
        if row.init == "zero" and rule.family.relative:
            yield (
                f"M009 {w.name} starts at zero, and an update of {rule.optimizer} is relative to the parameter's size: "
                f"it would never move"
            )
        if w.is_matrix and w.count > 3 and w.position == 0 and row.init == "paper":
            yield (f"M010 {w.layer}: {w.count} Gaussian factors together have heavy tails; use init='orthogonal'")
        if rule.decay == "coupled" and row.lr_scale > 4 and w.is_matrix:
            yield (
                f"M012 {w.name}: coupled weight decay is {row.lr_scale:.3g} times as fast as in the dense layer; "
                f"decay='independent' keeps it"
            )
