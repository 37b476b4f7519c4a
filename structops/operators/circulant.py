"""Circulant matrices, and the FFT products that they share with Toeplitz."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from structops import _array, _cola
from structops._array import Array, Dtype
from structops._cola import Algorithm, LinearOperator
from structops.algebra.counting import factors, macs
from structops.algebra.determinant import determinant_rule, of_eigenvalues
from structops.algebra.diagonal import diagonal_length, diagonal_rule
from structops.algebra.eigen import Spectrum, eigen_rule, exp_rule, function_rule
from structops.algebra.inverse import inverse_rule, pinv_rule, reciprocal
from structops.algebra.product import product_rule
from structops.algebra.scalar import scale_rule
from structops.algebra.sum import sum_rule
from structops.algebra.svd import SVD, svd_rule
from structops.chain import Factor
from structops.errors import StructureError
from structops.operator import StructuredOperator, check_arrays, check_axes, check_precision
from structops.operators.diagonal import Diagonal
from structops.operators.fourier import Fourier
from structops.operators.permutation import ascending, descending
from structops.spec import Plan, Structure, check_sizes, register


def cyclic_convolve(column: Array, x: Array) -> Array:
    """``y_i = sum_j column[(i - j) mod n] x_j`` on the last axis, by FFT.

    16-bit inputs are transformed in float32, and the result has the dtype to which the inputs promote.
    """
    dtype = _array.promote(column.dtype, x.dtype)
    if 0 in x.shape:  # torch's FFT refuses empty batches; the result has the shape of x
        return _array.cast(x, dtype)
    xp = _array.namespace(x)
    working = xp.float32 if _array.is_half(dtype) else dtype
    column, x = _array.cast(column, working), _array.cast(x, working)
    n = column.shape[-1]
    if _array.is_complex(working):
        y = xp.fft.ifft(xp.fft.fft(column) * xp.fft.fft(x))
    else:
        y = xp.fft.irfft(xp.fft.rfft(column) * xp.fft.rfft(x), n=n)
    return _array.cast(y, dtype)


def fft_macs(n: int) -> int:
    """Multiply-accumulates of a cyclic convolution of length n with a fixed kernel, by our convention.

    Two real FFTs of ``n log2 n`` each and a product of half spectra of ``2 n``; the kernel's own transform, the same
    for all vectors, is not counted.
    """
    return math.ceil(2 * n * math.log2(n)) + 2 * n if n > 1 else 1


class Circulant(StructuredOperator):
    r"""A circulant matrix: a cyclic convolution.

    **Definition.** \(A_{ij} = c_{(i - j) \bmod n}\), as ``scipy.linalg.circulant``.

    Args:
        first_column: \(c\), shape (n,).

    Raises:
        ShapeError: It is not a vector.
        BackendError: It is no torch or JAX array.

    **Shapes.** ``A @ X``: (n,) or (n, k); ``X @ A``: (..., n).

    **Cost.** n parameters.  MACs per vector, by our convention for FFTs: 2 n log2 n + 2 n.

    **Numerics.** FFT products: an error of some epsilon * log n relative to the norm of the result, not entrywise;
    16-bit inputs are transformed in float32.

    **References.** Gray, "Toeplitz and Circulant Matrices" (2006); SciPy's ``circulant`` for the axis.

    Example:
        >>> import torch
        >>> Circulant(torch.arange(3.)).to_dense().round().int().tolist()
        [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    """

    leaves = ("column",)
    static = ("is_transposed",)
    column: Array
    is_transposed: bool  # the first row, not the first column, is stored: the transpose keeps the array

    def __init__(self, first_column: Array) -> None:
        check_arrays("Circulant", [first_column])
        check_axes("Circulant: first_column", first_column, "(n)")
        self.column, self.is_transposed = first_column, False

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (int(self.column.shape[0]),) * 2

    @property
    def first_column(self) -> Array:
        """The first column; that of a transpose is the first column reversed but for its head."""
        return _reversed(self.column) if self.is_transposed else self.column

    def _matmat(self, X: Array) -> Array:
        return cyclic_convolve(self.first_column, X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        return cyclic_convolve(self.transposed().first_column, X)

    def transposed(self) -> Self:
        """The circulant whose first row was the first column."""
        return self.tree_unflatten(((not self.is_transposed,), frozenset()), (self.column,))


def _reversed(column: Array) -> Array:
    xp = _array.namespace(column)
    return xp.concat([column[:1], xp.flip(column[1:], axis=0)])


def circulant_factor(n: int) -> Factor:
    """One convolution with n taps, one channel in and out, at n positions."""
    return Factor("first_column", (n,), fan_in=n, fan_out=1, sharing=n)


@factors.dispatch
def factors_circulant(A: Circulant) -> tuple:
    """One factor, whichever way round."""
    return (circulant_factor(A.shape[0]),)


@macs.dispatch
def macs_circulant(A: Circulant) -> int:
    """By the convention for FFTs."""
    return fft_macs(A.shape[0])


@dataclass(frozen=True)
class CirculantPlan(Plan):
    """One vector, convolved with x."""

    def product(self, factors: Sequence[Array], x: Array) -> Array:
        """By FFT."""
        return cyclic_convolve(factors[0].reshape((self.in_features,)), x)

    def operator(self, factors: Sequence[Array]) -> Circulant:
        """The operator that views the vector."""
        return Circulant(factors[0].reshape((self.in_features,)))


@register
@dataclass(frozen=True)
class CirculantStructure(Structure):
    """``circulant``: square layers; one convolution with as many taps as there are features.

    Its factor has fan-in n, fan-out 1 and is shared over n positions.  muP's rule for that shape is a heuristic that
    the paper does not test (it discusses convolutions, section 2, and trains none).
    """

    name = "circulant"

    def plan(self, in_features: int, out_features: int) -> Plan:
        """One vector of in_features parameters.

        Raises:
            StructureError: The layer is not square.
        """
        check_sizes(self, in_features, out_features)
        if in_features != out_features:
            raise StructureError(
                f"circulant: expected in_features == out_features, got {in_features} and {out_features}; "
                f"toeplitz takes rectangular sizes"
            )
        n = in_features
        return CirculantPlan(n, n, (circulant_factor(n),), fft_macs(n), ((1, 1, n),))


def spectrum(A: Circulant) -> Array:
    """The eigenvalues: the Fourier transform of the first column.

    Raises:
        BackendError: The column has 16 bits.
    """
    check_precision("a Fourier transform that is kept", A.dtype)
    return _array.namespace(A.column).fft.fft(_array.cast(A.first_column, _array.complex_of(A.dtype)))


def from_spectrum(values: Array, dtype: Dtype) -> Circulant:
    """The circulant with these eigenvalues; real where the dtype is, when they come in conjugate pairs."""
    column = _array.namespace(values).fft.ifft(values)
    return Circulant(_array.cast(column if _array.is_complex(dtype) else column.real, dtype))


@product_rule.dispatch
def circulant_times_circulant(A: Circulant, B: Circulant) -> LinearOperator | None:
    """Columns convolve, by FFT."""
    return Circulant(cyclic_convolve(A.first_column, B.first_column))


@sum_rule.dispatch
def circulant_plus_circulant(A: Circulant, B: Circulant) -> LinearOperator | None:
    """Columns add up."""
    return Circulant(A.first_column + B.first_column)


@scale_rule.dispatch
def scale_circulant(A: Circulant, c: object) -> LinearOperator | None:
    """The column takes the number."""
    return A.with_leaves(A.column * c)


# ---------------------------------------------------------------------------------------------------- linear algebra


@inverse_rule.dispatch
def inverse_circulant(A: Circulant, alg: Algorithm) -> LinearOperator | None:
    """Reciprocal eigenvalues."""
    return from_spectrum(1 / spectrum(A), A.dtype)


@pinv_rule.dispatch
def pinv_circulant(A: Circulant, alg: Algorithm) -> LinearOperator | None:
    """Reciprocal eigenvalues, and 0 of those that are 0 beside the largest."""
    return from_spectrum(reciprocal(spectrum(A)), A.dtype)


@determinant_rule.dispatch
def determinant_circulant(A: Circulant, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """The product of the eigenvalues; of a real matrix it is real."""
    sign, log = of_eigenvalues(spectrum(A))
    return (sign if _array.is_complex(A.dtype) else _array.namespace(sign).sign(sign.real)), log


@diagonal_rule.dispatch
def diagonal_of_circulant(A: Circulant, k: int, alg: Algorithm) -> Any:
    """One number, repeated."""
    return A.first_column[-k % A.shape[0]] * _array.ones((diagonal_length(A, k),), A.column)


@eigen_rule.dispatch
def eigen_circulant(A: Circulant, alg: Algorithm) -> Spectrum | None:
    """The Fourier transform of the first column, and Fourier vectors."""
    values = spectrum(A)
    return ascending(values, Fourier(A.shape[0], like=values).H)


@function_rule.dispatch
def function_of_circulant(f: Callable, A: Circulant, alg: Algorithm) -> LinearOperator | None:
    """The function of the eigenvalues: circulant and complex, real for a self-adjoint real matrix."""
    values = spectrum(A)
    if A.isa(_cola.SelfAdjoint):
        return from_spectrum(_array.cast(f(values.real), values.dtype), A.dtype)
    return from_spectrum(f(values), values.dtype)


@exp_rule.dispatch
def exp_of_circulant(A: Circulant, alg: Algorithm) -> LinearOperator | None:
    """Circulant, in the dtype of A."""
    values = spectrum(A)
    return from_spectrum(_array.namespace(values).exp(values), A.dtype)


@svd_rule.dispatch
def svd_circulant(A: Circulant) -> SVD | None:
    """The moduli of the eigenvalues, and Fourier vectors; complex."""
    values = spectrum(A)
    F = Fourier(A.shape[0], like=values)
    size, phase = _array.polar(values)
    return descending(F.H @ Diagonal(phase), size, F)
