r"""Two factors in one kernel: the product of a pair with what lies between the factors kept on chip (Triton).

A *pair* is a chain of two factors without shared labels (block tensor-train, Monarch, low rank, their transposes)::

    z[t, c, s, b] = sum_d     first[c, s, b, d]  x[t, c, d]        c blocks, fan-in d, fan-out (s, b)
    y[t, a, b]    = sum_{c,s} second[b, a, c, s] z[t, c, s, b]     b blocks, fan-in (c, s), fan-out a

**Design.** z[., b] is used by y[., b] alone, so a program owns a tile of tokens and a group of blocks b, and goes over
c: it computes the tile of z that belongs to them, rounds it to the dtype of x, as two products would, and adds its
part to the sum of y in registers.  z never leaves the chip, and its width is not bounded by shared memory.  With rank
s >= 16 both products are plain tiles, which are ``wgmma`` on Hopper; below that a group of blocks c and b fills the
tiles of the tensor cores (batched dots, ``mma.sync``) and z changes from blocks c to blocks b within the program.

**What is read how often.** x once from memory, and once per group of blocks b from the second-level cache, because
programs of the same tokens run side by side; the factors once from memory, and once per tile of tokens from the cache.
If a is larger than its tile, z is computed once per tile of a.  Where x or y has its block label last, as the output
of a block tensor-train, a group touches short runs of memory: the traffic of the cache, not of memory, grows.
`cache_bytes` counts all but that.

**Where the roofline says that it wins.** In 16 bit, two products move 4 d + 4 h bytes of memory per token (width d, h
numbers of z), this kernel 4 d, but more of the cache.  With 4.3 TB/s of memory and an assumed 5.5 of cache, ns per
token, two products against this: width 1024 with 32 blocks 1.9 : 1.5 for rank 1, 4.8 : 3.0 for rank 4, 16 : 7.5 for
rank 16; but 5.7 : 8.9 for width 2048 with 32 blocks of rank 4, and 1.9 : 4.5 for width 1024 with 4 blocks of rank 64.
So: small width with root-d blocks, or so few tokens that one launch in place of two is what counts.  Not: large width;
few big blocks, where two products reach the rate of the tensor cores; few tokens and few blocks together, where there
are fewer programs than processors; float32, which is computed as float32, without tensor cores.

**Backward.** Nothing but x is saved.  The gradient of x is the same kernel for the transposed pair.  The gradient of
the second factor has a kernel that computes z again, tile of tokens by tile of tokens, and the gradient of the first is
that kernel for the transposed pair.  That is 8 products for both passes, where saving z needs 6.  Sums over tokens are
split into parts, added afterwards in a fixed order: no atomics, equal bits in every run.

Triton is imported when the first kernel is launched; `available` tells whether it can be.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from structops.errors import BackendError, ShapeError
from structops.torch.pair import Sizes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DOT = 16  # no side of a tile that tensor cores multiply may be smaller
ACCUMULATORS = 16384  # numbers of a sum in registers: 64 KiB in float32, 64 per thread of 8 warps
SHARED_BYTES = 160 * 1024  # of `Tiles.shared`, of which compiled kernels took three quarters at most
PROGRAMS = 256  # wanted at least, about two for each processor of a large card


# ------------------------------------------------------------------------------------------------------------ the tiles


@dataclass(frozen=True)
class Tiles:
    """What one program computes at a time: powers of two, with tokens, a, d, c * s and s * b at least 16.

    Attributes:
        tokens: Tokens of a tile.
        a: Outputs of a block of the second factor.
        b: Blocks of the second factor.
        c: Blocks of the first factor.
        d: Inputs of a block of the first factor.
        s: Ranks.
        warps: Warps of 32 threads.
        stages: Tiles that are loaded ahead, plus one.
    """

    tokens: int
    a: int
    b: int
    c: int
    d: int
    s: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        """Check that Triton can compute with these."""
        sides = (self.tokens, self.a, self.d, self.c * self.s, self.s * self.b)
        powers = (self.tokens, self.a, self.b, self.c, self.d, self.s, self.warps)
        if min(sides) < DOT or any(size < 1 or size & (size - 1) for size in powers) or self.stages < 1:
            raise ShapeError(f"expected powers of two, with tokens, a, d, c * s and s * b at least {DOT}, got {self}")

    @property
    def accumulators(self) -> int:
        """Numbers of the larger of the sums that the two kernels keep in registers."""
        return self.a * self.b * max(self.tokens, self.c * self.s)

    def shared(self, itemsize: int) -> int:
        """Bytes of the tiles of x, of the first factor, and of the second or of the gradient, if all had all stages."""
        first = self.c * self.d * (self.tokens + self.s * self.b)
        return itemsize * self.stages * (first + self.accumulators)


def tiles_for(sizes: Sizes, tokens: int, itemsize: int) -> Tiles:
    """The tiles that the kernels use for these sizes; a rule without measurement.

    A program holds as much of a as it can, so that z is computed once; s is padded only as far as blocks b and c are
    too few to fill the tiles.  Groups of b grow as long as sums fit registers, so that x is read less often, but not
    where plain products of large blocks are possible, or where programs would become few.  Then tiles shrink until they
    fit shared memory.  float32 has no tensor cores, and smaller tiles.

    Args:
        sizes: Sizes of the labels.
        tokens: Number of tokens.
        itemsize: Bytes per number, 2 or 4.
    """
    half = itemsize == 2
    s = max(min(_power(sizes.s), 64 if half else 32), DOT // min(_power(sizes.b), _power(sizes.c), DOT))
    c = b = max(1, DOT // s)
    d = _between(DOT, sizes.d, 64 if half else 32)
    a = _between(DOT, sizes.a, 256 if half else 64)
    m = _between(DOT, tokens, 64 if half and c <= 4 else 32)
    while a > DOT and a * b * max(m, c * s) > ACCUMULATORS:
        a //= 2
    programs = -(-tokens // m) * -(-sizes.a // a)
    while half and a <= 64 and b < sizes.b and s * b < 128 and 2 * a * b * max(m, c * s) <= ACCUMULATORS:
        if programs * -(-sizes.b // (2 * b)) < PROGRAMS:
            break
        b *= 2
    warps = 8 if a * b * max(m, c * s) > ACCUMULATORS // 2 else 4
    tiles = Tiles(m, a, b, c, d, s, warps, 3 if c == 1 else 2)
    for smaller in ({"stages": 2}, {"d": max(DOT, d // 2)}, {"d": DOT}, {"tokens": DOT}, {"a": DOT}):
        if tiles.shared(itemsize) > SHARED_BYTES:
            tiles = replace(tiles, **smaller)
    return tiles


def cache_bytes(sizes: Sizes, tiles: Tiles, itemsize: int) -> float:
    """Bytes per token that the product reads from the second-level cache: x once per group, factors once per tile."""
    a, b, c, d, s = sizes
    tiles_a, groups = -(-a // tiles.a), -(-b // tiles.b)
    return itemsize * (c * d * groups * tiles_a + b * c * s * (d * tiles_a + a) / tiles.tokens)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _between(low: int, size: int, high: int) -> int:
    return max(low, min(_power(size), high))


# ------------------------------------------------------------------------------------------------------------ functions


def available() -> bool:
    """Whether Triton is installed; it still needs a GPU, or ``TRITON_INTERPRET=1`` in the environment."""
    return importlib.util.find_spec("triton") is not None


def runs_here(x: Tensor) -> bool:
    """Whether the kernels can run on tensors of this dtype and device."""
    return x.dtype in DTYPES and (x.device.type == "cuda" or _interprets()) and available()


def fused_pair(
    x: Tensor, first: Tensor, second: Tensor, *, out: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """``y[t, a, b] = sum over c, s, d of second[b, a, c, s] first[c, s, b, d] x[t, c, d]`` in one kernel.

    No autograd: see `fused_pair_backward`.

    Args:
        x: Shape (t, c, d), any strides.
        first: Shape (c, s, b, d), any strides.
        second: Shape (b, a, c, s), any strides.
        out: Where to write y, shape (t, a, b), any strides; by default a new contiguous tensor.
        tiles: In place of `tiles_for`.

    Raises:
        ShapeError: The sizes do not agree.
        BackendError: Dtypes or devices differ, the dtype is not bfloat16, float16 or float32, or the device is no GPU
            and Triton does not interpret.
        ImportError: Triton is not installed.

    Cost:
        ``t * c * s * b * (a + d)`` multiply-accumulates, with sums in float32; no memory but y.
    """
    sizes = _check(x, first, second)
    if out is None:
        out = x.new_empty(x.shape[0], sizes.a, sizes.b)
    _check_like(out, "out", (x.shape[0], sizes.a, sizes.b), x)
    _run(x, first, second, out, sizes, tiles)
    return out


def fused_pair_backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    needs: Sequence[bool] = (True, True, True),
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `fused_pair` by x and both factors, for the gradient (t, a, b) of y.

    Args:
        grad: Shape (t, a, b), any strides, those of a broadcast number too.
        x: As in `fused_pair`, and so are the factors.
        first: Shape (c, s, b, d).
        second: Shape (b, a, c, s).
        needs: Which of the three to compute.
        tiles: Those of the pair and those of the transposed pair, in place of `tiles_for`.

    Returns:
        For x, first and second; each with the strides of what it is the gradient of, or None.

    Raises:
        ShapeError: The sizes do not agree.
        BackendError: As in `fused_pair`.
        ImportError: Triton is not installed.

    Cost:
        Three times `fused_pair`; memory for the gradients, and for partial sums in float32 where there are few blocks.
    """
    sizes = _check(x, first, second)
    _check_like(grad, "grad", (x.shape[0], sizes.a, sizes.b), x)
    here, there = tiles or (None, None)
    # The transposed pair: what goes in is grad as (t, b, a), what comes out is x as (t, d, c).
    first_T, second_T = second.permute(0, 3, 2, 1), first.permute(0, 3, 2, 1)
    grad_T, x_T = grad.transpose(1, 2), x.transpose(1, 2)
    dx = dfirst = dsecond = None
    if needs[0]:
        dx = torch.empty_like(x)
        _run(grad_T, first_T, second_T, dx.transpose(1, 2), sizes.T, there)
    if needs[1]:
        dfirst = torch.empty_like(first)
        _run_gradient(grad_T, first_T, x_T, dfirst.permute(0, 3, 2, 1), sizes.T, there)
    if needs[2]:
        dsecond = torch.empty_like(second)
        _run_gradient(x, first, grad, dsecond, sizes, here)
    return dx, dfirst, dsecond


