"""Models for the checks of several processes, small and in double precision, and the training they share."""

from __future__ import annotations

import torch
from torch import nn

from structops.torch import StructuredLinear, init_, param_groups, plan

WIDTH, HEADS, VOCABULARY = 16, 4, 11


def seed(number=0):
    return torch.Generator().manual_seed(number)


class Block(nn.Module):
    """Attention and a multilayer perceptron; it does not know over how many processes its heads are spread."""

    def __init__(self, structure, **kwargs):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (StructuredLinear(WIDTH, WIDTH, structure, **kwargs) for _ in range(4))
        self.up = StructuredLinear(WIDTH, 4 * WIDTH, structure, **kwargs)
        self.down = StructuredLinear(4 * WIDTH, WIDTH, structure, **kwargs)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(-2, -3) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, structure="btt(rank=2)", **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(structure, **kwargs) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(structure="btt(rank=2)", **kwargs):
    """A model that is the same in every process and every call."""
    torch.manual_seed(0)
    model = Net(structure, **kwargs).double()
    init_(model, plan(model), seed(1))
    return model


def batch(step):
    """Four sequences."""
    return torch.randint(VOCABULARY, (4, 6), generator=seed(100 + step))


def loss_of(model, tokens):
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), ((tokens + 1) % VOCABULARY).flatten())


def adam(model, groups=None, **kwargs):
    return torch.optim.AdamW(groups or param_groups(model, lr=3e-3, weight_decay=0.1), **kwargs)


def train(model, optimizers, steps=4, part=slice(None), clip=None, start=0):
    """Losses of a few steps; ``part`` is what this process sees of every batch."""
    losses = []
    for step in range(start, start + steps):
        loss = loss_of(model, batch(step)[part])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            clip(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
