"""A Toeplitz network (Qin et al. 2023, arXiv 2305.04749): filters by a relative position encoder, under a decay."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .backbone import LanguageModel


class Rpe(nn.Module):
    """An MLP from the relative position to one coefficient a channel."""

    def __init__(self, outdim: int, rpe_embedding: int = 8):
        super().__init__()
        self.pos_proj = nn.Linear(1, rpe_embedding)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(rpe_embedding), nn.ReLU(), nn.Linear(rpe_embedding, rpe_embedding))
            for _ in range(2)
        )
        self.out = nn.Sequential(nn.LayerNorm(rpe_embedding), nn.ReLU(), nn.Linear(rpe_embedding, outdim))

    def forward(self, biases: Tensor) -> Tensor:
        x = self.pos_proj(biases)
        for m in self.layers:
            x = m(x) + x
        return self.out(x)


class Tno(nn.Module):
    """x [B, H, n, d] -> the same, causal."""

    def __init__(self, h: int, dim: int, gamma: float = 0.95):
        super().__init__()
        self.h, self.dim, self.gamma = h, dim, gamma
        self.rpe = Rpe(h * dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-2]
        pos_index = torch.arange(1, n).to(x).view(n - 1, 1)
        zero = rearrange(self.rpe(torch.zeros(1, 1).to(x)), "n (h d) -> h n d", h=self.h)
        pos = rearrange(self.rpe(pos_index), "n (h d) -> h n d", h=self.h)
        coef = torch.arange(1, n).to(x).view(1, n - 1, 1)
        pos = self.gamma**coef * pos
        zero_pad = torch.zeros_like(zero)
        a = torch.cat([zero, pos, zero_pad], dim=-2)
        y = torch.fft.rfft(x, 2 * n, dim=-2)
        v = torch.fft.rfft(a, 2 * n, dim=-2).unsqueeze(0)
        return torch.fft.irfft(v * y, 2 * n, dim=-2)[:, :, :n, :]


class Gtu(nn.Module):
    """A gated Toeplitz unit."""

    def __init__(self, embed_dim: int, num_heads: int = 2, expand_ratio: int = 2):
        super().__init__()
        self.num_heads = num_heads
        d1 = expand_ratio * embed_dim
        self.u_proj, self.v_proj = nn.Linear(embed_dim, d1), nn.Linear(embed_dim, d1)
        self.o = nn.Linear(d1, embed_dim)
        self.toep = Tno(num_heads, d1 // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.silu(self.u_proj(x)), F.silu(self.v_proj(x))
        v = rearrange(v, "b n (h d) -> b h n d", h=self.num_heads)
        output = rearrange(self.toep(v), "b h n d -> b n (h d)")
        return self.o(u * output)


def tnn(embed_dim: int = 12) -> nn.Module:
    return LanguageModel((Gtu(embed_dim) for _ in range(2)), embed_dim)
