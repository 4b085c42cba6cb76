"""RWKV in the form of its first versions: token shift, and WKV as a convolution of keys and of keys times values.

After Peng et al. 2023 (arXiv 2305.13048), where the recurrence divides the same two sums.
"""

import torch
from torch import Tensor, nn


class TimeMix(nn.Module):
    def __init__(self, n_embd: int, ctx_len: int):
        super().__init__()
        self.n_embd, self.ctx_len = n_embd, ctx_len
        self.time_decay = nn.Parameter(torch.linspace(-4, 0.5, n_embd).unsqueeze(1))
        self.register_buffer(
            "time_curve", torch.tensor([-(ctx_len - 2 - i) for i in range(ctx_len - 1)]).unsqueeze(0)
        )
        self.time_first = nn.Parameter(torch.randn(n_embd, 1) / 2)
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_mix = nn.Parameter(torch.rand(1, 1, n_embd))
        self.key, self.value = nn.Linear(n_embd, n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        T, C = x.size(1), x.size(2)
        x = x * self.time_mix + self.time_shift(x) * (1 - self.time_mix)
        k = self.key(x).transpose(-1, -2)
        v = self.value(x).transpose(-1, -2)
        r = self.receptance(x)
        k = torch.exp(torch.clamp(k, max=60))
        kv = k * v
        self.time_w = torch.cat([torch.exp(self.time_decay) * self.time_curve, self.time_first], dim=-1)
        w = torch.exp(self.time_w)[:, -T:].unsqueeze(1)
        wkv = nn.functional.conv1d(nn.ZeroPad2d((T - 1, 0, 0, 0))(kv), w, groups=C)
        wk = nn.functional.conv1d(nn.ZeroPad2d((T - 1, 0, 0, 0))(k), w, groups=C) + 1e-8
        rwkv = torch.sigmoid(r) * (wkv / wk).transpose(-1, -2)
        return self.output(rwkv)


class ChannelMix(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_mix = nn.Parameter(torch.rand(1, 1, n_embd))
        self.key = nn.Linear(n_embd, 2 * n_embd, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(2 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.time_mix + self.time_shift(x) * (1 - self.time_mix)
        k = torch.square(torch.relu(self.key(x)))
        return torch.sigmoid(self.receptance(x)) * self.value(k)


class RWKV(nn.Module):
    """ids [B, T] -> logits [B, T, vocab], T <= ctx_len."""

    def __init__(self, n_embd: int = 12, n_layer: int = 2, vocab_size: int = 23, ctx_len: int = 256):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.ln1 = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(n_layer))
        self.ln2 = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(n_layer))
        self.att = nn.ModuleList(TimeMix(n_embd, ctx_len) for _ in range(n_layer))
        self.ffn = nn.ModuleList(ChannelMix(n_embd) for _ in range(n_layer))
        self.ln_out, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.emb(idx)
        for i in range(len(self.att)):
            x = x + self.att[i](self.ln1[i](x))
            x = x + self.ffn[i](self.ln2[i](x))
        return self.head(self.ln_out(x))
