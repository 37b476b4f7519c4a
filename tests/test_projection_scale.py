"""Projection at the sizes of real models: peak memory, what slices change, and sizes that nothing divides.

Run as a program it measures one projection of a Gaussian matrix in a process of its own, as the tables of
docs/concepts/projection.md were::

    python tests/test_projection_scale.py 4096x11008 float32 "btt(blocks=8, params=0.25)" [covariance] [refine]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path


def measured(shape: tuple[int, int], dtype: str, text: str, weighted: bool, refine: int | None) -> dict[str, object]:
    """Seconds, the peak of memory beyond W and C in units of W (and C) in float32, and the error."""
    import torch

    import structops as so

    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    W = torch.empty(shape, dtype=getattr(torch, dtype)).normal_(generator=generator)
    options, unit = {}, 4 * shape[0] * shape[1]
    if weighted:
        n = shape[1]
        X = torch.randn(n, n // 8, generator=generator) * torch.linspace(1, 30, n // 8)
        C = (X @ X.T).div_(n)
        C.diagonal().add_(1)
        del X
        options, unit = {"covariance": C}, unit + 4 * n * n
    so.projection.fit(torch.eye(4), "low_rank(rank=1)", covariance=torch.eye(4))  # what is loaded only once
    page = resource.getpagesize()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    start = time.perf_counter()
    result = so.projection.fit(W, text, refine=refine, **options)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "spec": text,
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "covariance": weighted,
        "refine": refine,
        "seconds": round(seconds, 1),
        "peak": round(peak / unit, 2),
        "error": round(float(result.error), 5),
        "optimality": result.optimality,
    }


if __name__ == "__main__":
    size, dtype_name, spec, *rest = sys.argv[1:]
    rows, cols = map(int, size.split("x"))
    sweeps = next((int(word) for word in rest if word.isdigit()), None)
    print(json.dumps(measured((rows, cols), dtype_name, spec, "covariance" in rest, sweeps)), flush=True)
