"""Circulant, Toeplitz and convolution: every parameter is the mean of the entries that it fills.

Such a matrix is ``A = sum_k theta_k E_k`` with 0-1 matrices ``E_k`` that do not overlap.  They are orthogonal, so the
nearest member has ``theta_k = <E_k, W> / <E_k, E_k>``.  In the norm of a covariance C they are not: the normal
equations have the matrix ``G_kl = <E_k C, E_l>``, which is circulant for circulants and small for convolutions.
"""

from __future__ import annotations

import math

import numpy as np

from structops import _array
from structops._array import Array
from structops.operators.circulant import CirculantPlan
from structops.operators.convolution import ConvolutionPlan
from structops.operators.toeplitz import ToeplitzPlan
from structops.projection.method import Found, Options
from structops.projection.solving import positive_inverse

MEANS = Found("exact", "every parameter is the mean of the entries that it fills")
REGRESSED = Found("exact", "the matrix is linear in its parameters, and so this is one least-squares problem")


def fit_circulant(plan: CirculantPlan, W: Array, options: Options) -> Found:
    """Means along cyclic diagonals; with a covariance, a division in the Fourier domain."""
    xp, n, covariance = _array.namespace(W), plan.in_features, options.covariance
    W = W if covariance is None else _array.cast(W, covariance.dtype)
    column = cyclic_sums(W) / n
    if covariance is None:
        return MEANS.having([column.reshape((1, 1, n))])
    gram = xp.fft.fft(_array.cast(cyclic_sums(covariance), _array.complex_of(W.dtype))).real
    floor = float(xp.finfo(gram.dtype).eps) * n * xp.max(gram)
    inverse = xp.where(gram > floor, 1 / xp.where(gram > floor, gram, xp.ones_like(gram)), xp.zeros_like(gram))
    left = cyclic_sums((W - plan.operator([column]).to_dense()) @ covariance)
    step = xp.fft.ifft(xp.fft.fft(_array.cast(left, _array.complex_of(W.dtype))) * inverse)
    column = column + (step if _array.is_complex(W.dtype) else step.real)
    return REGRESSED.having([column.reshape((1, 1, n))])


def fit_toeplitz(plan: ToeplitzPlan, W: Array, options: Options) -> Found:
    """Means along diagonals; with a covariance, as many normal equations as there are diagonals."""
    rows, cols = W.shape
    xp, count, covariance = _array.namespace(W), rows + cols - 1, options.covariance
    W = W if covariance is None else _array.cast(W, covariance.dtype)
    filled = np.minimum(np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1)), min(rows, cols))
    diagonals = diagonal_sums(W) / xp.asarray(filled.astype(np.float64), dtype=_array.real_of(W.dtype), device=W.device)
    if covariance is not None:
        # Row i has the diagonals i ... i + in - 1, in reverse: the covariance, turned round, from (i, i) on.
        gram = _smeared(_array.pad(xp.flip(covariance, axis=(0, 1)), [(0, rows - 1)] * 2), rows)
        left = diagonal_sums((W - plan.operator([diagonals.reshape((1, 1, -1))]).to_dense()) @ covariance)
        diagonals = diagonals + left @ positive_inverse(gram)
    return (MEANS if covariance is None else REGRESSED).having([diagonals.reshape((1, 1, count))])


def diagonal_sums(M: Array) -> Array:
    """The sum of every diagonal, from the top right to the bottom left."""
    rows, cols = (int(n) for n in M.shape)
    xp = _array.namespace(M)
    # One more column than diagonals: reading on by one fewer moves every row to the right of the one above.
    skewed = _array.pad(xp.flip(M, axis=1), [(0, 0), (0, rows)]).reshape((-1,))[: rows * (rows + cols - 1)]
    return skewed.reshape((rows, rows + cols - 1)).sum(0)


def cyclic_sums(M: Array) -> Array:
    """The sum of every cyclic diagonal ``i - j = k mod n`` of a square matrix."""
    n = int(M.shape[0])
    sums = diagonal_sums(M)
    return sums[n - 1 :] + _array.pad(sums[: n - 1], [(1, 0)])


