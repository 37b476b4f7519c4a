"""Parameter groups with the learning rate of every factor, for any torch optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from structops.errors import StructureError
from structops.mup import MupPlan, PlanRow, Rule
from structops.torch.weights import KERNEL, TRANSPOSED, rows_of
from structops.torch.weights import plan as plan_of


def param_groups(
    model: nn.Module,
    plan: MupPlan | None = None,
    *,
    lr: float = 3e-3,
    optimizer: str | Rule = "adam",
    base: int | str | nn.Module | None = None,
    weight_decay: float = 0.0,
    eps: float | None = None,
    structure_aware: bool = True,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim``: every parameter once, with the learning rate that its factor's shape asks for.

    Without a plan one is made here: a factor of a `StructuredLinear` gets ``lr`` times the multiplier of
    `structops.mup.scales`; weights of ``nn.Linear`` and everything else get ``lr``.  That is relative to the dense
    layers replaced, so a rate tuned for the dense model carries over.  With ``base``, weights are also scaled with
    their input size (muP transfer over width).

    Args:
        model: Any module, also a single layer, compiled, wrapped in DDP, or sharded by FSDP2.
        plan: The plan of the model; see `structops.torch.plan`.
        lr: Learning rate of the plan's reference.
        optimizer: Name of the optimiser's family or a `Rule`; see `structops.mup.FAMILY`.  Not with a plan.
        base: As in `structops.torch.plan`.  Not with a plan.
        weight_decay: Decay of a dense weight; that of others follows the plan.  By default a factor's is divided by
            its learning-rate scale and by the number of factors, so that the layer decays as fast as the dense one;
            biases, gains and scalars do not decay.
        eps: Adam's eps, scaled by the plan; left to the optimiser if not given.
        structure_aware: If false, factors get the learning rate of the dense layer: the naive baseline of the paper.
        named: Whether ``params`` holds (name, parameter) pairs, so that the optimiser's state knows the names.

    Returns:
        Groups with ``params``, ``lr``, ``lr_scale`` and ``weight_decay``, merged by and sorted by the last two; never
        empty.

    Raises:
        StructureError: No rule for the optimiser, the base model lacks a layer, ``model`` is no module, or the plan
            is that of another model.

    Example:
        >>> import torch
        >>> from structops.torch import StructuredLinear
        >>> layer = StructuredLinear(1024, 1024, "btt")
        >>> [(group["lr_scale"], len(group["params"])) for group in param_groups(layer, lr=1e-3)]
        [(1.0, 1), (16.0, 2)]
    """
    if plan is None:
        rule = optimizer if isinstance(optimizer, Rule) else Rule(optimizer)
        plan = plan_of(model, rule if structure_aware else replace(rule, structure_aware=False), base=base)
    return grouped(model, plan, lr, weight_decay, eps=eps, named=named)


def split(
    model: nn.Module,
    plan: MupPlan,
    *,
    lr: float = 2e-2,
    adam_lr: float = 3e-3,
    weight_decay: float = 0.0,
    named: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for an optimiser of matrices such as Muon, and for the Adam beside it.

    Args:
        model: The module.
        plan: A plan for an optimiser of matrices, such as ``plan(model, "muon")``; its rows say which they are.
        lr: Learning rate of the optimiser of matrices.
        adam_lr: Learning rate of Adam for embeddings, readout, biases, gains and scalars.
        weight_decay: As in `param_groups`.
        named: As in `param_groups`.

    Returns:
        The groups of both, with the keys of `param_groups`; a list without parameters is empty.

    Raises:
        StructureError: The plan is for an optimiser that takes all parameters, or is that of another model.

    Example:
        >>> from torch import nn
        >>> from structops.torch import StructuredLinear, plan
        >>> model = nn.Sequential(nn.Embedding(10, 16), StructuredLinear(16, 16, "btt"))
        >>> muon, adam = split(model, plan(model, "muon"))
        >>> [len(group["params"]) for group in muon], [len(group["params"]) for group in adam]
        ([2], [2])
    """
    if not plan.rule.family.matrices_only:
        raise StructureError(
            f"split takes a plan for an optimiser of matrices such as plan(model, 'muon'), got one for "
            f"{plan.rule.optimizer!r}, which takes all parameters: use param_groups"
        )
    matrices = grouped(model, plan, lr, weight_decay, lambda row: row.optimizer != "adam", named=named)
    return matrices, grouped(model, plan, adam_lr, weight_decay, lambda row: row.optimizer == "adam", named=named)


def grouped(
    model: nn.Module,
    plan: MupPlan,
    lr: float,
    weight_decay: float,
    keep: Callable[[PlanRow], bool] = lambda row: True,
    *,
    eps: float | None = None,
    named: bool = False,
) -> list[dict[str, Any]]:
    """The parameters whose rows are kept, merged by learning-rate scale, weight decay, eps and layout, in that order.

    Raises:
        StructureError: The plan is that of another model.
    """
    merged: dict[tuple[Any, ...], list[Any]] = {}
    for row, parameter in rows_of(model, plan):
        if keep(row):
            key = row.lr_scale, weight_decay * row.wd_scale, row.eps_scale, *_layout(row)
            merged.setdefault(key, []).append((row.name, parameter) if named else parameter)
    groups = []
    for (lr_scale, decay, eps_scale, layout, blocks), parameters in sorted(merged.items(), key=lambda item: item[0]):
        group = {"params": parameters, "lr": lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay}
        if eps is not None:
            group["eps"] = eps * eps_scale
        if layout:
            group |= {"layout": layout, "blocks": blocks}
        groups.append(group)
    return groups


def _layout(row: PlanRow) -> tuple[str, int]:
    """How a parameter holds its matrices, if not on its last two axes; only an optimiser of matrices needs to know."""
    factor = row.weight.factor
    orthogonalised = row.optimizer.startswith("muon") and factor.name in (KERNEL, TRANSPOSED)
    return (factor.name, factor.blocks) if orthogonalised else ("", 1)
