"""FSDP2: on which axis of a factor to shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.weak import WeakIdKeyDictionary

from structops.errors import StructureError
from structops.torch.layer import StructuredLinear


def shard_placement(model: nn.Module, shards: int | None = None) -> Callable[[nn.Parameter], Shard | None]:
    """The ``shard_placement_fn`` for ``fully_shard``: every factor on an axis that the processes divide.

    FSDP2 shards the first axis.  Of a factor ``(blocks, fan_out, fan_in)`` that is the blocks, of which low rank,
    Kronecker products and tensor-trains have one: all processes but the first would hold padding.  This function names
    blocks if the processes divide them, else fan-out, else fan-in.  If they divide none of the three, it leaves the
    blocks, the only axis that FSDP2 shards unevenly.  Other parameters are sharded as FSDP2 does it.

    An axis that tensor parallelism has cut already comes last, and counts with what is left of it.

    Args:
        model: The model, before ``fully_shard``; it may be on the meta device, and tensor-parallel.
        shards: Number of processes over which FSDP2 shards, by default all.

    Returns:
        A function of a parameter of this model.  It knows the parameters by identity and does not keep them alive.

    Raises:
        StructureError: ``shards`` is no positive whole number, or is not given where there is no process group.

    Example:
        >>> model = StructuredLinear(64, 64, "low_rank(rank=8)")
        >>> place = shard_placement(model, shards=4)
        >>> [place(factor) for factor in model.factors]
        [Shard(dim=1), Shard(dim=1)]
    """
    if shards is None:
        if not torch.distributed.is_initialized():
            raise StructureError("shard_placement needs a process group, or the number of processes as shards=")
        shards = torch.distributed.get_world_size()
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise StructureError(f"shard_placement: shards is the number of processes, at least 1, got {shards!r}")
    number = shards
    factors = WeakIdKeyDictionary()
    for layer in model.modules():
        if isinstance(layer, StructuredLinear):
            for parameter in layer.factors:
                factors[parameter] = None

    def place(parameter: nn.Parameter) -> Shard | None:
        """The axis for a parameter, or None for FSDP2's own."""
        return _axis(parameter, number) if parameter in factors else None

    return place


def _axis(parameter: nn.Parameter, shards: int) -> Shard | None:
    cut: set[int] = set()
    shape: Sequence[int] = parameter.shape
    if isinstance(parameter, DTensor):
        cut = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
        shape = parameter.to_local().shape
    axes = sorted(range(parameter.ndim), key=lambda axis: axis in cut)
    return next((Shard(axis) for axis in axes if shape[axis] % shards == 0), None)
