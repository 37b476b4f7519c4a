"""The residual MLP in torch, and its training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from structops.studies.data import Split
from structops.studies.mlp import MLP
from structops.studies.training import Recipe, Result, epochs
from structops.torch import StructuredLinear, param_groups


class Block(nn.Module):
    """``h + down(gelu(up(norm(h))))``."""

    def __init__(self, up: nn.Module, down: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), up, down

    def forward(self, h: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        return h + self.down(functional.gelu(self.up(self.norm(h))))


class TorchMLP(nn.Module):
    """The network that `MLP` describes."""

    def __init__(self, sizes: MLP, generator: torch.Generator | None = None) -> None:
        super().__init__()
        layers = {
            name: StructuredLinear(n, m, spec, zero_init=sizes.starts_at_zero(name), generator=generator)
            for name, spec, n, m in sizes.layers()
        }
        self.embed, self.head = layers["embed"], layers["head"]
        self.blocks = nn.ModuleList(
            Block(layers[f"blocks.{i}.up"], layers[f"blocks.{i}.down"], sizes.width) for i in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (..., 64) to logits (..., 10)."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def train(sizes: MLP, recipe: Recipe, data: Split, seeds: Sequence[int]) -> list[Result]:
    """Train a network from every seed, one after the other."""
    return [_train(sizes, recipe, data, seed) for seed in seeds]


def _train(sizes: MLP, recipe: Recipe, data: Split, seed: int) -> Result:
    model = TorchMLP(sizes, torch.Generator().manual_seed(seed))
    with torch.device("meta"):
        base = TorchMLP(MLP("dense", recipe.base_width, sizes.depth))
    groups = param_groups(model, lr=recipe.lr, base=base, structure_aware=recipe.structure_aware)
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps = recipe.steps(data)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    losses = []
    for images, labels in epochs(data, recipe, seed):
        epoch = []
        for x, y in zip(torch.from_numpy(images), torch.from_numpy(labels), strict=True):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            epoch.append(float(loss.detach()))
        losses.append(sum(epoch) / len(epoch))
    with torch.no_grad():
        guess = model(torch.from_numpy(data.test_x)).argmax(-1).numpy()
    return Result(losses, float(np.mean(guess == data.test_y)))
