"""A drop-in for ``nn.Linear`` whose weight has a structure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structops.mup import init_stds
from structops.operator import StructuredOperator
from structops.spec import Plan, Structure, structure


class StructuredLinear(nn.Module):
    r"""A linear layer with a structured weight, ``y = A x + bias`` on the last axis.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: A spec or its string form, such as ``"btt(rank=2)"``.
        bias: Whether to add a bias.
        zero_init: Whether the last factor starts at zero, for the last layer of a residual branch and for the readout.
        device: Device of the parameters; ``"meta"`` allocates nothing.
        dtype: Dtype of the parameters.
        generator: Source of the random numbers; torch's global one by default.

    Attributes:
        factors: Parameters in order of application, each ``(blocks, fan_out, fan_in)``.
        bias: Parameter (out_features,), or None.
        plan: The structure at this size: sizes of the factors, counts, ``apply``.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes.
        ShapeError: In ``forward``, the last axis of x is not ``in_features``.

    Cost:
        ``plan.num_params`` parameters and ``plan.macs`` multiply-accumulates per vector, without the bias.

    References:
        Initialised by the rule of arXiv 2406.06248, section 3; see `structops.mup.init_stds`.

    Example:
        >>> layer = StructuredLinear(64, 48, "btt(rank=2)")
        >>> layer(torch.zeros(5, 64)).shape
        torch.Size([5, 48])
    """

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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.structure = _structure(structure)
        self.plan: Plan = self.structure.plan(in_features, out_features)
        shapes = self.plan.stored_shapes
        self.factors = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew and set the bias to zero; also after ``to_empty`` of a layer built on ``"meta"``."""
        for factor, std in zip(self.factors, init_stds(self.plan, zero_last=self.zero_init), strict=True):
            if std:
                factor.normal_(std=std, generator=generator)
            else:
                factor.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``A x + bias`` for x of shape (..., in_features)."""
        y = self.plan.apply(list(self.factors), x)
        # Under autocast the product is of lower precision than the bias, and so is the result, as in nn.Linear.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features) that views the parameters."""
        return self.plan.operator(list(self.factors))

    def extra_repr(self) -> str:
        """Sizes, structure and the ratio of parameters to a dense layer."""
        ratio = self.plan.num_params / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, structure={self.structure}, "
            f"bias={self.bias is not None}, {self.plan.num_params:,} params, {ratio:.3g} of dense"
        )


_structure = structure  # the class has an argument of that name
