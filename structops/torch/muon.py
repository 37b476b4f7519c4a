"""Muon for factors that are stored as blocks, which ``torch.optim.Muon`` refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structops.chain import Factor
from structops.errors import StructureError
from structops.torch.weights import KERNEL, TRANSPOSED, as_blocks, from_blocks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, steepest at zero
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    r"""Momentum whose update is orthogonalised, block by block.

    The last two axes of a parameter are (fan_out, fan_in), all axes before them are blocks.  With the momentum
    \(M \leftarrow \mu M + (1 - \mu) G\) and \(U = (1 - \mu) G + \mu M\) (Nesterov), every block changes by
    \(-\eta \sqrt{\max(1, \text{fan-out} / \text{fan-in})}\) times the semi-orthogonal factor of its block of U.  It is
    ``torch.optim.Muon`` (shape factor ``"original"``) on matrices, and that of every block on three axes; plan with
    ``"muon"``.  Weight decay is decoupled and takes the learning rate of the group.

    Args:
        params: Parameters or groups with two axes or more, such as the first list of `structops.torch.split`.  A group
            may say ``layout="kernel"`` for convolutions (one matrix (out, in * kernel) for each of ``blocks``) or
            ``"transposed"``, as the groups of `split` do.
        lr: Learning rate.
        weight_decay: Decay of a step, times the learning rate.
        momentum: \(\mu\).
        nesterov: Whether the update looks ahead.
        ns_steps: Steps of the Newton-Schulz iteration, in bfloat16; singular values end between 0.7 and 1.2.

    Raises:
        StructureError: A parameter is no matrix or complex, a layout is unknown, or a number is negative; in
            ``step``, a sparse gradient.

    Cost:
        ``ns_steps`` times (2 fan_out fan_in + m^2) m multiply-accumulates a block and step, with m the smaller side;
        one buffer as large as the parameters.  Where processes hold different blocks of a DTensor, each updates its
        own and nothing is communicated; sharded otherwise, the update is gathered once and every process does it all.

    References:
        Keller Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.

    Example:
        >>> blocks = torch.nn.Parameter(torch.zeros(4, 8, 8))
        >>> optimizer = Muon([blocks], lr=1.0)
        >>> (blocks * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        >>> optimizer.step()
        >>> values = torch.linalg.svdvals(blocks.detach())
        >>> bool(((values > 0.5) & (values < 1.3)).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum), ("ns_steps", ns_steps)):
            if not value >= 0:
                raise StructureError(f"Muon: {name} must be at least 0, got {value!r}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {**defaults, "ns_steps": ns_steps, "layout": "", "blocks": 1})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, after a look at its parameters.

        Raises:
            StructureError: A parameter is no matrix or complex, or the layout is unknown.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        layout = group["layout"]
        try:
            if layout not in ("", KERNEL, TRANSPOSED):
                raise StructureError(f"Muon: layout is {KERNEL!r}, {TRANSPOSED!r} or empty, got {layout!r}")
            for parameter in group["params"]:
                if parameter.ndim < 2 or parameter.is_complex():
                    raise StructureError(
                        f"Muon takes real matrices (..., fan_out, fan_in), got {parameter.dtype} of shape "
                        f"{tuple(parameter.shape)}; give other parameters to Adam (structops.torch.split)"
                    )
                if not layout and parameter.ndim > 3:
                    raise StructureError(
                        f"Muon takes matrices or (blocks, fan_out, fan_in), got shape {tuple(parameter.shape)}; say "
                        f"layout='kernel' in the group of a convolution, as structops.torch.split does"
                    )
        except StructureError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the loss of the closure, if there is one.

        Raises:
            StructureError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise StructureError("Muon has no rule for sparse gradients; give embeddings to SparseAdam")
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        factor = _factor(parameter, group)
        if hasattr(update, "placements"):
            update = _with_whole_blocks(update, group["layout"])
        matrices = as_blocks(update, factor)
        assert matrices is not None  # the factor was read off the parameter
        matrices = orthogonalise(matrices, group["ns_steps"])
        lr = float(group["lr"])
        parameter.mul_(1 - lr * group["weight_decay"])
        scale = math.sqrt(max(1.0, factor.fan_out / factor.fan_in))
        parameter.add_(from_blocks(matrices, parameter.shape, factor).to(parameter.dtype), alpha=-lr * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Every matrix (blocks, m, n) with its singular values pushed to about one, by Newton-Schulz in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    # The Frobenius norm bounds the largest singular value, where the iteration converges up to sqrt(3).
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a fused sum rounds once
    return x.mT if tall else x


def _with_whole_blocks(update: Any, layout: str) -> Tensor:
    """A DTensor that is sharded on blocks at most: matrix products of other shards would gather again and again."""
    from torch.distributed.tensor import Replicate  # slow to import, and here it has been

    axis = 0 if update.ndim == 3 and not layout else None
    keep = [p if axis is not None and getattr(p, "dim", None) == axis else Replicate() for p in update.placements]
    return update.redistribute(placements=keep)


def _factor(parameter: Tensor, group: dict[str, Any]) -> Factor:
    """The sizes of a parameter in the layout of its group."""
    shape, blocks, layout = tuple(parameter.shape), group["blocks"], group["layout"]
    if layout == KERNEL:
        return Factor(layout, shape, math.prod(shape[1:]), shape[0] // blocks, blocks)
    if layout == TRANSPOSED:
        return Factor(layout, shape, shape[0] // blocks * math.prod(shape[2:]), shape[1], blocks)
    return Factor("", shape, shape[-1], shape[-2], math.prod(shape[:-2]))
