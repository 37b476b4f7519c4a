"""A guard against schedulers that undo the learning rates of a plan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from structops.errors import StructureError


def guard(optimizer: torch.optim.Optimizer, tolerance: float = 1e-4) -> RemovableHandle:
    """Raise before a step whose learning rates no longer stand in the ratios of the plan.

    A scheduler that multiplies keeps the ratios: ``LambdaLR``, ``CosineAnnealingLR`` with ``eta_min=0``,
    ``LinearLR``.  One that sets rates undoes muP: ``CyclicLR`` and ``OneCycleLR`` with one number, a positive
    ``eta_min``, a loop that writes ``group["lr"] = ...``.  Groups that start with the same ``lr / lr_scale`` must keep
    it the same; groups without ``lr_scale`` are free.

    Args:
        optimizer: An optimiser over the groups of `structops.torch.param_groups`.
        tolerance: Relative difference that is let pass.

    Returns:
        A handle; its ``remove()`` takes the guard off.

    Raises:
        StructureError: No group has ``lr_scale``.

    Example:
        >>> from structops.torch import StructuredLinear, param_groups
        >>> optimizer = torch.optim.AdamW(param_groups(StructuredLinear(64, 64, "btt"), lr=1e-3))
        >>> handle = guard(optimizer)
        >>> optimizer.step()
        >>> optimizer.param_groups[1]["lr"] = 1e-3
        >>> try:
        ...     optimizer.step()
        ... except StructureError as error:
        ...     print(str(error).partition(";")[0])
        learning rates no longer stand in the ratios of the plan: lr / lr_scale is 0.001 in group 0, 0.00025 in group 1
    """
    alike: list[tuple[float, list[int]]] = []
    for k, group in enumerate(optimizer.param_groups):
        if "lr_scale" in group:
            # A scheduler with warm-up may have set all rates to zero already; it keeps the first ones.
            rate = float(group.get("initial_lr", group["lr"])) / group["lr_scale"]
            for other, members in alike:
                if math.isclose(rate, other, rel_tol=tolerance):
                    members.append(k)
                    break
            else:
                alike.append((rate, [k]))
    if not alike:
        raise StructureError("no group has 'lr_scale'; build the optimiser from structops.torch.param_groups or split")

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        for _, members in alike:
            rates = {k: float(groups[k]["lr"]) / groups[k]["lr_scale"] for k in members}
            low, high = min(rates.values()), max(rates.values())
            if not math.isclose(low, high, rel_tol=tolerance):
                raise StructureError(
                    "learning rates no longer stand in the ratios of the plan: lr / lr_scale is "
                    + ", ".join(f"{rate:.4g} in group {k}" for k, rate in rates.items())
                    + "; use a scheduler that multiplies, such as LambdaLR, or set lr to rate * lr_scale in every group"
                )

    return optimizer.register_step_pre_hook(check)
