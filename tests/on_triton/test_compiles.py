"""What the interpreter cannot tell: that the kernels compile for real GPUs.  Triton needs none for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# a, b, c, d, s
WIDE = [(512, 8, 8, 512, 64), (256, 4, 4, 1024, 16)]
MANY = [(32, 32, 32, 32, 1), (64, 64, 64, 64, 4), (7, 5, 3, 9, 2)]


def compiled(cases: list[tuple[object, ...]], tmp_path: Path) -> list[dict[str, object]]:
    """In a process of its own, since the interpreter is chosen when kernels are defined."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_pair.py")
    done = subprocess.run(
        [sys.executable, program, json.dumps(cases)],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("dtype", "capability"), [("bfloat16", 90), ("float16", 80), ("float32", 90)])
def test_kernels_compile_and_fit(dtype, capability, tmp_path):
    cases = [(name, sizes, 16384, dtype, capability) for name in ("product", "gradient") for sizes in (*WIDE, *MANY)]
    cases += [(name, sizes, 16, dtype, capability) for name in ("product", "gradient") for sizes in (WIDE[0], MANY[1])]
    for case, result in zip(cases, compiled(cases, tmp_path), strict=True):
        _, sizes, tokens, *_ = case
        assert result["bytes"], case
        assert result["shared"] <= 0.75 * 160 * 1024, (case, result)  # an A100 has 163 KiB, an H100 227
        assert not result["tf32"], case  # float32 is float32
        if dtype != "float32":
            assert result["wgmma.mma_async"] or result["mma.sync"], case
        if capability == 90 and dtype != "float32" and sizes in WIDE and tokens > 16:  # plain tiles
            assert result["wgmma.mma_async"], case
            assert not result["mma.sync"], case
