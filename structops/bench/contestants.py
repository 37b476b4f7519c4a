"""The contestants in torch: our layer, the dense one, and other ways to compute the structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structops.bench.cases import Case
from structops.bench.contestant import Absent, Contestant, sample
from structops.bench.equations import copies, equations, why_no_copies
from structops.bench.memory import peak_bytes, saved_bytes
from structops.chain import Chain
from structops.contract import store, unstore
from structops.errors import BackendError, StructureWarning
from structops.torch import StructuredLinear


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, the same for every contestant."""

    case: Case
    layer: StructuredLinear
    x: Tensor
    cotangent: Tensor

    @classmethod
    def of(cls, case: Case, seed: int) -> Problem:
        """Factors as those of a new layer, and Gaussian vectors; in training they require gradients."""
        dtype, device = getattr(torch, case.dtype), torch.device(case.device)
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (case.in_features, case.out_features)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StructureWarning)  # the case has it
            layer = StructuredLinear(
                *sizes, case.structure, bias=False, device=device, dtype=dtype, generator=generator
            ).requires_grad_(case.run == "train")
        x, cotangent = (
            torch.randn((case.tokens, size), generator=generator, device=device, dtype=dtype) for size in sizes
        )
        return cls(case, layer, x.requires_grad_(case.run == "train"), cotangent)

    @property
    def chain(self) -> Chain:
        """The pattern.

        Raises:
            Absent: The structure is no chain.
        """
        if self.case.chain is None:
            raise Absent("the structure is no chain of factors")
        return self.case.chain

    @cached_property
    def matrix(self) -> Tensor:
        """The dense matrix."""
        with torch.no_grad():
            return self.layer.operator().to_dense().contiguous()

    def leaf(self, array: Tensor) -> Tensor:
        """Parameters of its own for a contestant, row-major."""
        return array.detach().clone(memory_format=torch.contiguous_format).requires_grad_(self.case.run == "train")

    def numbers(self) -> list[np.ndarray]:
        """x, the cotangent and the stored factors, for other libraries."""
        return [_numpy(array) for array in (self.x, self.cotangent, *self.layer.factors)]


@dataclass(frozen=True)
class Way:
    """A product, the parameters it uses, and their gradients as those of the stored factors."""

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    stored: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple


def _ours(problem: Problem) -> Way:
    return Way(problem.layer, tuple(problem.layer.factors))


def _dense(problem: Problem) -> Way:
    case = problem.case
    linear = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.matrix, requires_grad=case.run == "train")
    return Way(linear, (linear.weight,), lambda gradients: ())  # the gradient of another parameter


def _einsum(problem: Problem) -> Way:
    chain, arrays = problem.chain, _textbook(problem)
    product = einsum_product(chain, problem.case.tokens)
    return Way(lambda x: product(x, *arrays), arrays, lambda gradients: store(chain, gradients))


def _compiled_einsum(problem: Problem) -> Way:
    chain, arrays = problem.chain, _textbook(problem)
    torch.compiler.reset()  # else compiling gives up without a word after a few sizes
    product = torch.compile(einsum_product(chain, problem.case.tokens), fullgraph=True, dynamic=False)
    way = Way(lambda x: product(x, *arrays), arrays, lambda gradients: store(chain, gradients))
    try:
        _step(problem, way)()
    except Exception as error:  # whatever a compiler may raise
        cause = getattr(error, "inner_exception", error)
        summary = str(cause).strip().partition("\n")[0][:200]
        raise Absent(f"torch.compile failed: {type(cause).__name__}: {summary}") from None
    return way


def _copying(problem: Problem) -> Way:
    chain, factors = problem.chain, tuple(problem.leaf(factor) for factor in problem.layer.factors)
    if reason := why_no_copies(chain):
        raise Absent(reason)
    product = copying_product(chain, problem.case.tokens)
    return Way(lambda x: product(x, *factors), factors)


WAYS: dict[str, Callable[[Problem], Way]] = {
    "dense": _dense,
    "structops": _ours,
    "einsum": _einsum,
    "compiled einsum": _compiled_einsum,
    "copying": _copying,
    "merged": _dense,
}


