"""Which family an optimiser belongs to, measured by its updates of tiny factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup import FAMILIES, Family, MupPlan, Rule

SIZES = ((8, 8), (32, 8), (8, 32), (64, 16), (16, 64), (48, 24))  # fan_out, fan_in
BLOCKS = ((4, 8, 8), (16, 16, 8), (4, 8, 16), (3, 24, 8))
STEPS = 8  # RAdam is momentum for its first five
SMALL = 1 / 64  # the size of the gradient beside 1
LARGE = 16.0  # the size of the parameter beside 1
SPREAD = 1.3  # Newton-Schulz in half precision is good to 15 %; the nearest wrong family is off by 1.7
POWER = 0.05  # error of a measured power


@dataclass(frozen=True)
class Probe:
    """What was measured of an optimiser.

    Attributes:
        family: The name of its family, which is also a valid ``optimizer`` of a plan.
        blocks: What it does to a factor (blocks, fan_out, fan_in): ``"batched"``: every block is updated as it would
            be alone; ``"flattened"``: blocks act on each other, or the shape factor is of other axes, and no rule
            holds; ``"refused"``: it raises.
        evidence: The numbers, one line each.
    """

    family: str
    blocks: str
    evidence: str

    def __str__(self) -> str:
        """All of it as text."""
        return f"{self.family}, blocks {self.blocks}\n{self.evidence}"


def probe(optimizer: Callable[..., Any], **kwargs: Any) -> Probe:
    """Measure a few updates of tiny factors, and say which rule holds for an optimiser.

    A gradient of rank one and of the size that the theory predicts changes a block of fan-in i and fan-out o by a
    spectral norm u; the rule of the optimiser's family is proportional to sqrt(o/i) / u at all sizes.  Further runs
    tell how u follows the size of the gradient and of the parameter, and whether blocks are updated one by one.
    Updates are those of step eight of a constant gradient, without what the optimiser does to a zero gradient (decay).

    Args:
        optimizer: A class, or any function that makes an optimiser from a list of parameters.
        **kwargs: For ``optimizer``.  Leave weight decay that is added to the gradient at zero.

    Returns:
        The family, the treatment of blocks, and the numbers.

    Raises:
        StructureError: No family fits, with the numbers; or the optimiser cannot be run on a matrix.

    Example:
        >>> found = probe(torch.optim.AdamW, lr=1e-3)
        >>> found.family, found.blocks
        ('adam', 'batched')
        >>> probe(torch.optim.Muon).blocks
        'refused'
    """
    make = _Runner(optimizer, kwargs)
    gradient, weight = _gradient(16, 32), _weight(16, 32)
    plain = _norm(make.update(weight, gradient))
    of_gradient = _power(_norm(make.update(weight, gradient * SMALL)) / plain, SMALL)
    of_weight = _power(_norm(make.update(weight * LARGE, gradient)) / plain, LARGE)
    measured = {}
    for fan_out, fan_in in SIZES:
        update = _norm(make.update(_weight(fan_out, fan_in), _gradient(fan_out, fan_in)))
        measured[fan_out, fan_in] = math.sqrt(fan_out / fan_in) / update
    spreads = {name: _spread(family, measured) for name, family in FAMILIES.items()}
    lines = [
        f"update ~ gradient^{of_gradient:.2f}, ~ parameter^{of_weight:.2f}",
        "sqrt(o/i) / update: " + ", ".join(f"{o}x{i}: {value:.4g}" for (o, i), value in measured.items()),
        "largest over smallest, divided by the rule: " + ", ".join(f"{k}: {v:.3g}" for k, v in spreads.items()),
    ]
    fitting = [
        name
        for name, family in FAMILIES.items()
        if spreads[name] < SPREAD
        and abs(of_gradient - (name == "sgd")) < POWER
        and abs(of_weight - family.relative) < POWER
    ]
    if not fitting:
        raise StructureError(
            f"no family fits {_name(optimizer)}; known: {', '.join(FAMILIES)}.  Measured:\n" + "\n".join(lines)
        )
    name = min(fitting, key=spreads.__getitem__)
    blocks, text = _blocks(make)
    return Probe(name, blocks, "\n".join([*lines, f"blocks: {text}"]))


def lint(plan: MupPlan, optimizer: Callable[..., Any], **kwargs: Any) -> tuple[str, ...]:
    """What will not transfer when a plan is trained with an optimiser: the plan's warnings, and what a probe adds.

    Args:
        plan: The plan of a model.
        optimizer: As for `probe`.
        **kwargs: For ``optimizer``.

    Returns:
        The warnings, each with a code; M008 where blocks are not updated one by one, M016 where the plan is for
        another family.

    Raises:
        StructureError: No family fits the optimiser.

    Example:
        >>> from structops.torch import StructuredLinear
        >>> from structops.torch.weights import plan
        >>> recipe = plan(StructuredLinear(64, 64, "btt"), "sgd")
        >>> [warning[:4] for warning in lint(recipe, torch.optim.Adam)]
        ['M016']
        >>> lint(recipe, torch.optim.SGD)
        ()
    """
    found = probe(optimizer, **kwargs)
    warnings = list(plan.warnings)
    if found.family != plan.rule.family.name:
        warnings.append(
            f"M016 the plan is for {plan.rule.family.name}, and {_name(optimizer)} behaves like {found.family}; "
            f"make the plan with {found.family!r}"
        )
    stacked = [row.name for row in plan if row.weight.factor.blocks > 1 and row.optimizer == plan.rule.optimizer]
    if stacked and found.blocks != "batched":
        what = "mixes the blocks of" if found.blocks == "flattened" else "refuses"
        warnings.append(
            f"M008 {_name(optimizer)} {what} factors of several blocks ({', '.join(stacked[:3])}"
            f"{', ...' if len(stacked) > 3 else ''}); structops.torch.Muon updates them one by one"
        )
    return tuple(warnings)


class _Runner:
    """Runs an optimiser on one parameter."""

    def __init__(self, optimizer: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.optimizer, self.kwargs = optimizer, kwargs

    def update(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What the gradient did in the last of some equal steps.

        Raises:
            StructureError: The optimiser raises, or what it does is not finite or nothing.
        """
        with torch.enable_grad():
            change = self._run(weight, gradient) - self._run(weight, torch.zeros_like(gradient))
        if not change.isfinite().all() or not change.any():
            raise StructureError(
                f"{_name(self.optimizer)} makes no update of a {tuple(weight.shape)} parameter, or one that is not "
                f"finite; a probe needs a positive learning rate"
            )
        return change

    def _run(self, weight: Tensor, gradient: Tensor) -> Tensor:
        parameter = nn.Parameter(weight.clone())
        before = weight
        try:
            optimizer = self.optimizer([parameter], **self.kwargs)
            for _ in range(STEPS):
                before = parameter.detach().clone()
                parameter.grad = gradient.clone()
                optimizer.step()
        except Exception as error:  # whatever the optimiser raises is the result
            raise StructureError(
                f"{_name(self.optimizer)} cannot be probed on a {tuple(weight.shape)} parameter: {error}"
            ) from error
        return parameter.detach() - before


