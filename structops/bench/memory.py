"""Memory that a step takes in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> float:
    """Bytes that autograd keeps for the backward pass: every storage once, those of the parameters not at all."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward(x)  # held until all storages are counted, so that no address is used twice
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del y
    return float(sum(size for address, size in kept.items() if address not in owned))


def peak_bytes(step: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a step on a CUDA device holds at most, beyond what is there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)
