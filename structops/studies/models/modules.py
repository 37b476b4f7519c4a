"""The torch modules of the models, each built from its sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from structops.errors import ShapeError
from structops.studies.models.gpt import GPT
from structops.studies.models.layers import linear
from structops.studies.models.mlp import ResidualMLP
from structops.studies.models.sizes import Model
from structops.studies.models.transformer import Transformer
from structops.studies.models.vit import ViT


def linears(sizes: Model, generator: torch.Generator | None) -> dict[str, nn.Module]:
    """All linear layers of a model by name, drawn in the order of ``sizes.layers()``."""
    return {
        layer.name: linear(
            layer.structure,
            layer.in_features,
            layer.out_features,
            bias=layer.bias,
            zero_init=layer.zero_init,
            weight_norm=layer.weight_norm,
            generator=generator,
        )
        for layer in sizes.layers()
    }


class FeedForward(nn.Module):
    """``h + down(gelu(up(norm(h))))``."""

    def __init__(self, up: nn.Module, down: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, up, down

    def forward(self, h: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        out: Tensor = h + self.down(functional.gelu(self.up(self.norm(h))))
        return out


class ResidualMLPModule(nn.Module):
    """The network that `ResidualMLP` describes."""

    def __init__(self, sizes: ResidualMLP, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        made = linears(sizes, generator)
        self.embed, self.head = made["embed"], made["head"]
        self.blocks = nn.ModuleList(
            FeedForward(made[f"blocks.{i}.up"], made[f"blocks.{i}.down"], _norm(sizes, sizes.width))
            for i in range(sizes.depth)
        )
        self.norm = _norm(sizes, sizes.width) if sizes.final_norm else nn.Identity()

    def features(self, x: Tensor) -> list[Tensor]:
        """The residual stream (..., width) after the input layer and after every block."""
        if x.shape[-1] != self.sizes.in_features:
            x = x.flatten(1)
        h = self.embed(x)
        stream = [functional.gelu(h) if self.sizes.input_gelu else h]
        for block in self.blocks:
            stream.append(block(stream[-1]))
        return stream

    def forward(self, x: Tensor) -> Tensor:
        """Examples (..., in_features), or (batch, ...) of more axes, to logits (..., classes)."""
        out: Tensor = self.head(self.norm(self.features(x)[-1]))
        return out


class Attention(nn.Module):
    """``o`` of the attention of ``q``, ``k`` and ``v``, with a norm of every head's queries and keys."""

    def __init__(self, sizes: Transformer, made: dict[str, nn.Module], prefix: str, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (made[f"{prefix}.{name}"] for name in "qkvo")
        self.q_norm, self.k_norm = (_norm(sizes, sizes.head_size) for _ in range(2))
        self.heads, self.scale, self.causal = sizes.head_count, sizes.attention_scale, causal

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, tokens, width) to the same."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        # Normalised before the axes trade places, so that attention keeps this order in memory and nothing is copied.
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Block(FeedForward):
    """``h + attention(norm(h))``, then ``h + down(gelu(up(norm(h))))``."""

    def __init__(self, sizes: Transformer, made: dict[str, nn.Module], prefix: str, causal: bool) -> None:
        super().__init__(made[f"{prefix}.up"], made[f"{prefix}.down"], _norm(sizes, sizes.width))
        self.attention_norm = _norm(sizes, sizes.width)
        self.attention = Attention(sizes, made, f"{prefix}.attention", causal)

    def forward(self, h: Tensor) -> Tensor:
        """Shape (batch, tokens, width) to the same."""
        return super().forward(h + self.attention(self.attention_norm(h)))


class TransformerModule(nn.Module):
    """What the two transformers share: positions, blocks, the final norm and the head."""

    def __init__(
        self,
        sizes: Transformer,
        made: dict[str, nn.Module],
        causal: bool,
        std: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.positions = _embedding(sizes.tokens, sizes.width, std, generator)
        self.blocks = nn.ModuleList(Block(sizes, made, f"blocks.{i}", causal) for i in range(sizes.depth))
        self.norm, self.head = _norm(sizes, sizes.width), made["head"]

    def embedded(self, x: Tensor) -> Tensor:
        """The residual stream before the first block."""
        raise NotImplementedError

    def features(self, x: Tensor) -> list[Tensor]:
        """The residual stream (batch, tokens, width) before the first and after every block."""
        stream = [self.embedded(x)]
        for block in self.blocks:
            stream.append(block(stream[-1]))
        return stream

    def final(self, x: Tensor) -> Tensor:
        """The normalised end of the residual stream."""
        out: Tensor = self.norm(self.features(x)[-1])
        return out


class ViTModule(TransformerModule):
    """The network that `ViT` describes."""

    def __init__(self, sizes: ViT, generator: torch.Generator | None = None) -> None:
        made = linears(sizes, generator)
        super().__init__(sizes, made, False, 1.0, generator)
        self.patch, self.image = sizes.patch_size, (sizes.channels, sizes.image_size, sizes.image_size)
        self.patch_norm, self.embed = _norm(sizes, sizes.patch_features), made["embed"]
        self.embed_norm = _norm(sizes, sizes.width)
        # One axis: a vector, whose learning rate does not follow the width.
        self.cls = nn.Parameter(torch.empty(sizes.width))
        with torch.no_grad():
            self.cls.normal_(generator=generator)

    def embedded(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to the class token and patches (batch, tokens, width).

        Raises:
            ShapeError: Images have another size.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image:
            raise ShapeError(f"expected images (batch, {', '.join(map(str, self.image))}), got {tuple(x.shape)}")
        batch, channels, height, width = x.shape
        p = self.patch
        patches = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3)
        tokens = self.embed_norm(self.embed(self.patch_norm(patches.flatten(1, 2))))
        h: Tensor = torch.cat([self.cls.expand(batch, 1, -1), tokens], 1) + self.positions.weight
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, classes)."""
        out: Tensor = self.head(self.final(x)[:, 0])
        return out


class GPTModule(TransformerModule):
    """The network that `GPT` describes."""

    def __init__(self, sizes: GPT, generator: torch.Generator | None = None) -> None:
        super().__init__(sizes, linears(sizes, generator), True, 0.02, generator)
        self.tokens = _embedding(sizes.vocab, sizes.width, 0.02, generator)

    def embedded(self, x: Tensor) -> Tensor:
        """Token ids (batch, tokens) to (batch, tokens, width).

        Raises:
            ShapeError: There are more tokens than the context has.
        """
        if x.ndim != 2 or x.shape[1] > self.sizes.tokens:
            raise ShapeError(f"expected token ids (batch, tokens up to {self.sizes.tokens}), got {tuple(x.shape)}")
        h: Tensor = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (batch, tokens) to logits (batch, tokens, vocab) of the token after each."""
        out: Tensor = self.head(self.final(x))
        return out


def _norm(sizes: Model, features: int) -> nn.LayerNorm:
    return nn.LayerNorm(features, bias=sizes.norm_bias)


def _embedding(count: int, width: int, std: float, generator: torch.Generator | None) -> nn.Embedding:
    table = nn.Embedding(count, width, _weight=torch.empty(count, width))
    with torch.no_grad():
        table.weight.normal_(std=std, generator=generator)
    return table