def _blocks(make: _Runner) -> tuple[str, str]:
    """How factors of several blocks fare, and the worst difference to blocks that are alone."""
    worst = 0.0
    for b, o, i in BLOCKS:
        # Singular values from 1 to 0.1, other ones in every block: mixing blocks and orthogonalising them shows.
        gradient, weight = _full_gradient(b, o, i), _weight(o, i).repeat(b, 1, 1)
        try:
            together = make.update(weight, gradient)
        except StructureError as error:
            return "refused", str(error)
        alone = torch.stack([make.update(w, g) for w, g in zip(weight, gradient, strict=True)])
        worst = max(worst, float((together - alone).norm() / alone.norm()))
    return ("batched" if worst < 0.1 else "flattened"), f"differ by {worst:.2g} of their update from blocks alone"


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))


def _weight(fan_out: int, fan_in: int) -> Tensor:
    """A matrix of exactly the RMS of the paper's init."""
    weight = _random(fan_out, fan_in)
    return weight * (math.sqrt(min(fan_out, fan_in)) / fan_in / weight.square().mean().sqrt())


def _gradient(fan_out: int, fan_in: int) -> Tensor:
    """Of rank one and of spectral norm sqrt(i/o): its inner product with the wanted change is 1 at all sizes."""
    left, right = _random(fan_out, 1), _random(1, fan_in)
    return left @ right * (math.sqrt(fan_in / fan_out) / (left.norm() * right.norm()))


def _full_gradient(blocks: int, fan_out: int, fan_in: int) -> Tensor:
    """Blocks of full rank, alike in size so that what is relative to the size of all is the same for each."""
    left, _, right = torch.linalg.svd(_random(blocks, fan_out, fan_in), full_matrices=False)
    values = torch.logspace(0, -1, min(fan_out, fan_in), dtype=torch.float64)
    return left * (values * math.sqrt(fan_in / fan_out) / blocks) @ right


def _norm(update: Tensor) -> float:
    return float(torch.linalg.matrix_norm(update, 2))


def _power(ratio: float, of: float) -> float:
    return math.log(ratio) / math.log(of)


def _spread(family: Family, measured: dict[tuple[int, int], float]) -> float:
    ratios = [
        value / float(Rule(family.name).scale(Factor("", (o, i), fan_in=i, fan_out=o)))
        for (o, i), value in measured.items()
    ]
    return max(ratios) / min(ratios)


def _name(optimizer: Any) -> str:
    return getattr(optimizer, "__name__", type(optimizer).__name__)
