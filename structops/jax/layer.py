"""A drop-in for ``nnx.Linear`` whose kernel has a structure."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from structops._array import real_of
from structops.jax.product import product
from structops.mup import init_stds
from structops.normalise import check_weight_norm, rms_cap, rms_caps
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
        weight_norm: Whether the product takes every factor with its root mean square capped at the standard deviation
            of the rule, times a learnable gain: ``gain * min(1, std / rms) * factor``, against residual streams that
            grow.  ``"cap"``: without gains, for query and key projections under QK-norm, where a gain would change
            nothing.  See `structops.normalise.rms_cap`.
        dtype: Dtype of the parameters.
        rngs: Source of the random numbers; its stream ``params`` is used.

    Attributes:
        factors: ``nnx.Param`` in order of application, each ``(blocks, fan_out, fan_in)``.
        gains: ``nnx.Param`` (number of factors,), or None: scalars, for the plain learning rate and no weight decay.
        bias: ``nnx.Param`` (out_features,), or None.
        plan: The structure at this size: sizes of the factors, counts, ``apply``.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes, or ``weight_norm`` is unknown.
        ShapeError: In the call, the last axis of x is not ``in_features``.

    Cost:
        ``plan.num_params`` parameters and ``plan.macs`` multiply-accumulates per vector, without the bias.
        Weight normalisation adds a gain per factor, and a few operations per parameter and call.

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
        weight_norm: bool | Literal["cap"] = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_weight_norm(weight_norm)
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm = weight_norm
        self.structure = _structure(structure)
        self.plan: Plan = self.structure.plan(in_features, out_features)
        self.caps = rms_caps(self.plan, zero_init)
        stds = init_stds(self.plan, zero_last=zero_init)
        self.factors = nnx.List(
            [
                nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype))
                for shape, std in zip(self.plan.stored_shapes, stds, strict=True)
            ]
        )
        gains = jnp.ones(len(stds), real_of(self.factors[0].dtype))
        self.gains = nnx.Param(gains) if weight_norm is True else None
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``A x + bias`` for x of shape (..., in_features)."""
        y = product(self.plan, self.effective_factors(), x)
        return y if self.bias is None else y + self.bias[...]

    def effective_factors(self) -> list[jax.Array]:
        """The factors that the product takes: the parameters, or what weight normalisation makes of them."""
        factors = [factor[...] for factor in self.factors]
        if not self.weight_norm:
            return factors
        return rms_cap(factors, self.caps, None if self.gains is None else self.gains[...])

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features), of the effective factors."""
        return self.plan.operator(self.effective_factors())

    def merge(self) -> nnx.Linear:
        """A dense layer with the same function: for few tokens, or widths at which dense is faster.

        `structops bench` measures from where on that is.
        """
        weight = self.operator().to_dense()
        dense = nnx.Linear(
            self.in_features,
            self.out_features,
            use_bias=self.bias is not None,
            param_dtype=weight.dtype,
            rngs=nnx.Rngs(0),  # its numbers are replaced
        )
        dense.kernel[...] = weight.T
        if self.bias is not None and dense.bias is not None:
            dense.bias[...] = self.bias[...]
        return dense


_structure = structure  # the class has an argument of that name
