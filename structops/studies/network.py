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


def optimizers(
    model: nn.Module, rule: Rule, rate: float, expansion: int, *, hidden_only: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of a network, with rates relative to the dense network of width 64.

    Args:
        model: A `Network`.
        rule: What makes rates of factors of it.
        rate: Learning rate of the dense network of width 64.
        expansion: That of the network.
        hidden_only: Whether ``rate`` is that of the structured layers alone; all others take that of `RATES`.
    """
    with torch.device("meta"):
        base = build("dense", BASE, expansion)
    if rule.family.matrices_only:
        muon, adam = split(model, plan(model, rule, base=base), lr=rate, adam_lr=RATES["adam"])
        return [Muon(muon), torch.optim.Adam(_rates(model, adam), eps=1e-15)]
    others = RATES[rule.family.name] / rate if hidden_only else 1.0
    groups = _rates(model, param_groups(model, optimizer=rule, base=base, lr=rate), others)
    # No eps: gradients of a head of zeros start tiny.
    return [torch.optim.Adam(groups, eps=1e-15) if rule.family.name == "adam" else torch.optim.SGD(groups)]


def _rates(model: nn.Module, groups: list[dict[str, Any]], others: float = 1.0) -> list[dict[str, Any]]:
    """The same groups, where the rate of the input layer is lower and that of all but hidden layers is multiplied."""
    times = {id(parameter): others for parameter in model.parameters()}
    times |= {id(parameter): others * INPUT_RATE for parameter in model.get_submodule("embed").parameters()}
    times |= {id(p): 1.0 for name, p in model.named_parameters() if name.startswith("blocks") and ".factors." in name}
    parts = []
    for group in groups:
        for factor in sorted({times[id(p)] for p in group["params"]}):
            params = [p for p in group["params"] if times[id(p)] == factor]
            parts.append({**group, "params": params, "lr": group["lr"] * factor})
    return parts
