"""A layer for Equinox whose weight has a structure."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from structops.jax.linear import WeightNorm, affine, description, draw, effective, unit_gains
from structops.normalise import check_weight_norm, rms_caps
from structops.operator import StructuredOperator
from structops.spec import Plan, Structure, structure


class StructuredLinear(eqx.Module):
    r"""A linear layer with a structured weight, ``y = A x + bias`` on the last axis, for Equinox.

    It takes a vector, like ``eqx.nn.Linear``, and also any leading axes, so that it needs no ``jax.vmap``.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: A spec or its string form, such as ``"btt(rank=2)"``.
        bias: Whether to add a bias.
        zero_init: Whether the last factor starts at zero, for the last layer of a residual branch and for the readout.
        weight_norm: As in `structops.jax.StructuredLinear`.
        recompute: Whether derivatives compute the intermediates between the factors again (``jax.checkpoint``) instead
            of keeping them.
        dtype: Dtype of the parameters, as in ``eqx.nn.Linear``; by default float32, or float64 if JAX has it enabled.
        key: Source of the random numbers.

    Attributes:
        factors: Arrays in order of application, each ``(blocks, fan_out, fan_in)``.
        gains: Array (number of factors,), or None: scalars, for the plain learning rate and no weight decay.
        bias: Array (out_features,), or None.
        plan: The structure at this size: sizes of the factors, counts, ``apply``; static, like all the rest.

    Raises:
        StructureError: The structure is unknown or cannot have these sizes, or ``weight_norm`` is unknown.
        ShapeError: In the call, the last axis of x is not ``in_features``.

    Cost:
        ``plan.num_params`` parameters and ``plan.macs`` multiply-accumulates per vector, without the bias.

    References:
        Initialised by the rule of arXiv 2406.06248, section 3; see `structops.mup.init_stds`.

    Example:
        >>> layer = StructuredLinear(64, 48, "btt(rank=2)", key=jax.random.key(0))
        >>> layer(jnp.zeros(64)).shape, layer(jnp.zeros((5, 64))).shape
        ((48,), (5, 48))
        >>> layer
        StructuredLinear(64, 48, 'btt(rank=2)', bias=True; 1,536 params, 0.5 of dense)
    """

    factors: tuple[jax.Array, ...]
    gains: jax.Array | None
    bias: jax.Array | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    structure: Structure = eqx.field(static=True)
    plan: Plan = eqx.field(static=True, repr=False)
    caps: tuple[float, ...] = eqx.field(static=True, repr=False)
    zero_init: bool = eqx.field(static=True)
    weight_norm: WeightNorm = eqx.field(static=True)
    recompute: bool = eqx.field(static=True)

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
        key: jax.Array,
    ) -> None:
        check_weight_norm(weight_norm)
        dtype = jnp.zeros(()).dtype if dtype is None else dtype
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm, self.recompute = weight_norm, recompute
        self.structure = _structure(structure)
        self.plan = self.structure.plan(in_features, out_features)
        self.caps = rms_caps(self.plan, zero_init)
        keys = list(jax.random.split(key, len(self.plan.stored_shapes)))
        self.factors = tuple(draw(self.plan, keys, dtype, zero_init))
        self.gains = unit_gains(self.plan, dtype) if weight_norm is True else None
        self.bias = jnp.zeros(out_features, dtype) if bias else None

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """``A x + bias`` for x of shape (..., in_features); ``key`` is ignored, as in ``eqx.nn.Linear``."""
        return affine(self.plan, self.effective_factors(), self.bias, x, recompute=self.recompute)

    def reset_parameters(self, key: jax.Array) -> StructuredLinear:
        """The layer with its factors drawn anew, gains 1 and bias 0."""
        dtype, bias = self.factors[0].dtype, self.bias is not None
        return StructuredLinear(
            *(self.in_features, self.out_features, self.structure, bias),
            zero_init=self.zero_init,
            weight_norm=self.weight_norm,
            recompute=self.recompute,
            dtype=dtype,
            key=key,
        )

    def effective_factors(self) -> list[jax.Array]:
        """The factors that the product takes: the parameters, or what weight normalisation makes of them."""
        return effective(self.factors, self.weight_norm, self.caps, self.gains)

    def operator(self) -> StructuredOperator:
        """The weight as an operator of shape (out_features, in_features), of the effective factors."""
        return self.plan.operator(self.effective_factors())

    def merge(self) -> eqx.nn.Linear:
        """A dense layer with the same function: for few tokens, or widths at which dense is faster."""
        weight = self.operator().to_dense()
        return dense_linear(weight, self.bias)

    def __repr__(self) -> str:
        """Sizes, structure and the ratio of parameters to a dense layer."""
        norm = f", weight_norm={self.weight_norm!r}" if self.weight_norm else ""
        return (
            f"StructuredLinear({self.in_features}, {self.out_features}, {str(self.structure)!r}, "
            f"bias={self.bias is not None}{norm}; {description(self.plan)})"
        )


def dense_linear(weight: jax.Array, bias: jax.Array | None) -> eqx.nn.Linear:
    """An ``eqx.nn.Linear`` of given arrays; nothing is drawn."""
    out_features, in_features = weight.shape[-2:]  # axes in front stack layers
    shell = eqx.filter_eval_shape(
        eqx.nn.Linear, in_features, out_features, use_bias=bias is not None, key=jax.random.key(0)
    )
    return eqx.tree_at(
        lambda linear: (linear.weight, linear.bias), shell, (weight, bias), is_leaf=lambda leaf: leaf is None
    )


_structure = structure  # the class has an argument of that name
