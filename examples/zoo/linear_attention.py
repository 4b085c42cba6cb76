"""Attention without the softmax: Hedgehog's learned feature map, Based's Taylor map, RetNet's retention."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .backbone import LanguageModel


class HedgehogFeatureMap(nn.Module):
    """softmax([x W, -x W]) (Zhang et al. 2024, arXiv 2402.04347)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return torch.cat([torch.softmax(x, dim=-1), torch.softmax(-x, dim=-1)], dim=-1)


class HedgehogAttention(nn.Module):
    """The quadratic form, as trained: similarities under a causal mask, rows divided by their sums."""

    def __init__(self, d_model: int, num_heads: int = 2):
        super().__init__()
        self.h = num_heads
        self.q, self.k = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.v, self.o = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.phi_q, self.phi_k = (HedgehogFeatureMap(d_model // num_heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.h) for f in (self.q, self.k, self.v))
        q, k = self.phi_q(q), self.phi_k(k)
        a = torch.einsum("bhmd,bhnd->bhmn", q, k)
        m, n = a.shape[-2:]
        causal_mask = torch.ones((m, n), device=x.device, dtype=torch.bool).triu(n - m + 1)
        a = a.masked_fill(causal_mask, 0)
        a = a / (a.sum(dim=-1, keepdim=True) + 1e-6)
        y = torch.einsum("bhmn,bhnd->bhmd", a, v)
        return self.o(rearrange(y, "b h l d -> b l (h d)"))


def hedgehog(d_model: int = 12) -> nn.Module:
    return LanguageModel((HedgehogAttention(d_model) for _ in range(2)), d_model)


class TaylorExp(nn.Module):
    """[1, x, x⊗x / √2]: exp to second order (Arora et al. 2024, arXiv 2402.18668)."""

    def __init__(self, input_dim: int):
        super().__init__()
        self.r2, self.rd, self.rrd = math.sqrt(2), math.sqrt(input_dim), math.sqrt(math.sqrt(input_dim))

    def forward(self, x: Tensor) -> Tensor:
        x2 = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(start_dim=-2) / self.r2
        return torch.cat([torch.ones_like(x[..., :1]), x / self.rrd, x2 / self.rd], dim=-1)


class BasedLinearAttention(nn.Module):
    """The state spelled out: running sums of keys and of outer products."""

    def __init__(self, d_model: int, feature_dim: int = 4, num_heads: int = 2):
        super().__init__()
        self.num_heads, self.eps = num_heads, 1e-6
        self.feature_map = TaylorExp(feature_dim)
        self.proj_q = nn.Linear(d_model, feature_dim * num_heads, bias=False)
        self.proj_k = nn.Linear(d_model, feature_dim * num_heads, bias=False)
        self.proj_v = nn.Linear(d_model, d_model, bias=False)
        self.proj_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        b, l, _ = hidden_states.size()  # noqa: E741
        q, k, v = self.proj_q(hidden_states), self.proj_k(hidden_states), self.proj_v(hidden_states)
        q, k, v = (x.view(b, l, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        q, k = self.feature_map(q), self.feature_map(k)
        q, k, v = q.unsqueeze(-2), k.unsqueeze(-2), v.unsqueeze(-1)
        y = (q * (k * v).cumsum(dim=2)).sum(dim=-1) / ((q * k.cumsum(dim=2)).sum(dim=-1) + self.eps)
        return self.proj_o(rearrange(y, "b h l d -> b l (h d)"))


class BaseConv(nn.Module):
    """A gated short convolution with a fixed number of taps."""

    def __init__(self, d_model: int, kernel_size: int = 3):
        super().__init__()
        self.projection = nn.Linear(d_model, d_model)
        self.conv = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, padding=kernel_size - 1)

    def forward(self, u: Tensor) -> Tensor:
        conv = self.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
        return self.projection(u) * conv


class BasedSlidingAttention(nn.Module):
    def __init__(self, d_model: int, window_size: int = 16, num_heads: int = 2):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.Wqkv, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        q, k, v = rearrange(
            self.Wqkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads
        ).unbind(0)
        row = torch.arange(L, device=x.device)[:, None]
        col = torch.arange(L, device=x.device)[None, :]
        mask = (col <= row) & (row - col < self.window_size)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(y, "b h l d -> b l (h d)"))


def based(d_model: int = 12) -> nn.Module:
    mixers = (BaseConv(d_model), BasedLinearAttention(d_model), BasedSlidingAttention(d_model))
    return LanguageModel(mixers, d_model)


class MultiScaleRetention(nn.Module):
    """Retention in its parallel form (Sun et al. 2023, arXiv 2307.08621): rotary, decay, normalised rows, gate."""

    def __init__(self, embed_dim: int, num_heads: int = 2):
        super().__init__()
        self.num_heads, self.key_dim = num_heads, embed_dim // num_heads
        self.scaling = self.key_dim**-0.5
        self.q_proj, self.k_proj = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.group_norm = nn.GroupNorm(num_heads, embed_dim, affine=False)
        angle = 1.0 / (100 ** torch.linspace(0, 1, self.key_dim // 2))
        self.register_buffer("angle", angle.unsqueeze(-1).repeat(1, 2).flatten())
        self.register_buffer("decay", torch.log(1 - 2 ** (-3 - torch.arange(num_heads, dtype=torch.float))))

    def relative(self, slen: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(slen).to(self.decay)
        sin, cos = torch.sin(index[:, None] * self.angle), torch.cos(index[:, None] * self.angle)
        mask = torch.tril(torch.ones(slen, slen).to(self.decay))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.exp(mask * self.decay[:, None, None])
        mask = torch.nan_to_num(mask)
        return sin, cos, mask / mask.sum(dim=-1, keepdim=True).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        bsz, tgt_len, embed_dim = x.size()
        sin, cos, inner_mask = self.relative(tgt_len)
        q, k, v, g = self.q_proj(x), self.k_proj(x) * self.scaling, self.v_proj(x), self.g_proj(x)
        q, k, v = (y.view(bsz, tgt_len, self.num_heads, self.key_dim).transpose(1, 2) for y in (q, k, v))

        def theta_shift(y: Tensor) -> Tensor:
            y1, y2 = y[..., ::2], y[..., 1::2]
            rotated = torch.stack((-y2, y1), dim=-1).flatten(-2)
            return y * cos + rotated * sin

        qk_mat = theta_shift(q) @ theta_shift(k).transpose(-1, -2) * inner_mask
        qk_mat = qk_mat / qk_mat.abs().sum(dim=-1, keepdim=True).clamp(min=1, max=5e4)
        output = torch.matmul(qk_mat, v).transpose(1, 2)
        output = self.group_norm(output.reshape(-1, embed_dim)).reshape(bsz, tgt_len, embed_dim)
        return self.out_proj(F.silu(g) * output)


def retnet(d_model: int = 12) -> nn.Module:
    return LanguageModel((MultiScaleRetention(d_model) for _ in range(2)), d_model)
