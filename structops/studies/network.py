"""The network of the muP studies, its optimisers, and the rules that they compare.

The network is the paper's: a dense input layer, residual blocks ``h + down(gelu(up(norm(h))))`` of structured layers
whose ``down`` starts at zero, and a dense head that starts at zero; no biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from structops.errors import StructureWarning
from structops.mup import Rule
from structops.studies.mlp import CLASSES, PIXELS
from structops.torch import Muon, StructuredLinear, param_groups, plan, split

BASE = 64
INPUT_RATE = 0.1  # of the input layer relative to its rule, as in the paper, so that it does not hide the others

# Learning rate of the dense network of width 64; that of Adam also beside Muon.  SGD from a head of zeros is a race
# between blocks, which at 0.3 amplifies chance differences of the start; at 0.1 and below slopes do not depend on it.
RATES = {"adam": 3e-3, "sgd": 0.1, "muon": 2e-2}

RULES: dict[str, Callable[[str], Rule]] = {
    "paper": lambda optimizer: Rule(optimizer),
    "blocks": lambda optimizer: Rule(optimizer, block_count=True),
    "corrected": lambda optimizer: Rule(optimizer, block_count=True, share_exponent=0.5),
    "naive": lambda optimizer: Rule(optimizer, structure_aware=False),
}


class Block(nn.Module):
    """``h + down(gelu(up(norm(h))))``."""

    def __init__(self, structure: str, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.up = StructuredLinear(width, expansion * width, structure, bias=False)
        self.down = StructuredLinear(expansion * width, width, structure, bias=False, zero_init=True)

    def forward(self, h: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        out: Tensor = h + self.down(functional.gelu(self.up(self.norm(h))))
        return out


class Network(nn.Module):
    """Residual MLP for digits with structured hidden layers; input layer and head are dense.

    Args:
        structure: Of the hidden layers.
        width: Of the residual stream.
        expansion: Width inside a block, relative to ``width``.
        depth: Number of blocks.
    """

    def __init__(self, structure: str, width: int, expansion: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = StructuredLinear(PIXELS, width, "dense", bias=False)
        self.blocks = nn.ModuleList(Block(structure, width, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = StructuredLinear(width, CLASSES, "dense", bias=False, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (..., 64) to logits (..., 10)."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h))
        return out


def build(structure: str, width: int, expansion: int) -> Network:
    """The network, without the warning that a size does not suit a structure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StructureWarning)
        return Network(structure, width, expansion)


def optimizers(model: nn.Module, rule: Rule, rate: float, expansion: int) -> list[Any]:
    """The optimisers of a network, with rates relative to the dense network of width 64."""
    with torch.device("meta"):
        base = build("dense", BASE, expansion)
    made: list[Any] = []
    if rule.family.matrices_only:
        muon, adam = split(model, plan(model, rule, base=base), lr=rate, adam_lr=RATES["adam"])
        made = [Muon(muon), torch.optim.Adam(_input_slower(model, adam), eps=1e-15)]
    else:
        groups = _input_slower(model, param_groups(model, optimizer=rule, base=base, lr=rate))
        # No eps: gradients of a head of zeros start tiny.
        made = [torch.optim.Adam(groups, eps=1e-15) if rule.family.name == "adam" else torch.optim.SGD(groups)]
    return made


def _input_slower(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, with the input layer in one of its own."""
    mine = {id(parameter) for parameter in model.get_submodule("embed").parameters()}
    out = []
    for group in groups:
        embed = [p for p in group["params"] if id(p) in mine]
        rest = [p for p in group["params"] if id(p) not in mine]
        out += [{**group, "params": rest}] if rest else []
        out += [{**group, "params": embed, "lr": group["lr"] * INPUT_RATE}] if embed else []
    return out
