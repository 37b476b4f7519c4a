"""The two Triton kernels behind `structops.torch.triton_pair`, which imports this file when it launches the first one.

Sizes and tiles are known to the compiler, strides are not, unless they are 1.  Tiles have an axis of blocks in front;
where that is of size 1, ``FLAT`` leaves it away, since only products of plain matrices become the fastest instructions.
``WIDEN`` is for Triton's interpreter, which multiplies the bits of bfloat16.

Arguments have no types here, because Triton reads annotations as it reads code.  Without Triton the file can be
imported, and its functions cannot be used.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:

    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """A stand-in for Triton's decorator."""
        return function or jit


@jit
def far(index, stride):
    """``index * stride`` in 64 bit, for tensors with an axis of tokens."""
    return index.to(tl.int64) * stride


@jit
def outer_sum(block, row, column, FLAT: tl.constexpr):
    """``block[i] + row[j] + column[k]``."""
    if FLAT:
        result = block[:, None] + row[:, None] + column[None, :]
    else:
        result = block[:, None, None] + row[None, :, None] + column[None, None, :]
    return result


@jit
def outer_and(block, row, column, FLAT: tl.constexpr):
    """``block[i] and row[j] and column[k]``."""
    if FLAT:
        result = block[:, None] & row[:, None] & column[None, :]
    else:
        result = block[:, None, None] & row[None, :, None] & column[None, None, :]
    return result


@jit
def zeros(block: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, FLAT: tl.constexpr):
    """Where a product is summed up, in float32 for every dtype."""
    if FLAT:  # noqa: SIM108
        result = tl.zeros((rows, columns), tl.float32)
    else:
        result = tl.zeros((block, rows, columns), tl.float32)
    return result


@jit
def multiply(left, right, total, WIDEN: tl.constexpr):
    """``total + left @ right``; the product of float32 is that of float32."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@jit
def between(
    x, first, t, b0, c0, s0, tokens, sx, sf,
    B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    TT: tl.constexpr, TB: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr, TS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of z: (TT, TS) without groups, else (TB, TT, TC * TS)."""
    FLAT: tl.constexpr = TC == 1
    n = tl.arange(0, TS * TB)
    s = s0 + n // TB
    b = b0 + n % TB
    c = c0 + tl.arange(0, TC)
    z = zeros(TC, TT, TS * TB, FLAT)
    for d0 in range(0, D, TD):
        d = d0 + tl.arange(0, TD)
        x_tile = tl.load(
            x + outer_sum(far(c, sx[1]), far(t, sx[0]), far(d, sx[2]), FLAT),
            mask=outer_and(c < C, t < tokens, d < D, FLAT),
            other=0.0,
        )
        first_tile = tl.load(
            first + outer_sum(c * sf[0], d * sf[3], s * sf[1] + b * sf[2], FLAT),
            mask=outer_and(c < C, d < D, (s < S) & (b < B), FLAT),
            other=0.0,
        )
        z = multiply(x_tile, first_tile, z, WIDEN)
    z = z.to(x.dtype.element_ty)
    if TB > 1 or TC > 1:
        z = z.reshape(TC, TT, TS, TB).permute(3, 1, 0, 2).reshape(TB, TT, TC * TS)
    return z


@jit(do_not_specialize=["tokens"])
def product(
    x, first, second, y, tokens, sx, sf, ss, sy,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    TT: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr, TS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """``y[t, a, b] = sum over c, s of second[b, a, c, s] z[t, c, s, b]``."""
    FLAT: tl.constexpr = TB * TC == 1
    GROUPS: tl.constexpr = (B + TB - 1) // TB
    RANKS: tl.constexpr = (S + TS - 1) // TS
    STEPS: tl.constexpr = (C + TC - 1) // TC * RANKS
    COLUMNS: tl.constexpr = (A + TA - 1) // TA * GROUPS
    column = tl.program_id(0) % COLUMNS
    b0 = column % GROUPS * TB
    b = b0 + tl.arange(0, TB)
    a = column // GROUPS * TA + tl.arange(0, TA)
    t = tl.program_id(0) // COLUMNS * TT + tl.arange(0, TT)
    k = tl.arange(0, TC * TS)
    total = zeros(TB, TT, TA, FLAT)
    for step in range(STEPS):
        c0 = step // RANKS * TC
        s0 = step % RANKS * TS
        z = between(x, first, t, b0, c0, s0, tokens, sx, sf, B, C, D, S, TT, TB, TC, TD, TS, WIDEN)
        c = c0 + k // TS
        s = s0 + k % TS
        second_tile = tl.load(
            second + outer_sum(b * ss[0], c * ss[2] + s * ss[3], a * ss[1], FLAT),
            mask=outer_and(b < B, (c < C) & (s < S), a < A, FLAT),
            other=0.0,
        )
        total = multiply(z, second_tile, total, WIDEN)
    tl.store(
        y + outer_sum(far(b, sy[2]), far(t, sy[0]), far(a, sy[1]), FLAT),
        total.to(y.dtype.element_ty),
        mask=outer_and(b < B, t < tokens, a < A, FLAT),
    )


@jit(do_not_specialize=["tokens", "each"])
def gradient(
    x, first, grad, out, tokens, each, sx, sf, sg, so,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    TT: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr, TS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """``out[part, b, a, c, s] = sum of grad[t, a, b] z[t, c, s, b]`` over the tokens of ``each`` tiles."""
    FLAT: tl.constexpr = TB * TC == 1
    GROUPS: tl.constexpr = (B + TB - 1) // TB
    RANKS: tl.constexpr = (S + TS - 1) // TS
    b0 = tl.program_id(0) % GROUPS * TB
    b = b0 + tl.arange(0, TB)
    a = tl.program_id(0) // GROUPS * TA + tl.arange(0, TA)
    c0 = tl.program_id(1) // RANKS * TC
    s0 = tl.program_id(1) % RANKS * TS
    part = tl.program_id(2)
    k = tl.arange(0, TC * TS)
    c = c0 + k // TS
    s = s0 + k % TS
    total = zeros(TB, TA, TC * TS, FLAT)
    for step in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(tokens, TT))):
        t = step * TT + tl.arange(0, TT)
        z = between(x, first, t, b0, c0, s0, tokens, sx, sf, B, C, D, S, TT, TB, TC, TD, TS, WIDEN)
        grad_tile = tl.load(
            grad + outer_sum(far(b, sg[2]), far(a, sg[1]), far(t, sg[0]), FLAT),
            mask=outer_and(b < B, a < A, t < tokens, FLAT),
            other=0.0,
        )
        total = multiply(grad_tile, z, total, WIDEN)
    tl.store(
        out + far(part, so[0]) + outer_sum(b * so[1], a * so[2], c * so[3] + s * so[4], FLAT),
        total.to(out.dtype.element_ty),
        mask=outer_and(b < B, a < A, (c < C) & (s < S), FLAT),
    )
