"""README: its code runs as printed, its table agrees with the code, and what it points to exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import markdown_examples
import pytest

import structops as so

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


@pytest.mark.torch
@pytest.mark.jax
def test_the_code_blocks_run() -> None:
    markdown_examples.run(README)


@pytest.mark.torch
def test_the_hand_written_layer_is_the_structured_one() -> None:
    """What stands under "without" computes the very layer that stands under "with"."""
    import torch

    from structops.torch import StructuredLinear

    first, *_ = (block for block in markdown_examples.blocks(README) if block.language == "python")
    namespace: dict = {}
    exec(first.text, namespace)
    by_hand, layer = namespace["HandWritten"](), StructuredLinear(1024, 1024, "btt", bias=False)
    with torch.no_grad():
        layer.factors[0].copy_(by_hand.first)
        layer.factors[1].copy_(by_hand.last)
    x = torch.randn(3, 1024)
    torch.testing.assert_close(layer(x), by_hand(x))
    assert [scale.lr_scale for scale in so.mup.scales(layer.plan)] == [16, 16]


# The formulas of the table at d = 4096 with r = 3, b = 8 and p = 5: specs, parameters and MACs.
D, ROOT_D = 4096, 64
FFT = 2 * D * 12 + 2 * D
FORMULAS = {
    "dense": ("dense", D * D, D * D),
    "low_rank(rank=r)": ("low_rank(rank=3)", 6 * D, 6 * D),
    "kron": ("kron", 2 * D, 2 * D * ROOT_D),
    "tt(rank=r)": ("tt(rank=3)", 6 * D, 6 * D * ROOT_D),
    "btt(rank=r)": ("btt(rank=3)", 6 * D * ROOT_D, 6 * D * ROOT_D),
    "monarch(blocks=b)": ("monarch(blocks=8)", 2 * D * D // 8, 2 * D * D // 8),
    "block_diag(blocks=b)": ("block_diag(blocks=8)", D * D // 8, D * D // 8),
    "blast(rank=r, blocks=b)": ("blast(rank=3, blocks=8)", 3 * (2 * D + 64), 3 * (2 * D + 64)),
    "circulant": ("circulant", D, FFT),
    "toeplitz": ("toeplitz", 2 * D - 1, 2 * FFT + 4 * D),
    "convolution(kernel_size=p)": ("convolution(kernel_size=5)", 5, 5 * D),
}


@pytest.mark.parametrize("row", FORMULAS)
def test_the_table_agrees_with_the_code(row: str) -> None:
    assert f"`{row}`" in TEXT
    spec, num_params, macs = FORMULAS[row]
    plan = so.structure(spec).plan(D, D)
    assert (plan.num_params, plan.macs) == (num_params, macs)


def test_the_table_has_every_structure() -> None:
    table = re.findall(r"^\| `(\w+)`", TEXT, flags=re.MULTILINE)
    assert sorted(table) == sorted(so.OPERATORS)
    assert len(FORMULAS) == len(table) - len({"Permutation", "Einsum", "Diagonal"})


def test_links_point_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).is_file()] == []


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r'pip install "\.\[(\w+)\]"', TEXT)
    assert named == ["torch", "jax", "all"]
    assert set(named) <= set(extras)


def test_it_fits_two_screens() -> None:
    assert len(TEXT.splitlines()) <= 180
