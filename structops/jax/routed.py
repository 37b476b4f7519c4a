"""A linear layer in which every vector chooses a few of several structured experts, for Flax NNX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from structops.errors import ShapeError, StructureError
from structops.jax.linear import WeightNorm, effective, unit_gains
from structops.jax.product import product
from structops.normalise import check_weight_norm, rms_caps
from structops.routed import BALANCE, Routed, Z, chain_plan, halves
from structops.spec import Structure


class RouterLoss(nnx.Variable):
    """The loss of the last call of a `RoutedLinear`: a scalar that is no parameter."""


class RoutedLinear(nnx.Module):
    r"""A mixture of structured experts, ``y = sum of g_e(x) M_e x over the top_k experts e, + bias``, on the last axis.

    The twin of `structops.torch.RoutedLinear`; with the same parameters it has the same values.  All experts multiply
    all vectors, with gates of zero, so that shapes do not depend on the data: ``experts / top_k`` times the MACs.
    There is no second way by ``jax.lax.ragged_dot``: it multiplies groups of rows by one matrix each, and the blocks of
    a factor would be one such product each.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        structure: The structure of one expert; see `structops.routed.Routed`.
        experts: Number of experts, at least 2.
        top_k: Experts that each vector takes.
        bias: Whether to add a bias.
        zero_init: Whether the last factor of every expert starts at zero.
        weight_norm: As for `StructuredLinear`: the cap is on a factor of all experts together.
        dtype: Dtype of the computation and of the result; by default the one that x and the parameters promote to.
        param_dtype: Dtype of the parameters.
        rngs: Source of the random numbers; its stream ``params`` is used.

    Attributes:
        factors: ``nnx.Param`` in order of application, each ``(experts, blocks, fan_out, fan_in)``.
        gate: ``nnx.Param`` (experts, in_features), zero at first.
        gains: ``nnx.Param`` (number of factors,), or None.
        bias: ``nnx.Param`` (out_features,), or None.
        balance: `RouterLoss`, a scalar that every call writes, for `router_loss`.
        deterministic: If true, calls write nothing, as ``model.eval()`` sets it.  A layer that is only read by a
            function of ``jax.jit`` must be so.
        spec: The `structops.routed.Routed`, with counts.
        weight_sizes: What `structops.jax.plan` reads: every factor has the scales of one expert by itself.

    Raises:
        StructureError: The structure is unknown, has no rank, or cannot have these sizes; or another argument does not
            work.
        ShapeError: In the call, the last axis of x is not ``in_features``.

    Cost:
        ``spec.num_params(in_features, out_features)`` parameters; ``experts`` times the MACs of one expert per vector,
        and those of the gate.

    Numerics:
        Logits, softmax and the loss are at least of float32.

    References:
        arXiv 2410.02117, section 5.

    Example:
        >>> layer = RoutedLinear(64, 48, "btt", experts=4, top_k=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((5, 64))).shape
        (5, 48)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure = "btt",
        experts: int = 8,
        top_k: int = 2,
        bias: bool = True,
        *,
        zero_init: bool = False,
        weight_norm: WeightNorm = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_weight_norm(weight_norm)
        self.in_features, self.out_features, self.zero_init = in_features, out_features, zero_init
        self.weight_norm, self.dtype, self.param_dtype = weight_norm, dtype, param_dtype
        self.deterministic = False
        self.spec = Routed(structure, experts, top_k)
        member = self.spec.member(in_features, out_features)
        parts = halves(member, experts)
        self.first, self.rest = chain_plan(parts.first), chain_plan(parts.rest)
        self.weight_sizes = nnx.static(self.spec.weight_sizes(in_features, out_features, zero_init))
        whole = chain_plan(member)
        self.caps = rms_caps(whole, zero_init)
        self.shapes = tuple((experts, *shape) for shape in whole.stored_shapes)
        self.factors = nnx.List([nnx.Param(factor) for factor in self._drawn(rngs)])
        self.gate = nnx.Param(jnp.zeros((experts, in_features), param_dtype))
        self.gains = nnx.Param(unit_gains(whole, param_dtype)) if weight_norm is True else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else nnx.data(None)
        self.balance = RouterLoss(jnp.zeros((), jnp.promote_types(param_dtype, jnp.float32)))

    def _drawn(self, rngs: nnx.Rngs) -> list[jax.Array]:
        stds = self.spec.expert_scales(self.in_features, self.out_features, self.zero_init)
        dtype = self.param_dtype
        return [
            jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype)
            for shape, std in zip(self.shapes, stds, strict=True)
        ]

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        """Draw the experts anew, gate 0, gains 1 and bias 0."""
        for parameter, factor in zip(self.factors, self._drawn(rngs), strict=True):
            parameter[...] = factor
        for variable, value in ((self.gate, 0), (self.gains, 1), (self.bias, 0)):
            if variable is not None:
                variable[...] = jnp.full_like(variable[...], value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The gated sum for x of shape (..., in_features)."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(f"expected x of shape (..., {self.in_features}), got {tuple(x.shape)}")
        gains = None if self.gains is None else self.gains[...]
        factors = effective([factor[...] for factor in self.factors], self.weight_norm, self.caps, gains)
        bias = [] if self.bias is None else [self.bias[...]]
        dtype = self.dtype or jnp.result_type(x, *factors, *bias)
        rows = x.reshape(-1, self.in_features).astype(dtype)
        precise = jnp.promote_types(dtype, jnp.float32)
        logits = rows.astype(precise) @ self.gate[...].astype(precise).T
        gates, chosen = top_gates(logits, self.spec.top_k)
        if not self.deterministic:
            self.balance[...] = balance_loss(logits, chosen).astype(self.balance.dtype)
        mask = (jax.nn.one_hot(chosen, self.spec.experts, dtype=precise) * gates[..., None]).sum(-2)
        y = self._masked([factor.astype(dtype) for factor in factors], rows, mask.astype(dtype))
        y = y + bias[0].astype(dtype) if bias else y
        return y.reshape((*x.shape[:-1], self.out_features))

    def _masked(self, factors: list[jax.Array], rows: jax.Array, mask: jax.Array) -> jax.Array:
        """All experts on all vectors: the state after the first factor is multiplied by the gates."""
        first, *middle, last = factors
        state = product(self.first, [first.swapaxes(0, 1).reshape(self.first.stored_shapes[0])], rows)
        state = (state.reshape((*mask.shape, state.shape[-1] // mask.shape[-1])) * mask[..., None]).reshape(state.shape)
        shapes = self.rest.stored_shapes
        last = last.transpose(1, 2, 0, 3).reshape(shapes[-1])
        return product(self.rest, [*(f.reshape(s) for f, s in zip(middle, shapes, strict=False)), last], state)


def top_gates(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The gates and the numbers of the ``top_k`` largest logits, both (..., top_k); among equals the first win."""
    values, chosen = jax.lax.top_k(logits, top_k)
    return jax.nn.softmax(values, -1), chosen


def balance_loss(logits: jax.Array, chosen: jax.Array) -> jax.Array:
    """The loss of one layer, a scalar; see `structops.torch.routed.balance_loss`."""
    vectors, experts = logits.shape
    shares = jax.nn.one_hot(chosen, experts, dtype=logits.dtype).sum((0, 1)) / max(chosen.size, 1)
    p = jax.nn.softmax(logits, -1).sum(0) / max(vectors, 1)
    z = jnp.square(jax.nn.logsumexp(logits, -1)).sum() / max(vectors, 1)
    return experts * (p * shares).sum() + Z * z


def router_loss(model: nnx.Module) -> jax.Array:
    r"""The loss that balances the experts of a model, of its last call.

    \[ 0.01 \cdot \text{mean over layers of } \bigl(E \sum_e \bar p_e \bar f_e
    + 0.1\, \text{mean}(\text{logsumexp}^2)\bigr). \]

    Call it after the model, in the function that is differentiated.  Every layer keeps its loss in a variable, so
    ``nnx.jit``, ``nnx.remat``, ``nnx.vmap`` and ``nnx.scan`` carry it out; layers that were stacked count each.

    Args:
        model: Any module with `RoutedLinear` layers.

    Raises:
        StructureError: The model has no `RoutedLinear`.

    Example:
        >>> model = RoutedLinear(16, 4, rngs=nnx.Rngs(0))
        >>> def loss(model, x):
        ...     return (model(x) ** 2).mean() + router_loss(model)
        >>> value, grads = nnx.value_and_grad(loss)(model, jnp.ones((8, 16)))
    """
    losses = [layer.balance[...].reshape(-1) for _, layer in nnx.iter_modules(model) if isinstance(layer, RoutedLinear)]
    if not losses:
        raise StructureError(f"router_loss: {type(model).__name__} has no RoutedLinear")
    return BALANCE * jnp.concatenate(losses).mean()
