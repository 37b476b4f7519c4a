"""A pair of factors as one Triton kernel, with the interface of `structops.torch.chunks.ChunkedChain`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structops.chain import Chain
from structops.errors import PatternError
from structops.torch.pair import Pair, pair_of
from structops.torch.triton_pair import fused_pair, fused_pair_backward


class FusedPair:
    """The product with every row of x in one kernel.  Nothing is kept for the gradient but x.

    Args:
        chain: A chain that is a pair; see `structops.torch.pair.pair_of`.
    """

    kept = 0

    def __init__(self, chain: Chain) -> None:
        pair = pair_of(chain)
        if pair is None:
            raise PatternError(
                f"expected two factors without shared labels, copies or padding, got {chain}; chunks run any"
            )
        self.chain, self.out_features = chain, chain.out_features
        self.pair: Pair = pair

    def forward(self, x: Tensor, factors: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
        """The product, and an empty tensor: there is nothing to keep."""
        y = x.new_empty(x.shape[0], self.out_features)
        fused_pair(self.pair.x.of(x), *self._views(factors), out=self.pair.y.of(y))
        return y, x.new_empty(0)

    def backward(
        self, grad: Tensor, x: Tensor, kept: Tensor, factors: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of x and of both factors, each an empty tensor where it is not ``needed``."""
        seen = self.pair.y.of(grad.contiguous())
        gradients = fused_pair_backward(seen, self.pair.x.of(x), *self._views(factors), needs=needed)
        views = (self.pair.x, self.pair.first, self.pair.second)
        return [
            x.new_empty(0) if gradient is None else view.back(gradient, tuple(tensor.shape)).contiguous()
            for view, gradient, tensor in zip(views, gradients, (x, *factors), strict=True)
        ]

    def _views(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = factors
        return self.pair.first.of(first), self.pair.second.of(second)
