"""The product of a layer: which of the ways to compute it, decided by sizes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structops._array import pad
from structops.chain import Chain
from structops.contract import products
from structops.errors import ShapeError
from structops.merging import CPU, GPU, Merged, plans
from structops.spec import ChainPlan, Plan
from structops.torch import ops
from structops.torch.chunks import ChunkedChain, tuning
from structops.torch.ops import how_text, to_text
from structops.torch.pair import pair_of
from structops.torch.triton_pair import runs_here

_CHUNKED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Product:
    """``A x`` on the last axis of x, from the stored factors of a plan.

    Args:
        plan: The structure at its size.
        recompute: Whether the backward pass computes the intermediates again instead of keeping them.
    """

    def __init__(self, plan: Plan, recompute: bool = False) -> None:
        self.plan, self.recompute = plan, recompute
        self.in_features = plan.in_features
        self.on_cpu: tuple[tuple[int, Way], ...] = ()
        self.on_gpu: tuple[tuple[int, Way], ...] = ()
        if isinstance(plan, ChainPlan):
            self.on_cpu, self.on_gpu = (
                tuple((least, Way(merged, recompute)) for least, merged in reversed(plans(plan.chain, machine)))
                for machine in (CPU, GPU)
            )

    def __call__(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """The product.

        Raises:
            ShapeError: The last axis of x is not ``in_features`` long.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(f"expected x of shape (..., {self.in_features}), got {tuple(x.shape)}")
        ways = self.on_cpu if x.device.type == "cpu" else self.on_gpu
        if not ways:
            y = self.plan.product(factors, x)
            # Fourier transforms do not take part in autocast, and layers after this one expect what others return.
            lowers = y.dtype == torch.float32 and ops.autocasts(x)
            return y.to(torch.get_autocast_dtype(x.device.type)) if lowers else y
        if len(ways) == 1 or torch.compiler.is_exporting():  # an exported program is for any number of tokens
            return ways[-1][1](factors, x)
        tokens = x.numel() // self.in_features
        return next(way for least, way in ways if tokens >= least)(factors, x)


class Way:
    """One way to compute a chain: with some factors multiplied together in advance, or none.

    Args:
        merged: The chain, and how its factors are made.
        recompute: As for `Product`.
    """

    def __init__(self, merged: Merged, recompute: bool) -> None:
        chain = merged.chain
        self.chain, self.recompute = chain, recompute
        self.merged = merged if any(merged.equations) else None
        self.moves = chain.moves
        self.padding = chain.padded_in - chain.in_features
        # Where nothing is copied, chunks have nothing to win, unless they shall not keep the intermediates.
        self.chunked = (recompute or any(move.copies for move in chain.strided_moves)) and ChunkedChain.supports(chain)
        self.text = to_text(chain)
        self.is_pair = self.chunked and pair_of(chain) is not None
        self.numbers = sum(chain.intermediate_widths) + chain.out_features
        self.patience = _patience(chain)

    def __call__(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """The product with x (..., in_features), which is not checked."""
        if self.merged is not None:
            factors = self.merged.factors(factors)
        if self.padding:
            x = pad(x, [(0, self.padding)])
        # Small layers have no time to ask for more than the size.
        y = self._chunked(factors, x) if self.chunked and self._is_large(x, learns=True) else None
        if y is None:
            y = products(self.moves, factors, x)
        if self.chain.padded_out != self.chain.out_features:
            y = y[:, : self.chain.out_features]
        return y if x.ndim == 2 else y.reshape((*x.shape[:-1], self.chain.out_features))

    def _chunked(self, factors: Sequence[Tensor], x: Tensor) -> Tensor | None:
        """The product in chunks of tokens (tokens, padded_out), or None where the plain products are better."""
        learns = torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors))
        if not self._is_large(x, learns) or not self._is_plain(factors, x):
            return None
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        fused = tuning.fused and self.is_pair and runs_here(x)
        text = self.text + how_text(None if fused else tuning.limits)
        return ops.apply(rows, factors, text, learns, not (fused or self.recompute))

    def _is_large(self, x: Tensor, learns: bool) -> bool:
        """Whether chunks pay; with gradients they do so earlier."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # programs shall run without structops
            return False
        if learns and self.recompute:
            return True
        patience = self.patience[0 if learns else 1]
        return x.numel() // x.shape[-1] * self.numbers >= tuning.kernel_numbers * patience

    def _is_plain(self, factors: Sequence[Tensor], x: Tensor) -> bool:
        """Whether nothing but values and gradients of plain tensors is asked for."""
        if x.dtype not in _CHUNKED:
            return False
        if any(factor.dtype != x.dtype for factor in factors) and not ops.autocasts(x):
            return False
        if torch.compiler.is_compiling():
            return True
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        return not forward_mode and all(
            type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            for tensor in (x, *factors)
        )


def _patience(chain: Chain) -> tuple[int, int]:
    """How many times `Tuning.kernel_numbers` it takes for chunks to win, with gradients and without.

    Measured on the machine of docs/speed.md.  Plain products of shared factors copy nothing.  Those of batched factors
    copy the output alone forward, which takes long only where that comes in many blocks; and states backward.
    """
    if chain.moves is not chain.strided_moves:
        return 96, 192
    return (1, 4) if chain.factors[-1].blocks > 16 else (1, 64)
