"""The training of the demonstration in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from structops.studies.data import Split
from structops.studies.mlp import MLP
from structops.studies.training import Recipe, Result, epochs
from structops.torch import param_groups


def train(sizes: MLP, recipe: Recipe, data: Split, seeds: Sequence[int]) -> list[Result]:
    """Train a network from every seed, one after the other."""
    return [_train(sizes, recipe, data, seed) for seed in seeds]


def _train(sizes: MLP, recipe: Recipe, data: Split, seed: int) -> Result:
    model = sizes.build(torch.Generator().manual_seed(seed))
    with torch.device("meta"):
        base = sizes.base(recipe.base_width).build()
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
