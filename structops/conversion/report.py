"""What a conversion does to a model, as a table: parameters, MACs, the predicted time, and errors of projection."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from structops.conversion.selection import Choice, Layer, quiet
from structops.merging import Machine, speed_up
from structops.spec import ChainPlan


class Projection(NamedTuple):
    """How near a layer came to the dense weight that it was projected from.

    Attributes:
        error: Relative error in the Frobenius norm, or in that of the covariance of the inputs.
        optimality: ``"exact"``, ``"quasi"`` or ``"local"``; see `structops.projection.fit`.
    """

    error: float
    optimality: str


@dataclass(frozen=True)
class Row:
    """One linear layer.

    Attributes:
        name: Its dotted name.
        kind: The name of its class, or of the one that it replaces.
        in_features: Input size.
        out_features: Output size.
        structure: The structure that it gets or has; ``"dense"`` if it stays.
        params: Parameters of its weight in that structure.
        macs: MACs per vector in that structure.
        speed_up: Predicted time of the dense product over that of the structure; None where there is no prediction.
        error: Relative error of the projection; None if there was none.
        optimality: ``"exact"``, ``"quasi"`` or ``"local"``; empty if there was no projection.
        reason: Why it stays dense.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    structure: str
    params: int
    macs: int
    speed_up: float | None = None
    error: float | None = None
    optimality: str = ""
    reason: str = ""

    @property
    def dense(self) -> int:
        """Parameters of the dense weight, and MACs per vector."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Kept:
    """A matrix of parameters that belongs to no linear layer.

    Attributes:
        name: The dotted name of the parameter.
        shape: Its shape.
        reason: Why it stays as it is.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Conversion(Sequence[Row]):
    """The linear layers of a model before or after a conversion; prints as a table.

    Attributes:
        rows: One a linear layer, in the order of the model.
        kept: Other matrices of parameters, and why they stay.
        params: Parameters of the whole model with every layer dense.
        tokens: Vectors at once for which the time is predicted.
        machine: ``"cpu"`` or ``"gpu"``.
    """

    rows: tuple[Row, ...]
    kept: tuple[Kept, ...]
    params: int
    tokens: int
    machine: str

    def __getitem__(self, key: Any) -> Any:
        """A row by its number or by the name of its layer.

        Raises:
            KeyError: There is no linear layer of this name.
        """
        if isinstance(key, str):
            for row in self.rows:
                if row.name == key:
                    return row
            raise KeyError(f"the model has no linear layer {key!r}")
        return self.rows[key]

    def __len__(self) -> int:
        """Number of linear layers."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows in the order of the model."""
        return iter(self.rows)

    @property
    def converted(self) -> tuple[Row, ...]:
        """The rows of layers that have or get a structure."""
        return tuple(row for row in self.rows if not row.reason)

    @property
    def saved(self) -> int:
        """Parameters saved."""
        return sum(row.dense - row.params for row in self.rows)

    def table(self) -> str:
        """One line a layer, the sums, and what stays as it is."""
        head = ("layer", "class", "out x in", "structure", "params", "MACs", "of dense", "speed-up", "error")
        body = [
            (
                row.name or "(the model)",
                row.kind,
                f"{row.out_features}x{row.in_features}",
                row.structure + (f": {row.reason}" if row.reason else ""),
                f"{row.params:,}",
                f"{row.macs:,}",
                f"{row.params / row.dense:.3g}",
                "" if row.speed_up is None else f"{row.speed_up:.2f}",
                "" if row.error is None else f"{row.error:.3f} {row.optimality}",
            )
            for row in self.rows
        ]
        params, macs, dense = (sum(getattr(row, name) for row in self.rows) for name in ("params", "macs", "dense"))
        body.append(("sum", "", "", "", f"{params:,}", f"{macs:,}", f"{params / max(dense, 1):.3g}", "", ""))
        lines = aligned(head, body, right=(4, 5, 6, 7))
        count = len(self.converted)
        before, after = self.params, self.params - self.saved
        lines.append(
            f"{count} of {len(self.rows)} linear layers structured; the model has {after:,} parameters, "
            f"{after / max(before, 1):.3g} of {before:,} with all layers dense"
        )
        lines.append(
            f"speed-up: time of the dense product over that of the structure, predicted for {self.tokens:,} vectors "
            f"on a {self.machine.upper()} by structops.merging, not measured"
        )
        if self.kept:
            lines.append("matrices outside of linear layers stay as they are:")
            lines += aligned((), [(f"  {k.name}", "x".join(map(str, k.shape)), k.reason) for k in self.kept])
        return "\n".join(lines)

    __str__ = table
    __repr__ = table

    def to_json(self) -> str:
        """Rows and what is kept, as JSON."""
        return json.dumps(asdict(self))

    def with_projections(self, found: Mapping[str, Projection | None]) -> Conversion:
        """The same with what projections gave, by the names of their layers."""
        known = {name: projection for name, projection in found.items() if projection is not None}
        return self.with_rows([replace(r, **known[r.name]._asdict()) if r.name in known else r for r in self.rows])

    def with_rows(self, rows: Sequence[Row]) -> Conversion:
        """The same with other rows."""
        return replace(self, rows=tuple(rows))


def row_of(choice: Choice, tokens: int, machine: Machine) -> Row:
    """The row of a layer that gets what was chosen for it."""
    layer, spec = choice.layer, choice.structure
    if spec is None:
        return kept_dense(layer, choice.reason)
    with quiet():
        plan = spec.plan(layer.in_features, layer.out_features)
    return planned(layer, str(spec), plan, tokens, machine)


def kept_dense(layer: Layer, reason: str) -> Row:
    """The row of a layer that stays dense."""
    n, m = layer.in_features, layer.out_features
    return Row(layer.name, layer.kind, n, m, "dense", n * m, n * m, reason=reason)


def planned(layer: Layer, text: str, plan: Any, tokens: int, machine: Machine, **result: Any) -> Row:
    """The row of a layer with a plan; ``result`` is what its projection gave."""
    faster = speed_up(plan.chain, machine, tokens) if isinstance(plan, ChainPlan) else None
    sizes = (layer.in_features, layer.out_features)
    return Row(layer.name, layer.kind, *sizes, text, plan.num_params, plan.macs, faster, **result)


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table with aligned columns, some of them to the right."""
    lines = [head, *body] if head else list(body)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
