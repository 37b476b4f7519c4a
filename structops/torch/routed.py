"""A linear layer in which every vector chooses a few of several structured experts, and the loss that balances them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from structops._array import real_of
from structops.errors import GradientError, ShapeError, StructureError
from structops.normalise import check_weight_norm, rms_cap, rms_caps
from structops.routed import BALANCE, Routed, Z, chain_plan, halves
from structops.spec import Structure
from structops.torch import ops
from structops.torch.product import Product

Dispatch = Literal["auto", "masked", "gathered"]


class RoutedLinear(nn.Module):
    r"""A mixture of structured experts, ``y = sum of g_e(x) M_e x over the top_k experts e, + bias``, on the last axis.

    The experts are the members of rank 1 of a structure of rank ``experts``; with ``btt`` it is the BTT-MoE.  The gates
    are a softmax over the ``top_k`` largest of ``experts`` logits; where logits are equal, as all are at the start, the
    expert of the lower number wins.  Train it with `router_loss`, without which most experts are never chosen.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: The structure of one expert; see `structops.routed.Routed`.
        experts: Number of experts, at least 2.
        top_k: Experts that each vector takes.
        bias: Whether to add a bias.
        device: Device of the parameters; ``"meta"`` allocates nothing.
        dtype: Dtype of the parameters.
        zero_init: Whether the last factor of every expert starts at zero.
        weight_norm: As for `StructuredLinear`: the cap is on a factor of all experts together.
        dispatch: ``"gathered"``: vectors are sorted by expert, and each expert multiplies its own.  ``"masked"``: all
            experts multiply all vectors, with gates of zero: ``experts / top_k`` times the MACs, and shapes that do
            not depend on the data.  ``"auto"``: gathered, but masked under ``torch.compile``, export and
            ``torch.func``, on the meta device, and for no vectors.  Both give the same result.
        generator: Source of the random numbers; torch's global one by default.

    Attributes:
        factors: Parameters in order of application, each ``(experts, blocks, fan_out, fan_in)``.
        gate: Parameter (experts, in_features), zero at first.  It belongs to no ``nn.Linear``, so
            `structops.torch.structurize` leaves it dense.
        gains: Parameter (number of factors,), or None.
        bias: Parameter (out_features,), or None.
        spec: The `structops.routed.Routed`, with counts.
        weight_sizes: What `structops.torch.plan` reads: every factor has the scales of one expert by itself.

    Raises:
        StructureError: The structure is unknown, has no rank, or cannot have these sizes; or another argument does not
            work.
        ShapeError: In ``forward``, the last axis of x is not ``in_features``.

    Cost:
        ``spec.num_params(in_features, out_features)`` parameters and ``spec.macs(in_features, out_features)``
        multiply-accumulates per vector, without the bias.  ``"gathered"`` reads the number of vectors of every expert
        back from the device.

    Numerics:
        Logits, softmax and the loss are at least of float32, also under autocast.

    References:
        arXiv 2410.02117, section 5.

    Example:
        >>> layer = RoutedLinear(64, 48, "btt", experts=4, top_k=2)
        >>> layer(torch.zeros(5, 64)).shape
        torch.Size([5, 48])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure = "btt",
        experts: int = 8,
        top_k: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_init: bool = False,
        weight_norm: bool | Literal["cap"] = False,
        dispatch: Dispatch = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_weight_norm(weight_norm)
        if dispatch not in ("auto", "masked", "gathered"):
            raise StructureError(f"dispatch is 'auto', 'masked' or 'gathered', got {dispatch!r}")
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm, self.dispatch = weight_norm, dispatch
        self.spec = Routed(structure, experts, top_k)
        member = self.spec.member(in_features, out_features)
        parts = halves(member, experts)
        self.weight_sizes = self.spec.weight_sizes(in_features, out_features, zero_init)
        self.member = Product(chain_plan(member))
        self.first, self.rest = Product(chain_plan(parts.first)), Product(chain_plan(parts.rest))
        self.caps = rms_caps(self.member.plan, zero_init)
        shapes = [(experts, *shape) for shape in member.stored_shapes]
        self.factors = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        self.gate = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        real = real_of(self.gate.dtype)
        self.gains = nn.Parameter(torch.empty(len(shapes), device=device, dtype=real)) if weight_norm is True else None
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.collected: list[Tensor] | None = None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the experts anew, gate 0, gains 1 and bias 0; also after ``to_empty`` of a layer built on ``"meta"``."""
        stds = self.spec.expert_scales(self.in_features, self.out_features, self.zero_init)
        for factor, std in zip(self.factors, stds, strict=True):
            if std:
                factor.normal_(std=std, generator=generator)
            else:
                factor.zero_()
        self.gate.zero_()
        if self.gains is not None:
            self.gains.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The gated sum for x of shape (..., in_features)."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(f"expected x of shape (..., {self.in_features}), got {tuple(x.shape)}")
        rows = x.reshape(-1, self.in_features)
        logits = self.logits(rows)
        gates, chosen = top_gates(logits, self.spec.top_k)
        # Always computed where gradients are, so that activation checkpointing finds the same when it runs this again.
        if self.collected is not None or torch.is_grad_enabled():
            loss = balance_loss(logits, chosen)
            if self.collected is not None:
                self.collected.append(loss)
        factors = list(self.factors)
        if self.weight_norm:
            factors = rms_cap(factors, self.caps, self.gains)
        run = self._gathered if self._gathers(rows) else self._masked
        y, bias = run(factors, rows, gates, chosen), self.bias
        y = y if bias is None else y + bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def logits(self, x: Tensor) -> Tensor:
        """The gate's logits, (..., experts), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not ops.autocasts(x):
            return linear(x.to(dtype), self.gate.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(dtype), self.gate.to(dtype))

    def _gathers(self, rows: Tensor) -> bool:
        if self.dispatch != "auto":
            return self.dispatch == "gathered" and rows.shape[0] > 0
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or rows.is_meta or not rows.shape[0]:
            return False
        return not torch._C._functorch.is_functorch_wrapped_tensor(rows)

    def _masked(self, factors: list[Tensor], rows: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """All experts on all vectors: the state after the first factor is multiplied by the gates."""
        count = self.spec.experts
        first, *middle, last = factors
        state = self.first([first.transpose(0, 1).reshape(self.first.plan.stored_shapes[0])], rows)
        mask = torch.zeros(rows.shape[0], count, dtype=gates.dtype, device=gates.device).scatter(1, chosen, gates)
        state = (state.unflatten(1, (count, -1)) * mask.to(state.dtype).unsqueeze(-1)).flatten(1)
        shapes = self.rest.plan.stored_shapes
        last = last.permute(1, 2, 0, 3).reshape(shapes[-1])
        return self.rest([*(f.reshape(s) for f, s in zip(middle, shapes, strict=False)), last], state)

    def _gathered(self, factors: list[Tensor], rows: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on the vectors that chose it, one after the other."""
        count, k = self.spec.experts, self.spec.top_k
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=count).tolist()
        experts = zip(*(factor.unbind(0) for factor in factors), strict=True)
        chunks = rows[order // k].split(sizes)
        parts = [self.member(own, part) for own, part in zip(experts, chunks, strict=True) if part.shape[0]]
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        found = torch.cat(parts)[places].reshape(-1, k, self.out_features)
        return (gates.to(found.dtype).unsqueeze(1) @ found).squeeze(1)

    def extra_repr(self) -> str:
        """Sizes, experts and the ratio of parameters to a dense layer."""
        n, m = self.in_features, self.out_features
        count = self.spec.num_params(n, m)
        norm = f"weight_norm={self.weight_norm!r}, " if self.weight_norm else ""
        return (
            f"in_features={n}, out_features={m}, {self.spec}, bias={self.bias is not None}, {norm}"
            f"{count:,} params, {count / (n * m):.3g} of dense"
        )


def top_gates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The gates and the numbers of the ``top_k`` largest logits, both (..., top_k); among equals the first win.

    Example:
        >>> top_gates(torch.zeros(1, 4), 2)
        (tensor([[0.5000, 0.5000]]), tensor([[0, 1]]))
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return values[..., :top_k].softmax(-1), order[..., :top_k]


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    r"""\(E \sum_e \bar p_e \bar f_e + 0.1\, \text{mean}(\text{logsumexp}^2)\) of one layer, a scalar.

    \(\bar p\) is the mean softmax of all logits and \(\bar f\) the share of the choices that fell on each expert.  The
    first term is 1 where both are uniform.

    Args:
        logits: Shape (vectors, experts).
        chosen: Shape (vectors, top_k), numbers of experts.

    References:
        arXiv 2410.02117, section 5.
    """
    vectors, experts = logits.shape
    counts = torch.zeros(experts, dtype=logits.dtype, device=logits.device)
    shares = counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=logits.dtype))
    # No vectors have no mean; then nothing is unbalanced.
    p = logits.softmax(-1).sum(0) / max(vectors, 1)
    z = logits.logsumexp(-1).square().sum() / max(vectors, 1)
    return experts * (p * shares / max(chosen.numel(), 1)).sum() + Z * z


class Balance:
    """What `router_loss` gives: call it once after the forward pass for the loss."""

    def __init__(self, layers: list[RoutedLinear]) -> None:
        self.losses: list[tuple[RoutedLinear, list[Tensor]]] = [(layer, []) for layer in layers]

    def __call__(self) -> Tensor:
        """0.01 times the mean over layers, and over the calls of each.

        Raises:
            StructureError: No routed layer ran since the context was entered.
            GradientError: A layer ran without gradients although they are on now.
        """
        means = []
        for layer, losses in self.losses:
            if not losses:
                continue
            if torch.is_grad_enabled() and layer.gate.requires_grad and not all(loss.requires_grad for loss in losses):
                raise GradientError(
                    "the router's loss has no gradient, because the forward pass ran under no_grad, as it does in "
                    "checkpoint(..., use_reentrant=True): use use_reentrant=False, or read the loss under no_grad"
                )
            means.append(torch.stack(losses).mean())
        if not means:
            raise StructureError("no routed layer ran inside router_loss; call the model inside the with block first")
        return BALANCE * torch.stack([mean.to(means[0].device) for mean in means]).mean()


@contextlib.contextmanager
def router_loss(model: nn.Module) -> Iterator[Balance]:
    r"""Collect the losses that balance the experts of a model, while its forward pass runs.

    \[ 0.01 \cdot \text{mean over layers of } \bigl(E \sum_e \bar p_e \bar f_e
    + 0.1\, \text{mean}(\text{logsumexp}^2)\bigr), \]

    see `balance_loss`.  A layer that is called several times counts with its mean.

    Layers keep nothing outside the ``with`` block, so that models are copied, pickled and evaluated as before.

    - ``torch.compile(fullgraph=True)``: within the block and without it are two graphs.
    - Activation checkpointing: with ``use_reentrant=False``.
    - DDP: each rank has the loss of its own vectors; gradients are averaged like any other.
    - Evaluation: under ``no_grad`` the value is given without a gradient.

    Args:
        model: Any module with `RoutedLinear` layers, also compiled or wrapped.

    Yields:
        A function without arguments that gives the loss, to be called once, after the forward pass.

    Raises:
        StructureError: The model has no `RoutedLinear`, or is being collected from already.

    Example:
        >>> model = nn.Sequential(RoutedLinear(16, 32), nn.GELU(), RoutedLinear(32, 4))
        >>> with router_loss(model) as balance:
        ...     loss = model(torch.randn(64, 16)).square().mean() + balance()
        >>> loss.backward()
    """
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLinear)]
    if not layers:
        raise StructureError(f"router_loss: {type(model).__name__} has no RoutedLinear")
    if any(layer.collected is not None for layer in layers):
        raise StructureError("router_loss: this model is in a block of router_loss already; close that first")
    balance = Balance(layers)
    for layer, losses in balance.losses:
        layer.collected = losses
    try:
        yield balance
    finally:
        for layer in layers:
            layer.collected = None
