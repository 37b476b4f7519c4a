"""Compile the kernels for a GPU that need not be there, and print what came out: a program of `test_compiles.py`."""

from __future__ import annotations

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from structops.torch import triton_kernels, triton_pair
from structops.torch.pair import Sizes


class Absent:
    """A driver for a card that is not there: all that is asked before a launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what was compiled for one card is not found for another

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str, sizes: Sizes, tokens: int, dtype: str, capability: int) -> dict[str, object]:
    """One of the kernels, for the layout of a block tensor-train: y is row-major in (a, b)."""
    driver.set_active(Absent(capability))
    a, b, c, d, s = sizes
    shapes = (tokens, c, d), (c, s, b, d), (b, a, c, s), (tokens, a, b)
    x, first, second, y = (torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape in shapes)
    tiles = triton_pair.tiles_for(sizes, tokens, x.element_size())
    if name == "product":
        arguments = [x, first, second, y, tokens, *(tensor.stride() for tensor in (x, first, second, y))]
    else:
        sums = second[None].float()
        arguments = [x, first, y, sums, tokens, 2, *(tensor.stride() for tensor in (x, first, y, sums))]
    static, options = triton_pair._static(sizes, tiles), triton_pair._options(tiles)
    binary = getattr(triton_kernels, name).warmup(*arguments, *static, grid=(1, 1, 1), **options)
    code = binary.asm["ptx"]
    return {
        "shared": binary.metadata.shared,
        "bytes": len(binary.asm["cubin"]),
        **{word: word in code for word in ("wgmma.mma_async", "mma.sync", "tf32")},
    }


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        name, sizes, *rest = case
        print(json.dumps(compiled(name, Sizes(*sizes), *rest)))
