"""Compile the kernels for a GPU that need not be there, and print what came out: a program of `test_compiles.py`."""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structops.torch import triton_kernels
from structops.torch.pair import Sizes
from structops.torch.triton_pair import tiles_for

POINTERS = {"x", "first", "second", "y", "grad", "out"}
STRIDES = {"sx": 3, "sf": 4, "ss": 4, "sy": 3, "sg": 3, "so": 5}
ALIGNED = [["tt.divisibility", 16]]


def compiled(name: str, sizes: Sizes, tokens: int, dtype: str, capability: int) -> dict[str, object]:
    """A kernel for contiguous tensors whose strides are multiples of 16, as those of wide layers."""
    kernel = getattr(triton_kernels, name)
    tiles = tiles_for(sizes, tokens, 4 if dtype == "fp32" else 2)
    static = dict(zip("ABCDS", sizes, strict=True))
    static |= {"TT": tiles.tokens, "TA": tiles.a, "TB": tiles.b, "TC": tiles.c, "TD": tiles.d, "TS": tiles.s}
    static["WIDEN"] = False
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in static:
            signature[argument], constants[(place,)] = "constexpr", static[argument]
        elif argument in STRIDES:
            last = STRIDES[argument] - 1
            signature[argument] = (*["i32"] * last, "constexpr")
            constants[(place, last)] = 1
            attributes |= {(place, axis): ALIGNED for axis in range(last)}
        elif argument in POINTERS:
            signature[argument], attributes[(place,)] = f"*{dtype}", ALIGNED
        else:
            signature[argument] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