def _smeared(M: Array, count: int) -> Array:
    """The sum of a square matrix and of its copies moved down the diagonal by 1 ... count - 1, by doubling."""
    total, done, window, width = 0 * M, 0, M, 1
    while True:
        if count & width:
            total, done = total + _moved(window, done), done + width
        if done == count:
            return total
        window, width = window + _moved(window, width), 2 * width


def _moved(M: Array, places: int) -> Array:
    """A square matrix moved down its diagonal."""
    n = int(M.shape[0])
    return _array.pad(M[: n - places, : n - places], [(places, 0)] * 2) if places else M


def fit_convolution(plan: ConvolutionPlan, W: Array, options: Options) -> Found:
    """The mean over all positions at which a tap meets the input; with a covariance, normal equations of one kernel."""
    (c_out, c_in, *taps), covariance = plan.kernel_shape, options.covariance
    W = W if covariance is None else _array.cast(W, covariance.dtype)
    seen = [_pairs(plan, tap) for tap in np.ndindex(*taps)]
    kernel = _gathered(W, plan, seen, mean=True)
    if covariance is not None:
        xp, inputs = _array.namespace(W), math.prod(plan.geometry.spatial)
        spread = covariance.reshape((c_in, inputs, c_in, inputs))
        gram = [[_met(spread, seen[t], seen[u]) for u in range(len(seen))] for t in range(len(seen))]
        stacked = xp.stack([xp.stack(row) for row in gram])  # tap, tap, channel, channel
        size = c_in * len(seen)
        matrix = _array.permute(stacked, (2, 0, 3, 1)).reshape((size, size))
        left = _gathered((W - plan.operator([kernel]).to_dense()) @ covariance, plan, seen, mean=False)
        kernel = kernel + (left.reshape((c_out, size)) @ positive_inverse(matrix)).reshape(kernel.shape)
    return (MEANS if covariance is None else REGRESSED).having([kernel.reshape((1, c_out, -1))])


def _pairs(plan: ConvolutionPlan, tap: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Flat output and input positions that a tap joins."""
    geometry = plan.geometry
    places = np.indices(geometry.out_spatial).reshape(len(tap), -1)
    inputs = places + np.array([[t - before] for t, (before, _) in zip(tap, geometry.pads, strict=True)])
    sizes = np.array(geometry.spatial)[:, None]
    inside = np.ones(inputs.shape[1], dtype=bool) if geometry.is_circular else ((inputs >= 0) & (inputs < sizes)).all(0)
    flat = np.ravel_multi_index(tuple(inputs[:, inside] % sizes), geometry.spatial)
    return np.flatnonzero(inside), np.asarray(flat)


def _gathered(M: Array, plan: ConvolutionPlan, seen: list[tuple[np.ndarray, np.ndarray]], mean: bool) -> Array:
    """Sums or means of the entries of every tap, (C_out, C_in, taps)."""
    c_out, c_in, *_ = plan.kernel_shape
    outputs, inputs = math.prod(plan.geometry.out_spatial), math.prod(plan.geometry.spatial)
    matrix = M.reshape((c_out, outputs, c_in, inputs))
    xp = _array.namespace(M)
    columns = []
    for out_places, in_places in seen:
        rows, cols = (xp.asarray(places, device=M.device) for places in (out_places, in_places))
        total = _array.permute(matrix, (1, 3, 0, 2))[rows, cols].sum(0)
        columns.append(total / max(len(out_places), 1) if mean else total)
    return xp.stack(columns, axis=-1)


def _met(spread: Array, first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> Array:
    """The covariance of what two taps see, summed over the positions that both see."""
    _, at_first, at_second = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
    xp = _array.namespace(spread)
    rows, cols = (xp.asarray(p, device=spread.device) for p in (first[1][at_first], second[1][at_second]))
    return _array.permute(spread, (1, 3, 0, 2))[rows, cols].sum(0)
