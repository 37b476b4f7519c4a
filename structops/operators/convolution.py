"""Convolutions of one and two dimensions as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from structops import _array
from structops._array import Array
from structops._cola import LinearOperator
from structops.algebra.counting import factors
from structops.algebra.scalar import scale_rule
from structops.algebra.sum import sum_rule
from structops.chain import Factor
from structops.errors import ShapeError, StructureError
from structops.modes import nearest_multiples
from structops.operator import StructuredOperator, check_arrays, check_axes
from structops.spec import Plan, Structure, check_count, check_sizes, register

Padding = Literal["valid", "same", "circular"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution of stride 1; the transpose of one is another.

    Attributes:
        spatial: Spatial shape of the input.
        taps: Shape of the kernel's window.
        pads: (before, after) of every axis.
        is_circular: Whether the padding wraps around; zeros otherwise.
    """

    spatial: Shape
    taps: Shape
    pads: tuple[tuple[int, int], ...]
    is_circular: bool

    @classmethod
    def of(cls, taps: Shape, spatial: Shape, padding: str) -> Geometry:
        """From a kind of padding, with torch's choice for even windows (the larger half behind).

        Raises:
            ShapeError: The padding is unknown, a size is below 1, or the window is larger than the input.
        """
        if padding not in get_args(Padding):
            raise ShapeError(f"Convolution: padding must be one of {', '.join(get_args(Padding))}, got {padding!r}")
        if len(taps) != len(spatial) or len(taps) not in (1, 2):
            raise ShapeError(
                f"Convolution: expected 1 or 2 spatial axes in both, got taps {taps} and spatial_shape {spatial}"
            )
        if any(n < 1 for n in (*taps, *spatial)):
            raise ShapeError(f"Convolution: sizes must be at least 1, got taps {taps} and spatial_shape {spatial}")
        if padding != "same" and any(t > n for t, n in zip(taps, spatial, strict=True)):
            raise ShapeError(
                f"Convolution: the window {taps} is larger than spatial_shape {spatial} with padding={padding!r}"
            )
        halves = tuple(((t - 1) // 2, t - 1 - (t - 1) // 2) for t in taps)
        pads = tuple((0, 0) for _ in taps) if padding == "valid" else halves
        return cls(spatial, taps, pads, padding == "circular")

    @property
    def out_spatial(self) -> Shape:
        """Spatial shape of the output."""
        return tuple(n + a + b - t + 1 for n, (a, b), t in zip(self.spatial, self.pads, self.taps, strict=True))

    def transpose(self) -> Geometry:
        """The geometry with which the flipped kernel, channels swapped, is the transposed matrix."""
        pads = tuple((t - 1 - a, t - 1 - b) for t, (a, b) in zip(self.taps, self.pads, strict=True))
        return Geometry(self.out_spatial, self.taps, pads, self.is_circular)


def correlate(geometry: Geometry, kernel: Array, x: Array) -> Array:
    """Cross-correlation of the last axis of x, read as (C_in, *spatial), with a kernel (C_out, C_in, *taps)."""
    lead = tuple(x.shape[:-1])
    state = x.reshape((-1, kernel.shape[1], *geometry.spatial))
    if geometry.is_circular:
        for axis, (before, after) in enumerate(geometry.pads, start=2):
            state = _wrap(state, axis, before, after)
    elif any(before or after for before, after in geometry.pads):
        state = _array.pad(state, geometry.pads)
    return _array.convolve(state, kernel).reshape((*lead, kernel.shape[0] * math.prod(geometry.out_spatial)))


def _wrap(x: Array, axis: int, before: int, after: int) -> Array:
    """Continue x periodically along an axis."""
    size = x.shape[axis]

    def part(start: int, stop: int) -> Array:
        return x[(slice(None),) * axis + (slice(start, stop),)]

    pieces = [part(size - before, size), x, part(0, after)]
    return _array.namespace(x).concat([piece for piece in pieces if piece.shape[axis]], axis=axis)


def flipped(kernel: Array) -> Array:
    """The kernel of the transposed matrix: channels swapped, every tap axis reversed."""
    axes = tuple(range(2, kernel.ndim))
    return _array.namespace(kernel).flip(kernel.swapaxes(0, 1), axis=axes)


class Convolution(StructuredOperator):
    r"""A convolution (cross-correlation) of one or two dimensions, of stride 1, as a matrix.

    **Definition.** \(y[o, p] = \sum_{c, t} K[o, c, t]\; x[c, p + t - \mathrm{before}]\), x zero (or periodic) outside;
    x is (C_in, \*spatial) flattened and y is (C_out, \*out_spatial) flattened.  As in torch, the kernel is not flipped.

    Args:
        kernel: Shape (C_out, C_in, \*taps) with one or two tap axes.
        spatial_shape: Spatial shape of the input.
        padding: ``"valid"`` (none), ``"same"`` (zeros; for even windows the larger half behind), ``"circular"``
            (periodic, same size).

    Raises:
        ShapeError: The axes do not fit, the window exceeds the input, or the padding is unknown.
        BackendError: ``kernel`` is no torch or JAX array.

    **Shapes.** ``A @ X``: (in,) or (in, k) with in = C_in * prod spatial; ``X @ A``: (..., C_out * prod out_spatial).

    **Cost.** C_out * C_in * taps parameters; MACs per vector: that times the output positions (products with padding
    count, as in torch's counter).

    **Numerics.** The library's own convolution in the dtype of the inputs.

    **References.** "Compute Better Spent" (arXiv 2406.06248), section 2, discusses convolutions as structured matrices.

    Example:
        >>> import torch
        >>> Convolution(torch.tensor([[[1., 2.]]]), (3,)).to_dense()
        tensor([[1., 2., 0.],
                [0., 1., 2.]])
    """

    leaves = ("stored_kernel",)
    static = ("geometry", "is_transposed")
    stored_kernel: Array
    geometry: Geometry
    is_transposed: bool  # the kernel is used flipped: the transpose keeps the array

    def __init__(self, kernel: Array, spatial_shape: int | Sequence[int], padding: Padding = "valid") -> None:
        check_arrays("Convolution", [kernel])
        check_axes("Convolution: kernel", kernel, "(C_out, C_in, taps)", "(C_out, C_in, taps, taps)")
        spatial = _spatial(spatial_shape)
        self.stored_kernel, self.is_transposed = kernel, False
        self.geometry = Geometry.of(tuple(kernel.shape[2:]), spatial, padding)

    @property
    def kernel(self) -> Array:
        """The kernel (C_out, C_in, *taps) of this matrix."""
        return flipped(self.stored_kernel) if self.is_transposed else self.stored_kernel

    @property
    def channels(self) -> tuple[int, int]:
        """``(C_out, C_in)``."""
        channels = int(self.stored_kernel.shape[0]), int(self.stored_kernel.shape[1])
        return channels[::-1] if self.is_transposed else channels

    @property
    def shape(self) -> tuple[int, int]:
        """``(C_out * prod out_spatial, C_in * prod spatial)``."""
        c_out, c_in = self.channels
        return c_out * math.prod(self.geometry.out_spatial), c_in * math.prod(self.geometry.spatial)

    def _matmat(self, X: Array) -> Array:
        return self._correlate(X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        return self.transposed()._correlate(X)

    def _correlate(self, x: Array) -> Array:
        dtype = _array.promote(self.dtype, x.dtype)
        return correlate(self.geometry, _array.cast(self.kernel, dtype), _array.cast(x, dtype))

    def transposed(self) -> Self:
        """The convolution with the flipped kernel; the array stays."""
        aux: tuple[Any, ...] = ((self.geometry.transpose(), not self.is_transposed), frozenset())
        return self.tree_unflatten(aux, (self.stored_kernel,))

    def describe(self) -> str:
        """Channels, window and sizes."""
        c_out, c_in = self.channels
        sizes = (
            "x".join(map(str, sizes))
            for sizes in (self.geometry.taps, self.geometry.spatial, self.geometry.out_spatial)
        )
        taps, spatial, out = sizes
        kind = ", circular" if self.geometry.is_circular else ""
        return f"{c_in} to {c_out} channels, window {taps}, {spatial} to {out}{kind}"


def kernel_factor(shape: Shape, geometry: Geometry) -> Factor:
    """A window of all input channels to all output channels, at every output position."""
    c_out, c_in, *taps = shape
    return Factor(
        "kernel", shape, fan_in=c_in * math.prod(taps), fan_out=c_out, sharing=math.prod(geometry.out_spatial)
    )


@factors.dispatch
def factors_convolution(A: Convolution) -> tuple:
    """The kernel; seen from a transpose, fan-in and fan-out count what that product multiplies."""
    return (kernel_factor((*A.channels, *A.geometry.taps), A.geometry),)


def _spatial(shape: int | Sequence[int]) -> Shape:
    return (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)


@dataclass(frozen=True)
class ConvolutionPlan(Plan):
    """One kernel, moved over x."""

    geometry: Geometry
    kernel_shape: Shape
    padding: Padding

    def product(self, factors: Sequence[Array], x: Array) -> Array:
        """By the library's convolution."""
        return correlate(self.geometry, factors[0].reshape(self.kernel_shape), x)

    def operator(self, factors: Sequence[Array]) -> Convolution:
        """The operator that views the kernel."""
        return Convolution(factors[0].reshape(self.kernel_shape), self.geometry.spatial, self.padding)


@register
@dataclass(frozen=True)
class ConvolutionStructure(Structure):
    """``convolution(spatial_shape, kernel_size, padding)``: the channels follow from the sizes of the layer.

    Args:
        spatial_shape: Spatial shape of the input; by default all of in_features, with one channel.
        kernel_size: Window, one number for all axes or one each.
        padding: ``"valid"``, ``"same"`` or ``"circular"``.
    """

    name = "convolution"
    spatial_shape: int | Shape | None = None
    kernel_size: int | Shape = 3
    padding: Padding = "same"

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for.

        Raises:
            StructureError: The padding is unknown, a size is no positive number, or the axes do not fit.
        """
        if self.padding not in get_args(Padding):
            raise StructureError(
                f"convolution: padding must be one of {', '.join(get_args(Padding))}, got {self.padding!r}"
            )
        axes = [sizes if isinstance(sizes, tuple) else (sizes,) for sizes in (self.spatial_shape, self.kernel_size)]
        for name, sizes in zip(("spatial_shape", "kernel_size"), axes, strict=True):
            for size in sizes:
                check_count(self, name, size)
        fits = len(axes[1]) == len(axes[0]) or not isinstance(self.kernel_size, tuple)
        if len(axes[0]) not in (1, 2) or not fits:
            raise StructureError(
                f"convolution: expected 1 or 2 spatial axes, and a window of as many, "
                f"got spatial_shape={self.spatial_shape!r} and kernel_size={self.kernel_size!r}"
            )

    def plan(self, in_features: int, out_features: int) -> Plan:
        """One kernel of C_out * C_in * taps parameters.

        Raises:
            StructureError: The sizes are no whole number of channels, the message names the nearest; or the window is
                larger than the input.
        """
        check_sizes(self, in_features, out_features)
        spatial = _spatial(in_features if self.spatial_shape is None else self.spatial_shape)
        taps = (self.kernel_size,) * len(spatial) if isinstance(self.kernel_size, int) else self.kernel_size
        try:
            geometry = Geometry.of(taps, spatial, self.padding)
        except ShapeError as error:
            raise StructureError(f"{self}: {error}") from error
        channels = []
        for what, size, positions in (("in", in_features, spatial), ("out", out_features, geometry.out_spatial)):
            count, rest = divmod(size, math.prod(positions))
            if rest or not count:
                near = ", ".join(map(str, nearest_multiples(size, math.prod(positions))))
                raise StructureError(
                    f"{self}: {what}_features={size} is no whole number of channels of {positions} positions; "
                    f"nearest: {near}"
                )
            channels.append(count)
        c_in, c_out = channels
        shape = (c_out, c_in, *taps)
        fan_in = c_in * math.prod(taps)
        factor, stored = kernel_factor(shape, geometry), (1, c_out, fan_in)
        return ConvolutionPlan(
            in_features, out_features, (factor,), factor.macs, (stored,), geometry, shape, self.padding
        )


@sum_rule.dispatch
def convolution_plus_convolution(A: Convolution, B: Convolution) -> LinearOperator | None:
    """Kernels add up, where geometry and channels agree."""
    if A.geometry != B.geometry or A.channels != B.channels:
        return None
    if A.is_transposed and B.is_transposed:
        return convolution_plus_convolution(A.T, B.T).T
    if A.is_transposed or B.is_transposed:
        return None
    return A.with_leaves(A.stored_kernel + B.stored_kernel)


@scale_rule.dispatch
def scale_convolution(A: Convolution, c: object) -> LinearOperator | None:
    """The kernel takes the number."""
    return A.with_leaves(A.stored_kernel * c)
