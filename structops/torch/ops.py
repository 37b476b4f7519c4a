"""Chains as operators of PyTorch, ``torch.ops.structops``: seen by compilers as one call.

``chain_product`` has rules for fake tensors, autograd, autocast and vmap.  `apply` is what layers call: that operator
while a compiler looks on, else an autograd function, which took 130 of 460 microseconds off a small step.  A second
derivative runs through the plain products of `structops.contract`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from structops.chain import Chain
from structops.contract import contract
from structops.torch.chunks import ChunkedChain, Limits
from structops.torch.fused import FusedPair

_FORWARD = "(Tensor x, Tensor[] factors, str chain, bool keep) -> (Tensor, Tensor)"
_BACKWARD = "(Tensor grad, Tensor x, Tensor kept, Tensor[] factors, str chain, bool[] needed) -> Tensor[]"
_FUSED = "; fused"
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def to_text(chain: Chain) -> str:
    """A chain as text, to which `how_text` is added: graphs of compilers hold all they need.

    Example:
        >>> to_text(Chain("cd, bd, ac -> ab", dict(a=2, b=3, c=4, d=5))) + how_text((2**24, 2047, 63))
        'cd, bd, ac -> ab; a=2, b=3, c=4, d=5; 16777216 2047 63'
    """
    return f"{chain.pattern}; " + ", ".join(f"{label}={size}" for label, size in dict(chain.sizes).items())


def how_text(limits: Limits | None) -> str:
    """How to run a chain, as text: in chunks within limits or, if None, as one fused kernel."""
    return _FUSED if limits is None else f"; {limits[0]} {limits[1]} {limits[2]}"


@cache
def from_text(text: str) -> ChunkedChain | FusedPair:
    """The chain of a text, ready to run; derived once."""
    pattern, sizes, how = text.split("; ")
    chain = Chain(pattern, {label: int(size) for label, size in re.findall(r"(\w)=(\d+)", sizes)})
    if text.endswith(_FUSED):
        return FusedPair(chain)
    most_bytes, most_tokens, least_tokens = map(int, how.split())
    return ChunkedChain(chain, (most_bytes, most_tokens, least_tokens))


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type)


def apply(x: Tensor, factors: Sequence[Tensor], chain: str, learns: bool, keep: bool) -> Tensor:
    """The chain times the rows of x, as layers call it.

    Args:
        x: Shape (tokens, in_features).
        factors: Stored factors, (blocks, fan_out, fan_in) each.
        chain: The chain, and how to run it, as `to_text` and `how_text` give it.
        learns: Whether a gradient may be asked for.
        keep: Whether to keep the intermediates for it; otherwise they are computed again.
    """
    if torch.compiler.is_compiling() or autocasts(x):
        return chain_product(x, factors, chain, learns and keep)[0]
    if learns:
        return _Eager.apply(chain, keep, x, *factors)
    return from_text(chain).forward(x, factors, False)[0]


@torch.library.custom_op("structops::chain_product", mutates_args=(), schema=_FORWARD)
def chain_product(x: Tensor, factors: Sequence[Tensor], chain: str, keep: bool) -> tuple[Tensor, Tensor]:
    """The chain times the rows of x, and what its gradient needs beside x.

    Args:
        x: Shape (tokens, in_features).
        factors: Stored factors, (blocks, fan_out, fan_in) each, of the dtype of x.
        chain: The chain, and how to run it, as `to_text` and `how_text` give it.
        keep: Whether to keep the intermediates for the gradient; otherwise they are computed again.
    """
    return from_text(chain).forward(x, factors, keep)


@torch.library.custom_op("structops::chain_product_backward", mutates_args=(), schema=_BACKWARD)
def chain_product_backward(
    grad: Tensor, x: Tensor, kept: Tensor, factors: Sequence[Tensor], chain: str, needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x and of every factor; empty tensors where not needed."""
    return from_text(chain).backward(grad, x, kept, factors, needed)


@chain_product.register_fake
def _(x: Tensor, factors: Sequence[Tensor], chain: str, keep: bool) -> tuple[Tensor, Tensor]:
    run = from_text(chain)
    return x.new_empty(x.shape[0], run.out_features), x.new_empty(x.shape[0] * run.kept if keep else 0)


@chain_product_backward.register_fake
def _(
    grad: Tensor, x: Tensor, kept: Tensor, factors: Sequence[Tensor], chain: str, needed: Sequence[bool]
) -> list[Tensor]:
    inputs = [x, *factors]
    return [i.new_empty(i.shape) if need else x.new_empty(0) for i, need in zip(inputs, needed, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, factors, ctx.chain, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *factors)


def _gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    dx, *gradients = _gradients(ctx, grad, chain_product_backward)
    return dx, gradients, None, None


class _Eager(torch.autograd.Function):
    """`chain_product` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, chain: str, keep: bool, x: Tensor, *factors: Tensor) -> Tensor:
        y, kept = from_text(chain).forward(x, factors, keep)
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, kept, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        def run(grad: Tensor, x: Tensor, kept: Tensor, factors: list[Tensor], chain: str, needed: list[bool]) -> Any:
            return from_text(chain).backward(grad, x, kept, factors, needed)

        return None, None, *_gradients(ctx, grad, run)


def _gradients(ctx: Any, grad: Tensor | None, run: Callable[..., Sequence[Tensor]]) -> list[Tensor | None]:
    """Those of x and the factors, from what was saved: by ``run``, or in a form that can be differentiated again."""
    x, kept, *factors = ctx.saved_tensors
    needed = [tensor.requires_grad for tensor in (x, *factors)]
    if grad is None:
        return [None] * len(needed)
    if torch.is_grad_enabled():
        return _differentiable(from_text(ctx.chain).chain, factors, x, grad)
    found = run(grad, x, kept, factors, ctx.chain, needed)
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


def _differentiable(chain: Chain, factors: list[Tensor], x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """The gradients of x and the factors as functions that can be differentiated once more."""
    inputs = [x, *factors]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(contract(chain, factors, x), wanted, grad, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


chain_product.register_autograd(_gradient, setup_context=_save)


@chain_product.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, factors: Sequence[Tensor], chain: str, keep: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    def at(tensor: Tensor, dim: int | None, k: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, k)

    results = [
        chain_product(
            at(x, in_dims[0], k), [at(f, d, k) for f, d in zip(factors, in_dims[1], strict=True)], chain, keep
        )
        for k in range(info.batch_size)
    ]
    return (torch.stack([y for y, _ in results]), torch.stack([kept for _, kept in results])), (0, 0)


def _register_autocast(device: str, key: str) -> None:
    def cast(x: Tensor, factors: Sequence[Tensor], chain: str, keep: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return chain_product(x.to(dtype), [factor.to(dtype) for factor in factors], chain, keep)

    _library.impl("chain_product", cast, key)


_library = torch.library.Library("structops", "FRAGMENT")
for _device, _key in _AUTOCAST.items():
    _register_autocast(_device, _key)
