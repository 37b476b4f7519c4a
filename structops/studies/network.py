"""The network of the muP studies, its optimisers, and the rules that they compare.

The network is the paper's: a dense input layer, residual blocks ``h + down(gelu(up(norm(h))))`` of structured layers
whose ``down`` starts at zero, and a dense head that starts at zero; no biases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from structops.mup import Rule
from structops.studies.mlp import MLP
from structops.studies.models.mlp import INPUT_RATE, ResidualMLP
from structops.studies.rules import RATES
from structops.torch import Muon, param_groups, plan, split

BASE = 64


def network(structure: str, width: int, expansion: int = 4) -> ResidualMLP:
    """The residual MLP for digits whose hidden layers have a structure; input layer and head are dense."""
    return MLP(structure, width, expansion=expansion, where="hidden", bias=False, norm_bias=False)


def build(structure: str, width: int, expansion: int) -> nn.Module:
    """The torch module of `network`."""
    return network(structure, width, expansion).build()


def optimizers(
    model: nn.Module, rule: Rule, rate: float, expansion: int, *, hidden_only: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of a network, with rates relative to the dense network of width 64.

    Args:
        model: The module of a `network`.
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