def _check(x: Tensor, first: Tensor, second: Tensor) -> Sizes:
    """The sizes, after everything that a kernel would not notice was checked."""
    if (x.ndim, first.ndim, second.ndim) != (3, 4, 4):
        raise ShapeError(
            f"expected x (t, c, d), first (c, s, b, d) and second (b, a, c, s), "
            f"got {tuple(x.shape)}, {tuple(first.shape)} and {tuple(second.shape)}"
        )
    c, s, b, d = first.shape
    sizes = Sizes(second.shape[1], b, c, d, s)
    if min(sizes) < 1:
        raise ShapeError(f"expected labels of size 1 or more, got {sizes}")
    _check_like(x, "x", (x.shape[0], c, d), first)
    _check_like(second, "second", (b, sizes.a, c, s), first)
    if x.dtype not in DTYPES:
        raise BackendError(f"the fused pair computes in bfloat16, float16 or float32, not in {x.dtype}")
    if x.device.type != "cuda" and not _interprets():
        raise BackendError(
            f"the fused pair runs on a GPU, got tensors on {x.device}; on a CPU only with TRITON_INTERPRET=1, for tests"
        )
    return sizes


def _check_like(tensor: Tensor, name: str, shape: tuple[int, ...], other: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise BackendError(
            f"expected x and both factors of one dtype and on one device, got {name} as {tensor.dtype} on "
            f"{tensor.device} beside {other.dtype} on {other.device}"
        )


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _run(x: Tensor, first: Tensor, second: Tensor, y: Tensor, sizes: Sizes, tiles: Tiles | None) -> None:
    """Launch the kernel of the product."""
    tokens = x.shape[0]
    if not tokens:
        return
    t = tiles or tiles_for(sizes, tokens, x.element_size())
    programs = -(-tokens // t.tokens) * -(-sizes.b // t.b) * -(-sizes.a // t.a)
    strides = (x.stride(), first.stride(), second.stride(), y.stride())
    with torch.cuda.device_of(x):
        _kernels().product[(programs,)](x, first, second, y, tokens, *strides, *_static(sizes, t), **_options(t))


def _run_gradient(x: Tensor, first: Tensor, grad: Tensor, out: Tensor, sizes: Sizes, tiles: Tiles | None) -> None:
    """Launch the kernel of the gradient of the second factor, and add its parts."""
    tokens = x.shape[0]
    if not tokens:
        out.zero_()
        return
    t = tiles or tiles_for(sizes, tokens, x.element_size())
    rows, columns = -(-sizes.b // t.b) * -(-sizes.a // t.a), -(-sizes.c // t.c) * -(-sizes.s // t.s)
    token_tiles = -(-tokens // t.tokens)
    each = -(-token_tiles // min(token_tiles, max(1, PROGRAMS // (rows * columns))))
    parts = -(-token_tiles // each)
    sums = out[None] if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)
    strides = (x.stride(), first.stride(), grad.stride(), sums.stride())
    with torch.cuda.device_of(x):
        _kernels().gradient[rows, columns, parts](
            x, first, grad, sums, tokens, each, *strides, *_static(sizes, t), **_options(t)
        )
    if parts > 1:
        out.copy_(sums.sum(0))


def _static(sizes: Sizes, tiles: Tiles) -> tuple[int, ...]:
    return (*sizes, tiles.tokens, tiles.a, tiles.b, tiles.c, tiles.d, tiles.s, _interprets())


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


@cache
def _kernels() -> ModuleType:
    """The kernels; Triton takes a second to import, so not before the first launch."""
    if not available():
        raise ImportError("the fused pair needs Triton: pip install 'structops[triton]'")
    return importlib.import_module("structops.torch.triton_kernels")
