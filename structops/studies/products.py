"""The table of structures at one size: counts, error against the dense matrix, and time per product."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from structops.errors import StructureWarning
from structops.sampling import draw
from structops.spec import registry, structure

SPECS = {"tt": "tt(rank=4)"}  # where the default arguments would repeat another row


@dataclass(frozen=True)
class ProductRow:
    """One structure at one size.

    Attributes:
        structure: The spec.
        num_params: Parameters.
        macs: Multiply-accumulates per vector.
        ratio: MACs relative to dense.
        error: Frobenius norm of the difference to the product with the dense matrix, relative to the latter, in
        float32.
        microseconds: Median time of the product as a layer computes it, for all ``tokens`` vectors.
    """

    structure: str
    num_params: int
    macs: int
    ratio: float
    error: float
    microseconds: float


def product_rows(size: int, tokens: int, backend: str, seed: int) -> Iterator[ProductRow]:
    """A row a structure of the registry, at ``size x size``."""
    for name in registry():
        spec = structure(SPECS.get(name, name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StructureWarning)
            plan = spec.plan(size, size)
        factors = draw(plan, **_seed(backend, seed))
        x = _normal((tokens, size), backend, seed + 1)
        exact = _compiled(lambda factors, x, plan=plan: x @ plan.operator(factors).to_dense().T, backend)(factors, x)
        run = _compiled(plan.apply, backend)
        error = float(((run(factors, x) - exact) ** 2).sum() ** 0.5 / (exact**2).sum() ** 0.5)
        seconds = _median_time(run, factors, x)
        yield ProductRow(str(spec), plan.num_params, plan.macs, plan.macs / size**2, error, 1e6 * seconds)


def _seed(backend: str, seed: int) -> dict[str, Any]:
    if backend == "torch":
        import torch

        return {"generator": torch.Generator().manual_seed(seed)}
    import jax

    return {"key": jax.random.key(seed)}


def _normal(shape: tuple[int, ...], backend: str, seed: int) -> Any:
    if backend == "torch":
        import torch

        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    import jax

    return jax.random.normal(jax.random.key(seed), shape)


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The function as users run it, waiting for its result: in JAX under jit."""
    if backend == "torch":
        return function
    import jax

    compiled = jax.jit(function)
    return lambda *arguments: compiled(*arguments).block_until_ready()


def _median_time(run: Callable[..., Any], *arguments: Any, repeats: int = 15) -> float:
    """Median seconds of a call, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
