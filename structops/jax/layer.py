"""A drop-in for ``nnx.Linear`` whose kernel has a structure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from structops.errors import ShapeError, StructureError
from structops.jax.linear import WeightNorm, affine, description, draw, effective, unit_gains
from structops.normalise import check_weight_norm, rms_caps
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
        recompute: Whether derivatives compute the intermediates between the factors again (``jax.checkpoint``) instead
            of keeping them: less memory, for the MACs of the factors once more.
        dtype: Dtype of the computation and of the result, as in ``nnx.Linear``; by default the one that x and the
            parameters promote to.
        param_dtype: Dtype of the parameters.
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
        weight_norm: WeightNorm = False,
        recompute: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_weight_norm(weight_norm)
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm, self.recompute = weight_norm, recompute
        self.dtype, self.param_dtype = dtype, param_dtype
        self.structure = _structure(structure)
        self.plan: Plan = self.structure.plan(in_features, out_features)
        self.caps = rms_caps(self.plan, zero_init)
        self.factors = nnx.List([nnx.Param(factor) for factor in self._drawn(rngs)])
        self.gains = nnx.Param(unit_gains(self.plan, param_dtype)) if weight_norm is True else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else nnx.data(None)

    def _drawn(self, rngs: nnx.Rngs) -> list[jax.Array]:
        keys = [rngs.params() for _ in self.plan.stored_shapes]
        return draw(self.plan, keys, self.param_dtype, self.zero_init)

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        """Draw the factors anew, gains 1 and bias 0."""
        for parameter, factor in zip(self.factors, self._drawn(rngs), strict=True):
            parameter[...] = factor
        if self.gains is not None:
            self.gains[...] = jnp.ones_like(self.gains[...])
        if self.bias is not None:
            self.bias[...] = jnp.zeros_like(self.bias[...])

    def __call__(self, x: jax.Array, out_sharding: None = None) -> jax.Array:
        """``A x + bias`` for x of shape (..., in_features)."""
        _check_layout(out_sharding)
        bias = None if self.bias is None else self.bias[...]
        return affine(self.plan, self.effective_factors(), bias, x, self.dtype, self.recompute)

    def effective_factors(self) -> list[jax.Array]:
        """The factors that the product takes: the parameters, or what weight normalisation makes of them."""
        gains = None if self.gains is None else self.gains[...]
        return effective([factor[...] for factor in self.factors], self.weight_norm, self.caps, gains)

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features), of the effective factors."""
        return self.plan.operator(self.effective_factors())

    def merge(self) -> Any:
        """An ``nnx.Linear`` with the same function: for few tokens, or widths at which dense is faster.

        `structops bench` measures from where on that is.
        """
        weight = self.operator().to_dense()
        dense = nnx.Linear(
            self.in_features,
            self.out_features,
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=weight.dtype,
            rngs=nnx.Rngs(0),  # its numbers are replaced
        )
        dense.kernel[...] = weight.T
        if self.bias is not None and dense.bias is not None:
            dense.bias[...] = self.bias[...]
        return dense

    def __nnx_repr__(self) -> Iterator[Any]:
        """Sizes, structure and the ratio of parameters to a dense layer; shapes in place of numbers."""
        shown = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "structure": _Text(self.structure),
            "factors": _Text(", ".join(str(shape) for shape in self.plan.stored_shapes)),
            "bias": self.bias is not None,
            "weight_norm": self.weight_norm,
        }
        for part in super().__nnx_repr__():
            name = getattr(part, "key", None)
            if name is None:
                yield replace(part, comment=f" # {description(self.plan)}")
            elif name in shown and (name != "weight_norm" or self.weight_norm):
                yield replace(part, value=shown[name])


class StructuredLinearGeneral(StructuredLinear):
    """A `StructuredLinear` from and to several axes, as the projections of ``nnx.MultiHeadAttention`` are.

    It is what `structops.jax.structurize` makes of an ``nnx.LinearGeneral`` whose inputs are the last axes.

    Args:
        in_features: Sizes of the last axes of the input.
        out_features: Sizes of the last axes of the output.
        structure: A spec or its string form, for the products of these sizes.
        bias: Whether to add a bias, of shape ``out_features``.
        rngs: Source of the random numbers.
        **options: As for `StructuredLinear`.

    Raises:
        StructureError: As for `StructuredLinear`.
        ShapeError: In the call, the last axes of x are not ``in_features``.

    Example:
        >>> layer = StructuredLinearGeneral((16,), (4, 4), "btt", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((5, 16))).shape
        (5, 4, 4)
    """

    def __init__(
        self,
        in_features: tuple[int, ...],
        out_features: tuple[int, ...],
        structure: str | Structure,
        bias: bool = True,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.in_axes, self.out_axes = tuple(in_features), tuple(out_features)
        super().__init__(math.prod(in_features), math.prod(out_features), structure, False, rngs=rngs, **options)
        self.bias = nnx.Param(jnp.zeros(out_features, self.param_dtype)) if bias else nnx.data(None)

    def __call__(self, x: jax.Array, out_sharding: None = None) -> jax.Array:
        """``A x + bias`` for x of shape (..., *in_features)."""
        _check_layout(out_sharding)
        count = len(self.in_axes)
        if tuple(x.shape[-count:]) != self.in_axes:
            raise ShapeError(f"expected x of shape (..., {', '.join(map(str, self.in_axes))}), got {tuple(x.shape)}")
        flat = x.reshape((*x.shape[:-count], self.in_features))
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        y = affine(self.plan, self.effective_factors(), bias, flat, self.dtype, self.recompute)
        return y.reshape((*y.shape[:-1], *self.out_axes))

    def merge(self) -> Any:
        """An ``nnx.LinearGeneral`` with the same function."""
        weight = self.operator().to_dense()
        dense = nnx.LinearGeneral(
            self.in_axes,
            self.out_axes,
            axis=tuple(range(-len(self.in_axes), 0)),
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=weight.dtype,
            rngs=nnx.Rngs(0),  # its numbers are replaced
        )
        dense.kernel[...] = weight.T.reshape((*self.in_axes, *self.out_axes))
        if self.bias is not None and dense.bias is not None:
            dense.bias[...] = self.bias[...]
        return dense


def _check_layout(out_sharding: Any) -> None:
    """Layers of Flax pass this argument on.

    Raises:
        StructureError: It is given.
    """
    if out_sharding is not None:
        raise StructureError("out_sharding is for meshes of explicit axes; structured layers take automatic ones")


class _Text:
    """Prints as the text that it is made of."""

    def __init__(self, text: Any) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


_structure = structure  # the class has an argument of that name
