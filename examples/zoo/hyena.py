"""The Hyena operator of any order (Poli et al. 2023, arXiv 2302.10866): order - 1 gated long convolutions."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .backbone import LanguageModel


def fftconv(u: Tensor, k: Tensor, D: Tensor) -> Tensor:
    """u [B, D, L] with k [D, L], plus a skip."""
    seqlen = u.shape[-1]
    fft_size = 2 * seqlen
    k_f = torch.fft.rfft(k, n=fft_size) / fft_size
    u_f = torch.fft.rfft(u.to(dtype=k.dtype), n=fft_size)
    y = torch.fft.irfft(u_f * k_f, n=fft_size, norm="forward")[..., :seqlen]
    return (y + u * D.unsqueeze(-1)).to(dtype=u.dtype)


class PositionalEmbedding(nn.Module):
    """Complex exponentials of the position, and the position itself over [0, 1]."""

    def __init__(self, emb_dim: int, seq_len: int):
        super().__init__()
        t = torch.linspace(0, 1, seq_len)[None, :, None]
        bands = (emb_dim - 1) // 2
        t_rescaled = torch.linspace(0, seq_len - 1, seq_len)[None, :, None]
        w = 2 * math.pi * t_rescaled / seq_len
        f = torch.linspace(1e-4, bands - 1, bands)[None, None]
        z = torch.exp(-1j * f * w)
        self.z = nn.Parameter(torch.cat([t, z.real, z.imag], dim=-1))
        self.register_buffer("t", t)

    def forward(self, L: int) -> tuple[Tensor, Tensor]:
        return self.z[:, :L], self.t[:, :L]


class Sin(nn.Module):
    def __init__(self, dim: int, w: float = 10.0):
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class ExponentialModulation(nn.Module):
    def __init__(self, d_model: int, fast: float = 0.3, slow: float = 1.5, target: float = 1e-2):
        super().__init__()
        deltas = torch.linspace(math.log(target) / slow, math.log(target) / fast, d_model)[None, None]
        self.register_buffer("deltas", deltas)

    def forward(self, t: Tensor, x: Tensor, shift: float = 0.05) -> Tensor:
        return x * (torch.exp(-t * self.deltas.abs()) + shift)


class HyenaFilter(nn.Module):
    def __init__(self, d_model: int, emb_dim: int = 5, order: int = 16, seq_len: int = 256):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(d_model))
        self.pos_emb = PositionalEmbedding(emb_dim, seq_len)
        act = Sin(order)
        self.implicit_filter = nn.Sequential(
            nn.Linear(emb_dim, order),
            act,
            nn.Linear(order, order),
            act,
            nn.Linear(order, d_model, bias=False),
        )
        self.modulation = ExponentialModulation(d_model)

    def filter(self, L: int) -> Tensor:
        z, t = self.pos_emb(L)
        h = self.implicit_filter(z)
        return self.modulation(t, h) / 8

    def forward(self, x: Tensor, L: int, k: Tensor, bias: Tensor) -> Tensor:
        return fftconv(x, k, bias)


class HyenaOperator(nn.Module):
    def __init__(self, d_model: int, l_max: int, order: int = 2, filter_order: int = 16):
        super().__init__()
        self.d_model, self.l_max, self.order = d_model, l_max, order
        inner_width = d_model * (order + 1)
        self.dropout = nn.Dropout(0.1)
        self.in_proj = nn.Linear(d_model, inner_width)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(inner_width, inner_width, 3, padding=2, groups=inner_width)
        self.filter_fn = HyenaFilter(d_model * (order - 1), order=filter_order, seq_len=l_max)

    def forward(self, u: Tensor) -> Tensor:
        l = u.size(-2)  # noqa: E741
        l_filter = min(l, self.l_max)
        u = self.in_proj(u)
        u = rearrange(u, "b l d -> b d l")
        uc = self.short_filter(u)[..., :l_filter]
        *x, v = uc.split(self.d_model, dim=1)

        k = self.filter_fn.filter(l_filter)[0]
        k = rearrange(k, "l (o d) -> o d l", o=self.order - 1)
        bias = rearrange(self.filter_fn.bias, "(o d) -> o d", o=self.order - 1)
        for o, x_i in enumerate(reversed(x[1:])):
            v = self.dropout(v * x_i)
            v = self.filter_fn(v, l_filter, k=k[o], bias=bias[o])
        y = rearrange(v * x[0], "b d l -> b l d")
        return self.out_proj(y)


def hyena(order: int, d_model: int = 12, layers: int = 2, l_max: int = 256) -> nn.Module:
    return LanguageModel((HyenaOperator(d_model, l_max, order) for _ in range(layers)), d_model)


class MultiHeadHyena(nn.Module):
    """Hyena with heads (Massaroli et al. 2023, arXiv 2310.18780): outer products through one filter a head."""

    def __init__(self, d_model: int, n_heads: int, l_max: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.short_conv = nn.Conv1d(3 * d_model, 3 * d_model, 3, padding=2, groups=3 * d_model)
        self.filter_fn = HyenaFilter(n_heads, seq_len=l_max)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, u: Tensor) -> Tensor:
        L = u.shape[1]
        qkv = self.short_conv(rearrange(self.qkv(u), "b l d -> b d l"))[..., :L]
        q, k, v = rearrange(qkv, "b (three h d) l -> three b d h l", three=3, h=self.n_heads)
        kv = k.unsqueeze(2) * v.unsqueeze(1)  # b d1 d2 h l
        h = rearrange(self.filter_fn.filter(L), "1 l h -> h l")
        h_f = torch.fft.rfft(h, n=2 * L)
        kv_f = torch.fft.rfft(kv, n=2 * L)
        y = torch.fft.irfft(kv_f * h_f, n=2 * L)[..., :L]
        y = y + kv * self.filter_fn.bias[:, None]
        out = torch.einsum("bdhl,bdvhl->bvhl", q, y)
        return self.out_proj(rearrange(out, "b d h l -> b l (h d)"))


def multi_head_hyena(d_model: int = 12, n_heads: int = 4, l_max: int = 256) -> nn.Module:
    return LanguageModel((MultiHeadHyena(d_model, n_heads, l_max) for _ in range(2)), d_model)


class HyenaDNA(nn.Module):
    """The layout of HyenaDNA (Nguyen et al. 2023, arXiv 2306.15794).

    The residual stream runs beside the blocks and is normalised where it is read; the vocabulary is padded to
    a multiple of eight; the head is tied.
    """

    def __init__(self, d_model: int = 12, n_layer: int = 3, vocab_size: int = 12, max_seq_len: int = 256):
        super().__init__()
        vocab_size += (-vocab_size) % 8
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.mixers = nn.ModuleList(HyenaOperator(d_model, max_seq_len) for _ in range(n_layer))
        self.norms1 = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layer))
        self.norms2 = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layer))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(d_model, 4 * d_model), nn.GELU(approximate="tanh"), nn.Linear(4 * d_model, d_model)
            )
            for _ in range(n_layer)
        )
        self.drop_f, self.ln_f = nn.Dropout(0.1), nn.LayerNorm(d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states, residual = self.word_embeddings(input_ids), None
        for mixer, norm1, norm2, mlp in zip(self.mixers, self.norms1, self.norms2, self.mlps, strict=True):
            dropped = self.drop_f(hidden_states)
            residual = dropped + residual if residual is not None else dropped
            hidden_states = mixer(norm1(residual.to(dtype=norm1.weight.dtype)))
            residual = self.drop_f(hidden_states) + residual
            hidden_states = mlp(norm2(residual.to(dtype=norm2.weight.dtype)))
        hidden_states = self.ln_f(self.drop_f(hidden_states) + residual)
        return F.linear(hidden_states, self.word_embeddings.weight)
