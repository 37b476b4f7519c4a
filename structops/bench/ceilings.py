"""What this device reaches at best: a large matrix product and a large copy, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from structops.bench.contestants import waiting
from structops.bench.roofline import Ceilings

SIZES = {"cpu": (1024, 2048, 4096), "other": (4096, 8192, 16384)}  # of the matrices, from small to large
COPIED = {"cpu": 2**28, "other": 2**31}  # bytes of an array far larger than the caches
ENOUGH = 0.3  # seconds of one product after which larger ones are not tried


def measure(dtype: str, device: str) -> Ceilings:
    """The best of several matrix products of different sizes, and of several copies."""
    return Ceilings(_flops(getattr(torch, dtype), device), _bandwidth(device))


def _kind(device: str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "other"


@torch.no_grad()
def _flops(dtype: torch.dtype, device: str) -> float:
    best = 0.0
    for size in SIZES[_kind(device)]:
        left, right = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _best(partial(torch.mm, left, right, out=out), device)
        best = max(best, 2 * size**3 / seconds)
        if 8 * seconds > ENOUGH:
            break
    return best


def _bandwidth(device: str) -> float:
    source = torch.zeros(COPIED[_kind(device)], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], Any], device: str, times: int = 5) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    wait, seconds = waiting(device), []
    for _ in range(times + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
