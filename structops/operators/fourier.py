"""The unitary Fourier matrix: the eigenvectors of circulants."""

from __future__ import annotations

from typing import Self

from structops import _array, _cola
from structops._array import Array
from structops.algebra.counting import complex_fft_macs, factors, macs
from structops.operator import StructuredOperator, check_arrays


class Fourier(StructuredOperator):
    r"""The unitary discrete Fourier transform, or its inverse.

    **Definition.** \(F_{jk} = \exp(-2 \pi i\, jk / n) / \sqrt n\).

    Args:
        size: \(n\).
        like: A complex array of the library, the dtype and the device that the matrix is for.

    **Cost.** No parameters; 2 n log2 n MACs per vector by our convention.

    **Numerics.** The library's FFT.
    """

    leaves = ("one",)
    static = ("size", "is_inverse")
    one: Array
    size: int
    is_inverse: bool

    def __init__(self, size: int, *, like: Array) -> None:
        check_arrays("Fourier", [like])
        self.one, self.size, self.is_inverse = _array.ones((), like), size, False

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.size, self.size

    @property
    def inferred(self) -> set[type]:
        """Unitary."""
        return {_cola.Unitary}

    def _matmat(self, X: Array) -> Array:
        return self._rmatmat(X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        fft = _array.namespace(X).fft
        X = _array.cast(X, _array.promote(self.dtype, X.dtype))
        return (fft.ifft if self.is_inverse else fft.fft)(X, norm="ortho")

    def transposed(self) -> Self:
        """Itself: the matrix is symmetric."""
        return self.with_leaves(self.one)

    def conj(self) -> Self:
        """The inverse transform."""
        result = self.with_leaves(self.one)
        result.is_inverse = not self.is_inverse
        return result

    def parameter_counts(self) -> dict[int, int]:
        """No parameters."""
        return {}


@factors.dispatch
def factors_fourier(A: Fourier) -> tuple:
    """A constant."""
    return ()


@macs.dispatch
def macs_fourier(A: Fourier) -> int:
    """One complex FFT."""
    return complex_fft_macs(A.size)
