"""Mega: a damped moving average per channel, then gated single-head attention (Ma et al. 2022, arXiv 2209.10655)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadEMA(nn.Module):
    """x [L, B, D], time first as in fairseq; ndim decays a channel."""

    def __init__(self, embed_dim: int, ndim: int = 4):
        super().__init__()
        self.scale = math.sqrt(1.0 / ndim)
        self.delta = nn.Parameter(torch.randn(embed_dim, ndim, 1) - 1)
        self.alpha = nn.Parameter(torch.randn(embed_dim, ndim, 1) - 1)
        self.beta = nn.Parameter(torch.randn(embed_dim, ndim, 1))
        self.gamma = nn.Parameter(torch.randn(embed_dim, ndim))
        self.omega = nn.Parameter(torch.randn(embed_dim))

    def kernel(self, length: int) -> Tensor:
        p = torch.sigmoid(self.delta)
        alpha = torch.sigmoid(self.alpha)
        q = 1.0 - p * alpha
        vander = torch.arange(length).to(p).view(1, 1, length) * torch.log(q)
        kernel = (p * self.beta) * torch.exp(vander)
        return torch.einsum("dnl,dn->dl", kernel, self.gamma * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        seq_len, _bsz, _embed_dim = x.size()
        residual = x * self.omega
        x = x.permute(1, 2, 0)
        k = self.kernel(seq_len)
        s, kernel_size = 0, k.size(1)
        k_f = torch.fft.rfft(k.float() if k.dtype != torch.float64 else k, n=2 * seq_len)
        x_f = torch.fft.rfft(x.float() if x.dtype != torch.float64 else x, n=2 * seq_len)
        out = torch.fft.irfft(x_f * k_f, n=2 * seq_len)[..., s : s + kernel_size].type_as(x)
        return F.silu(out.permute(2, 0, 1) + residual)


class MovingAverageGatedAttention(nn.Module):
    def __init__(self, embed_dim: int, zdim: int = 6, hdim: int = 16, laplace: bool = False):
        super().__init__()
        self.embed_dim, self.zdim, self.hdim, self.laplace = embed_dim, zdim, hdim, laplace
        self.move = MultiHeadEMA(embed_dim)
        self.v_proj = nn.Linear(embed_dim, hdim)
        self.mx_proj = nn.Linear(embed_dim, zdim + hdim + 2 * embed_dim)
        self.h_proj = nn.Linear(hdim, embed_dim)
        self.gamma = nn.Parameter(torch.randn(2, zdim))
        self.beta = nn.Parameter(torch.randn(2, zdim))

    def attend(self, q: Tensor, k: Tensor, attn_mask: Tensor) -> Tensor:
        qk = torch.bmm(q, k.transpose(1, 2)) * self.zdim**-0.5
        if self.laplace:
            mu, sigma = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
            weights = 0.5 * (1.0 + torch.erf((qk - mu) / (sigma * math.sqrt(2.0)))) / 8
            return weights.masked_fill((1 - attn_mask).to(torch.bool), 0.0)
        qk = qk.masked_fill((1 - attn_mask).to(torch.bool), float("-inf"))
        return F.softmax(qk, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        seq_len = x.size(0)
        residual = x
        v = F.silu(self.v_proj(x))
        mx = self.move(x)
        base = self.mx_proj(mx)
        u, zr, hx = torch.split(base, [self.embed_dim, self.zdim + self.hdim, self.embed_dim], dim=-1)
        u = torch.sigmoid(u)
        z, r = torch.split(F.silu(zr), [self.zdim, self.hdim], dim=-1)
        z = z.unsqueeze(2) * self.gamma + self.beta
        q, k = torch.unbind(z, dim=2)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        attn_mask = torch.tril(torch.ones(seq_len, seq_len, device=x.device))
        h = torch.bmm(self.attend(q, k, attn_mask), v).transpose(0, 1)
        h = F.silu(hx + self.h_proj(h * r))
        return torch.addcmul(residual, u, h - residual)


class Mega(nn.Module):
    """ids [B, L] -> logits [B, L, vocab]."""

    def __init__(self, embed_dim: int = 12, layers: int = 2, vocab: int = 23, laplace: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, embed_dim)
        self.mega_layers = nn.ModuleList(
            MovingAverageGatedAttention(embed_dim, laplace=laplace) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(layers))
        self.output_projection = nn.Linear(embed_dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens).transpose(0, 1)
        for layer, norm in zip(self.mega_layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.output_projection(x.transpose(0, 1))
