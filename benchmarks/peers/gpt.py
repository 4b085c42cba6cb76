"""A transformer of the same width and depth with a KV cache, as fast a step as can be compiled.

Pre-norm blocks of attention (heads of 64) and an MLP of four times the width, learned positions, tied head. A step
reads exactly the rows of the cache that exist, and its products with weights are sums over rows like flashinf's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compiled import compiled

HEAD = 64


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence, [B, L, D]."""
        q, k, v = (self._split(part) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GPT(nn.Module):
    """ids [B, L] -> logits [B, L, V]."""

    def __init__(self, vocab: int, width: int, layers: int, longest: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.place.weight, std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """The whole sequence."""
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class GPTDecoder:
    """Its cached decoding, one sequence: what lies between two attentions is compiled once and called once a layer."""

    def __init__(self, model: GPT, *, compile_step: bool = True) -> None:
        self.model, (longest, self.width) = model, model.place.weight.shape
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.heads = blocks[0].heads
        shape = (len(blocks), self.heads, longest, self.width // self.heads)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.position = 0
        enter = [(*_affine(b.norm1), *_affine(b.qkv)) for b in blocks]
        leave = [(*_affine(b.out), *_affine(b.norm2), *_affine(b.up), *_affine(b.down)) for b in blocks]
        self.first = enter[0]
        self.middle = [(*after, *before) for after, before in zip(leave[:-1], enter[1:], strict=True)]
        self.last = (*leave[-1], *_affine(model.norm), model.embed.weight)
        x, mixed = torch.zeros(2, self.width).unbind(0)
        examples = (x, *self.first), (x, mixed, *leave[0], *enter[0]), (x, mixed, *self.last)
        parts = self._enter, self._between, self._leave
        self.parts = (
            tuple(compiled(p, *e) for p, e in zip(parts, examples, strict=True)) if compile_step else parts
        )

    def _enter(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """To the queries, keys and values of a layer: x [D] -> [3 D]."""
        q, rest = _product(_norm(x, scale, shift), weight, bias).split([self.width, 2 * self.width])
        return torch.cat([q * (self.width // self.heads) ** -0.5, rest])

    def _after(self, x: Tensor, mixed: Tensor, *weights: Tensor) -> Tensor:
        out, out_bias, scale, shift, up, up_bias, down, down_bias = weights
        x = x + _product(mixed, out, out_bias)
        hidden = F.gelu(_product(_norm(x, scale, shift), up, up_bias), approximate="tanh")
        return x + _product(hidden, down, down_bias)

    def _between(self, x: Tensor, mixed: Tensor, *weights: Tensor) -> Tensor:
        """From one attention to the next: [4 D], x and then queries, keys and values."""
        x = self._after(x, mixed, *weights[:8])
        return torch.cat([x, self._enter(x, *weights[8:])])

    def _leave(self, x: Tensor, mixed: Tensor, *weights: Tensor) -> Tensor:
        """From the last attention to the logits."""
        x = self._after(x, mixed, *weights[:8])
        return _product(_norm(x, *weights[8:10]), weights[10])

    def _attend(self, layer: int, t: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(3, self.heads, -1).unbind(0)
        self.keys[layer, :, t], self.values[layer, :, t] = k, v
        keys, values = self.keys[layer, :, : t + 1], self.values[layer, :, : t + 1]
        # A row times a matrix reads at the speed of memory; compiled to sums it did not, nor did the fused operator.
        weights = torch.bmm(q.unsqueeze(1), keys.mT).softmax(-1)
        return torch.bmm(weights, values).flatten()

    def step(self, token: Tensor) -> Tensor:
        """The next id, [1]: logits [V]."""
        t, self.position = self.position, self.position + 1
        enter, between, leave = self.parts
        x = self.model.embed.weight[token[0]] + self.model.place.weight[t]
        qkv = enter(x, *self.first)
        for layer, weights in enumerate(self.middle):
            found = between(x, self._attend(layer, t, qkv), *weights)
            x, qkv = found[: self.width], found[self.width :]
        return leave(x, self._attend(len(self.middle), t, qkv), *self.last)


def _affine(layer: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = (weight * x).sum(-1)
    return out if bias is None else out + bias


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape, scale, shift)
