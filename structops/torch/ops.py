"""Chains as operators of PyTorch, ``torch.ops.structops``: seen by compilers and exporters as one call.

``chain_product`` has rules for fake tensors, autograd, autocast and vmap.  A second derivative runs through the plain
products of `structops.contract`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from structops.chain import Chain
from structops.contract import contract
from structops.torch.chunks import ChunkedChain
from structops.torch.fused import FusedPair

_FORWARD = "(Tensor x, Tensor[] factors, str chain, bool keep) -> (Tensor, Tensor)"
_BACKWARD = "(Tensor grad, Tensor x, Tensor kept, Tensor[] factors, str chain, bool[] needed) -> Tensor[]"


_FUSED = "; fused"


def to_text(chain: Chain, fused: bool = False) -> str:
    """A chain, and how to run it, as text: graphs and exported programs hold all they need.

    Example:
        >>> to_text(Chain("cd, bd, ac -> ab", dict(a=2, b=3, c=4, d=5)))
        'cd, bd, ac -> ab; a=2, b=3, c=4, d=5'
    """
    sizes = ", ".join(f"{label}={size}" for label, size in dict(chain.sizes).items())
    return f"{chain.pattern}; {sizes}{_FUSED if fused else ''}"


@cache
def from_text(text: str) -> ChunkedChain | FusedPair:
    """The chain of a text, ready to run; derived once."""
    pattern, sizes, *fused = text.split("; ")
    chain = Chain(pattern, {label: int(size) for label, size in re.findall(r"(\w)=(\d+)", sizes)})
    return FusedPair(chain) if fused else ChunkedChain(chain)


@torch.library.custom_op("structops::chain_product", mutates_args=(), schema=_FORWARD)
def chain_product(x: Tensor, factors: Sequence[Tensor], chain: str, keep: bool) -> tuple[Tensor, Tensor]:
    """The chain times the rows of x, and what its gradient needs beside x.

    Args:
        x: Shape (tokens, in_features).
        factors: Stored factors, (blocks, fan_out, fan_in) each, of the dtype of x.
        chain: The chain as `to_text` gives it.
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
    x, kept, *factors = ctx.saved_tensors
    count = len(factors)
    if grad is None:
        return None, [None] * count, None, None
    if torch.is_grad_enabled():
        dx, *gradients = _differentiable(from_text(ctx.chain).chain, factors, x, grad)
    else:
        needed = [tensor.requires_grad for tensor in (x, *factors)]
        dx, *gradients = chain_product_backward(grad, x, kept, factors, ctx.chain, needed)
        dx, *gradients = [g if need else None for g, need in zip((dx, *gradients), needed, strict=True)]
    return dx, gradients, None, None


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
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
