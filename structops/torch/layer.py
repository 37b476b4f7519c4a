"""A drop-in for ``nn.Linear`` whose weight has a structure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from structops._array import real_of
from structops.conversion import Projection
from structops.mup import init_stds
from structops.normalise import check_weight_norm, rms_cap, rms_caps
from structops.operator import StructuredOperator
from structops.spec import Plan, Structure, structure
from structops.torch.product import Product
from structops.torch.standin import stand_in


class StructuredLinear(nn.Module):
    r"""A linear layer with a structured weight, ``y = A x + bias`` on the last axis.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: A spec or its string form, such as ``"btt(rank=2)"``.
        bias: Whether to add a bias.
        zero_init: Whether the last factor starts at zero, for the last layer of a residual branch and for the readout.
        weight_norm: Whether the product takes every factor with its root mean square capped at the standard deviation
            of the rule, times a learnable gain: ``gain * min(1, std / rms) * factor``, against residual streams that
            grow.  ``"cap"``: without gains, for query and key projections under QK-norm, where a gain would change
            nothing.  See `structops.normalise.rms_cap`.
        recompute: Whether the backward pass computes the intermediates between the factors again instead of keeping
            them: less memory, for the MACs of all factors but the last once more.
        device: Device of the parameters; ``"meta"`` allocates nothing.
        dtype: Dtype of the parameters.
        generator: Source of the random numbers; torch's global one by default.

    Attributes:
        factors: Parameters in order of application, each ``(blocks, fan_out, fan_in)``.
        gains: Parameter (number of factors,), or None: scalars, for the plain learning rate and no weight decay.
        bias: Parameter (out_features,), or None.
        plan: The structure at this size: sizes of the factors, counts, ``apply``.
        weight: A stand-in with the dtype, device and shape of the dense weight, for code that reads those; numeric use
            raises.
        kind: ``"Linear"``, or the class of another linear layer that it replaces, for `structops.torch.densify`.
        projection: How near the factors came to the dense weight they were projected from, or None.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes, or ``weight_norm`` is unknown.
        ShapeError: In ``forward``, the last axis of x is not ``in_features``.

    Cost:
        ``plan.num_params`` parameters and ``plan.macs`` multiply-accumulates per vector, without the bias.
        Weight normalisation adds a gain per factor, and a few operations per parameter and call.

    References:
        Initialised by the rule of arXiv 2406.06248, section 3; see `structops.mup.init_stds`.

    Example:
        >>> layer = StructuredLinear(64, 48, "btt(rank=2)")
        >>> layer(torch.zeros(5, 64)).shape
        torch.Size([5, 48])
    """

    kind: str = "Linear"
    projection: Projection | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_init: bool = False,
        weight_norm: bool | Literal["cap"] = False,
        recompute: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_weight_norm(weight_norm)
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm = weight_norm
        self.structure = _structure(structure)
        self.plan: Plan = self.structure.plan(in_features, out_features)
        self.caps = rms_caps(self.plan, zero_init)
        self.product = Product(self.plan, recompute)
        shapes = self.plan.stored_shapes
        self._names = tuple(str(k) for k in range(len(shapes)))
        self.factors = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        real = real_of(self.factors[0].dtype)
        learnt = weight_norm is True
        self.gains = nn.Parameter(torch.empty(len(shapes), device=device, dtype=real)) if learnt else None
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew, gains 1 and bias 0; also after ``to_empty`` of a layer built on ``"meta"``."""
        for factor, std in zip(self.factors, init_stds(self.plan, zero_last=self.zero_init), strict=True):
            if std:
                factor.normal_(std=std, generator=generator)
            else:
                factor.zero_()
        if self.gains is not None:
            self.gains.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``A x + bias`` for x of shape (..., in_features)."""
        y, bias = self.product(self.effective_factors(), x), self.bias
        # Under autocast the product is of lower precision than the bias, and so is the result, as in nn.Linear.
        return y if bias is None else y + bias.to(y.dtype)

    def weights(self) -> list[nn.Parameter]:
        """The parameters that stand for the weight: factors, and gains where there are some."""
        return [*self.factors, *(() if self.gains is None else (self.gains,))]

    def effective_factors(self) -> list[Tensor]:
        """The factors that the product takes: the parameters, or what weight normalisation makes of them."""
        parameters = self.factors
        factors = [getattr(parameters, name) for name in self._names]  # a quarter of the time of list(parameters)
        return rms_cap(factors, self.caps, self.gains) if self.weight_norm else factors

    @property
    def weight(self) -> Tensor:
        """Dtype, device and shape of the dense weight; it has no numbers."""
        return stand_in(self.out_features, self.in_features, self.factors[0])

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features).

        It views the parameters; with weight normalisation it holds the effective factors, computed now.
        """
        return self.plan.operator(self.effective_factors())

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A dense layer with the same function, in new memory: for few tokens, or widths at which dense is faster.

        `structops bench` measures from where on that is.
        """
        weight = self.operator().to_dense()
        bias = self.bias is not None
        dense = nn.Linear(self.in_features, self.out_features, bias, device=weight.device, dtype=weight.dtype)
        dense.weight.copy_(weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, structure and the ratio of parameters to a dense layer."""
        ratio = self.plan.num_params / (self.in_features * self.out_features)
        norm = f"weight_norm={self.weight_norm!r}, " if self.weight_norm else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, structure={self.structure}, "
            f"bias={self.bias is not None}, {norm}{self.plan.num_params:,} params, {ratio:.3g} of dense"
        )


_structure = structure  # the class has an argument of that name
