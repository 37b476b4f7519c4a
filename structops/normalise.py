"""Weight normalisation of factors: a cap on their root mean square, with a gain for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structops._array import Array, backend_of, cast, is_half, namespace
from structops.errors import ShapeError, StructureError
from structops.mup import init_stds
from structops.spec import Plan

EPS = 1e-8


def rms_cap(factors: Sequence[Array], caps: Sequence[float], gains: Array | None = None) -> list[Array]:
    r"""Scale factors down to at most a given root mean square, then by their gains.

    \(\tilde M = \gamma_M \min(1, \sigma_M / \text{RMS}(M)) M\) with \(\text{RMS}(M) = \sqrt{\text{mean}(|M|^2) +
    10^{-8}}\) over all entries of the factor, all its blocks together.  A factor below its cap is left as it is.

    Args:
        factors: Arrays of one library, torch or JAX.
        caps: \(\sigma_M\) of each factor; see `rms_caps`.
        gains: \(\gamma_M\) of each factor, shape (number of factors,); ones if not given.

    Returns:
        The scaled factors, in their dtypes.

    Raises:
        ShapeError: There are more or fewer caps or gains than factors.
        BackendError: numpy arrays or other objects.

    Cost:
        A few operations per parameter and call, however many vectors the product then takes.  Nothing is read back
        from the device.

    Numerics:
        Factors of 16 bits are squared, averaged and scaled in float32 and rounded once.  The gradient flows through
        the RMS: where the cap holds, it has no part along the factor.  A factor of zeros stays zero, and its gradient
        is that without the cap.

    References:
        arXiv 2406.06248, figure 7: it keeps transformers with BTT layers stable.

    Example:
        >>> import torch
        >>> (capped,) = rms_cap([torch.full((1, 128, 32), 0.5)], [0.125])
        >>> round(float(capped.square().mean().sqrt()), 6)
        0.125
    """
    if len(caps) != len(factors):
        raise ShapeError(f"expected a cap for each of {len(factors)} factors, got {len(caps)}")
    if gains is not None and tuple(gains.shape) != (len(factors),):
        raise ShapeError(f"expected gains of shape ({len(factors)},), one per factor, got {tuple(gains.shape)}")
    each = [None] * len(factors) if gains is None else [gains[k] for k in range(len(factors))]
    return [_capped(M, cap, gain) for M, cap, gain in zip(factors, caps, each, strict=True)]


def keeping_gains(factors: Sequence[Array], caps: Sequence[float]) -> Array:
    """The gains with which `rms_cap` returns the factors as they are: what the cap takes, a gain gives back.

    Args:
        factors: Stored factors, (..., blocks, fan_out, fan_in); axes in front stack layers.
        caps: As for `rms_cap`.

    Returns:
        Shape (..., number of factors): ``max(1, rms / cap)``.
    """
    gains = [(_rms(_wide(M), (-3, -2, -1)) / cap).clip(min=1.0) for M, cap in zip(factors, caps, strict=True)]
    return namespace(gains[0]).stack(gains, -1)


def _wide(M: Array) -> Array:
    return cast(M, namespace(M).float32) if is_half(M.dtype) else M


def _rms(M: Array, axes: tuple[int, ...] | None = None) -> Array:
    return ((M * M.conj()).real.mean(axes) + EPS) ** 0.5


def _capped(M: Array, cap: float, gain: Array | None) -> Array:
    # Methods that torch and JAX share, instead of a namespace: this runs in every forward pass and under compilers.
    if not hasattr(M, "permute"):  # else it is torch's, and may be being compiled
        backend_of(M)
    wide = _wide(M)
    scale = (cap / _rms(wide)).clip(max=1.0)
    return cast(wide * (scale if gain is None else scale * gain), M.dtype)


def rms_caps(plan: Plan, zero_init: bool = False) -> tuple[float, ...]:
    r"""The cap \(\sigma_M\) of every factor of a layer: the standard deviation with which the rule draws it.

    Args:
        plan: The structure at its size.
        zero_init: Whether the last factor starts at zero.  Its cap is that of the rule all the same.  A first factor
            that then starts larger than the rule says (low rank, see `structops.mup.init_stds`) has the larger cap:
            the cap must not undo the init.

    Example:
        >>> from structops import structure
        >>> rms_caps(structure("btt(rank=4)").plan(1024, 4096))
        (0.1767766952966369, 0.0625)
    """
    return tuple(map(max, init_stds(plan), init_stds(plan, zero_last=zero_init)))


def check_weight_norm(weight_norm: Any) -> None:
    """What layers take as ``weight_norm``.

    Raises:
        StructureError: Anything but False, True and ``"cap"``.
    """
    if not isinstance(weight_norm, bool) and weight_norm != "cap":
        raise StructureError(f"weight_norm is False, True or 'cap' (without gains), got {weight_norm!r}")