def _textbook(problem: Problem) -> tuple[Tensor, ...]:
    """Factors with an axis a label, in the order in which the pattern writes them."""
    return tuple(problem.leaf(array) for array in unstore(problem.chain, list(problem.layer.factors)))


def einsum_product(chain: Chain, tokens: int) -> Callable[..., Tensor]:
    """The product as an einsum a factor: a function of x and the textbook arrays."""
    steps = equations(chain, tokens)
    padding, rows = chain.padded_in - chain.in_features, (tokens, chain.padded_out)

    def product(x: Tensor, *arrays: Tensor) -> Tensor:
        state, remaining = nn.functional.pad(x, (0, padding)) if padding else x, iter(arrays)
        for step in steps:
            operands = (state.reshape(step.shape), *([next(remaining)] if step.has_factor else []))
            state = torch.einsum(step.text, *operands)
        return state.reshape(rows)[:, : chain.out_features]

    return product


def copying_product(chain: Chain, tokens: int) -> Callable[..., Tensor]:
    """The product as batched matrix products with a copy between them: a function of x and the stored factors."""
    *before, last = copies(chain, tokens)

    def product(x: Tensor, *factors: Tensor) -> Tensor:
        state = x
        for copy, factor in zip(before, factors, strict=True):
            rows = state.view(copy.shape).permute(copy.axes).reshape(copy.rows)
            state = torch.bmm(rows, factor.mT)
        return state.view(last.shape).permute(last.axes).reshape(last.rows)

    return product


def torch_contestant(name: str, problem: Problem) -> Contestant:
    """A contestant of `WAYS`.

    Raises:
        Absent: It cannot compute this case.
    """
    way = WAYS[name](problem)
    step = _step(problem, way)
    return Contestant(name, step, lambda: _results(problem, way), lambda: _memory(name, problem, way, step))


def _step(problem: Problem, way: Way) -> Callable[[], Any]:
    forward, x, cotangent = way.forward, problem.x, problem.cotangent
    if problem.case.run == "forward":
        return lambda: forward(x)
    leaves = (x, *way.parameters)

    def train() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(x).backward(cotangent)

    return train


def _results(problem: Problem, way: Way) -> dict[str, np.ndarray]:
    y = way.forward(problem.x)
    found = {"y": y}
    if problem.case.run == "train":
        leaves = [problem.x, *way.parameters]
        found["dx"], *gradients = torch.autograd.grad(y, leaves, problem.cotangent)
        found |= {f"d{index}": gradient for index, gradient in enumerate(way.stored(gradients))}
    return {what: _numpy(array.reshape(-1)[sample(array.numel())]) for what, array in found.items()}


def _memory(name: str, problem: Problem, way: Way, step: Callable[[], Any]) -> dict[str, float]:
    """What autograd keeps, in training and where it can be seen; on a CUDA device also the peak."""
    found = {}
    if problem.case.run == "train" and name != "compiled einsum":
        found["saved"] = saved_bytes(way.forward, problem.x, way.parameters)
    if problem.x.is_cuda:
        for leaf in (problem.x, *way.parameters):
            leaf.grad = None
        found["peak"] = peak_bytes(step, problem.x.device)
    return found


def _numpy(array: Tensor) -> np.ndarray:
    wide = torch.float64 if array.dtype == torch.float64 else torch.float32
    return array.detach().to("cpu", wide).numpy()


def check_device(device: str) -> None:
    """The device exists and computes.

    Raises:
        BackendError: It does not; the message has torch's reason.
    """
    try:
        kind = torch.device(device).type
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(f"torch cannot compute on device {device!r}: {reason}; expected cpu or cuda") from None
    if kind not in ("cpu", str(torch.accelerator.current_accelerator() or "cpu").partition(":")[0]):
        raise BackendError(f"expected a device such as cpu or cuda, got {device!r}")


def waiting(device: str) -> Callable[[], Any]:
    """What waits until a device has finished; nothing for the CPU."""
    on = torch.device(device)
    return (lambda: None) if on.type == "cpu" else lambda: torch.accelerator.synchronize(on)
