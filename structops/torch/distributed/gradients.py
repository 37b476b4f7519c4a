"""Gradients and parameter groups where plain tensors and DTensors of several meshes meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from structops.errors import StructureError


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""Scale gradients so that their common norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    That one fails where some gradients are DTensors and others plain tensors, or DTensors of other meshes, as in
    models of which tensor parallelism takes a part of the layers.  Here the norms of each kind are taken first.

    Args:
        parameters: Parameters, in the same order in every process.
        max_norm: The largest norm.
        norm_type: p of the p-norm, ``inf`` for the largest entry.

    Returns:
        The norm before, a plain tensor, the same in every process.

    Raises:
        StructureError: ``max_norm`` is negative.

    Cost:
        One norm per parameter, one all-reduce per parameter that is a DTensor.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4))
        >>> weight.grad = torch.ones(4)
        >>> float(clip_grad_norm_([weight], 1.0)), round(float(weight.grad[0]), 4)
        (2.0, 0.5)
    """
    if not max_norm >= 0:
        raise StructureError(f"clip_grad_norm_: max_norm must be at least 0, got {max_norm!r}")
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(_mesh(parameter.grad), []).append(parameter)
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds.values()]
    norms = [_whole(torch.nn.utils.get_total_norm(kind, norm_type)) for kind in gradients]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    for kind in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total


def split_by_mesh(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of which each has plain tensors only, or DTensors of one mesh only.

    Optimisers that update many tensors at once (``foreach``, the default on GPUs, and ``fused``) refuse mixtures
    within a group.  The other entries of a group are those of the group it came from.

    Args:
        groups: Groups such as those of `structops.torch.param_groups`, named or not.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4))
        >>> [len(group["params"]) for group in split_by_mesh([{"params": [weight], "lr": 0.1}])]
        [1]
    """
    found = []
    for group in groups:
        kinds: dict[Any, list[Any]] = {}
        for entry in group["params"]:
            kinds.setdefault(_mesh(entry[1] if isinstance(entry, tuple) else entry), []).append(entry)
        found += [{**group, "params": kind} for kind in kinds.values()]
    return found


def _mesh(tensor: Tensor) -> Any:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
