"""A drop-in for ``nnx.Linear`` whose kernel has a structure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from structops.mup import init_stds
from structops.operator import StructuredOperator
from structops.spec import Plan, Structure, structure


class StructuredLinear(nnx.Module):
    r"""A linear layer with a structured weight, ``y = A x + bias`` on the last axis, for Flax NNX.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: A spec or its string form, such as ``"btt(rank=2)"``.
        bias: Whether to add a bias.
        zero_init: Whether the last factor starts at zero, for the last layer of a residual branch and for the readout.
        dtype: Dtype of the parameters.
        rngs: Source of the random numbers; its stream ``params`` is used.

    Attributes:
        factors: ``nnx.Param`` in order of application, each ``(blocks, fan_out, fan_in)``.
        bias: ``nnx.Param`` (out_features,), or None.
        plan: The structure at this size: sizes of the factors, counts, ``apply``.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes.
        ShapeError: In the call, the last axis of x is not ``in_features``.

    Cost:
        ``plan.num_params`` parameters and ``plan.macs`` multiply-accumulates per vector, without the bias.

    References:
        Initialised by the rule of arXiv 2406.06248, section 3; see `structops.mup.init_stds`.

    Example:
        >>> layer = StructuredLinear(64, 48, "btt(rank=2)", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((5, 64))).shape
        (5, 48)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool = True,
        *,
        zero_init: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.structure = _structure(structure)
        self.plan: Plan = self.structure.plan(in_features, out_features)
        stds = init_stds(self.plan, zero_last=zero_init)
        self.factors = nnx.List(
            [
                nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype))
                for shape, std in zip(self.plan.stored_shapes, stds, strict=True)
            ]
        )
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``A x + bias`` for x of shape (..., in_features)."""
        y = self.plan.apply([factor[...] for factor in self.factors], x)
        return y if self.bias is None else y + self.bias[...]

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features)."""
        return self.plan.operator([factor[...] for factor in self.factors])


_structure = structure  # the class has an argument of that name
