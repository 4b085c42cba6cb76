"""StripedHyena: modal long convolutions between gates, some blocks attention; and the three filters of StripedHyena 2.

After Poli et al. 2023 (StripedHyena) and Ku et al. 2025 (arXiv 2503.01868).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.hidden_size = eps, hidden_size
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        y = x / (x.norm(2, dim=-1, keepdim=True) * self.hidden_size ** (-0.5) + self.eps)
        return self.scale * y


class ParallelGatedMLP(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.l1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.l2 = nn.Linear(hidden_size, inner_size, bias=False)
        self.l3 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.l3(F.silu(self.l1(z)) * self.l2(z))


class ModalFilter(nn.Module):
    """A sum of damped oscillations: residues and poles, both learned as complex numbers."""

    def __init__(self, groups: int, state_size: int):
        super().__init__()
        radius = torch.linspace(0.8, 0.98, state_size).expand(groups, -1)
        angle = torch.rand(groups, state_size) * math.pi
        poles = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        self.poles = nn.Parameter(poles[:, :, None])
        self.residues = nn.Parameter(torch.randn(groups, state_size, 1, 2) / state_size)

    def forward(self, L: int) -> Tensor:
        t = torch.arange(L, device=self.poles.device)[None, None]
        residues = torch.view_as_complex(self.residues)
        log_poles = torch.view_as_complex(self.poles).log()
        return (residues * (log_poles * t).exp()).real.sum(1)


class ExplicitFilter(nn.Module):
    """Taps as they are; the longer ones under a fixed exponential decay."""

    def __init__(self, groups: int, taps: int, decay: bool):
        super().__init__()
        self.h = nn.Parameter(torch.randn(groups, taps) / math.sqrt(min(taps, 8)))
        rates = torch.logspace(-1.7, -0.5, groups)[:, None] if decay else torch.zeros(groups, 1)
        self.register_buffer("decay", torch.exp(-rates * torch.arange(taps)), persistent=False)

    def forward(self, L: int) -> Tensor:
        return self.h * self.decay


class HyenaCascade(nn.Module):
    """Gate, convolution, gate; `style`: modal, explicit medium (128 taps) or explicit short (7 taps)."""

    def __init__(
        self, hidden_size: int, style: str, num_heads: int = 2, groups: int = 4, state_size: int = 4
    ):
        super().__init__()
        self.style, self.num_heads, self.head_size = style, num_heads, hidden_size // num_heads
        self.repeats = hidden_size // groups
        self.projections = nn.Linear(hidden_size, 3 * hidden_size)
        self.short_filter_weight = nn.Parameter(torch.randn(3 * hidden_size, 1, 3) / 2)
        self.D = nn.Parameter(torch.randn(hidden_size))
        if style == "modal":
            self.filter = ModalFilter(groups, state_size)
        else:
            taps = {"short": 7, "medium": 128}[style]
            self.filter = ExplicitFilter(groups, taps, decay=style == "medium")
        self.out_filter_dense = nn.Linear(hidden_size, hidden_size)

    def column_split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections lie head by head: [B, 3 D, L] -> three of [B, D, L]."""
        z = z.reshape(z.shape[0], self.num_heads, 3 * self.head_size, z.shape[2])
        x2 = z[:, :, : self.head_size]
        x1 = z[:, :, self.head_size : 2 * self.head_size]
        v = z[:, :, 2 * self.head_size :]
        return tuple(p.reshape(p.shape[0], -1, p.shape[-1]) for p in (x2, x1, v))  # type: ignore[return-value]

    def convolve(self, u: Tensor, h: Tensor) -> Tensor:
        L = u.shape[-1]
        if self.style == "modal":
            fft_size = 2 * L
            H = torch.fft.rfft(h, n=fft_size) / fft_size
            X = torch.fft.fft(u, n=fft_size)[..., : H.shape[-1]]
            return torch.fft.irfft(X * H, n=fft_size, norm="forward")[..., :L]
        if self.style == "medium":
            fft_size = L + h.shape[-1]
            H = torch.fft.rfft(h, n=fft_size)
            return torch.fft.irfft(torch.fft.rfft(u, n=fft_size) * H, n=fft_size)[..., :L]
        padded = F.pad(u, (h.shape[-1] - 1, 0))
        return F.conv1d(padded, h.flip(-1)[:, None], groups=u.shape[1])

    def forward(self, u: Tensor) -> Tensor:
        L = u.shape[1]
        z = self.projections(u).permute(0, 2, 1)
        z = F.conv1d(z, self.short_filter_weight, padding=2, groups=z.shape[1])[..., :L]
        x2, x1, v = self.column_split(z)
        x1v = x1 * v
        h = self.filter(L).repeat_interleave(self.repeats, 0)
        y = self.convolve(x1v, h).to(x1v.dtype)
        y = (y + x1v * self.D.unsqueeze(-1)) * x2
        return self.out_filter_dense(y.permute(0, 2, 1))


class RotaryAttention(nn.Module):
    """Grouped-query attention with rotary positions, half-split; the softmax written out."""

    def __init__(self, hidden_size: int, num_heads: int, num_heads_kv: int):
        super().__init__()
        self.num_heads, self.num_heads_kv, self.head_dim = num_heads, num_heads_kv, hidden_size // num_heads
        self.Wqkv = nn.Linear(hidden_size, (num_heads + 2 * num_heads_kv) * self.head_dim)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        inv_freq = 1.0 / 100 ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], device=x.device, dtype=self.inv_freq.dtype)
        freqs = torch.outer(t, self.inv_freq)
        cos, sin = freqs.cos()[:, None], freqs.sin()[:, None]
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_heads_kv, self.num_heads_kv)]
        q, k, v = (p.view(B, L, -1, self.head_dim) for p in self.Wqkv(x).split(sizes, dim=-1))
        q, k = self.rotate(q), self.rotate(k)
        k = k.repeat_interleave(self.num_heads // self.num_heads_kv, dim=2)
        v = v.repeat_interleave(self.num_heads // self.num_heads_kv, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k / math.sqrt(self.head_dim))
        causal_mask = torch.triu(torch.full((L, L), float("-inf"), device=x.device), 1)
        attention = torch.softmax(scores + causal_mask.to(scores.dtype), dim=-1, dtype=v.dtype)
        return self.out_proj(torch.einsum("bhts,bshd->bthd", attention, v).reshape(B, L, -1))


class StripedBlock(nn.Module):
    def __init__(self, mixer: nn.Module, hidden_size: int):
        super().__init__()
        self.pre_norm, self.post_norm = RMSNorm(hidden_size), RMSNorm(hidden_size)
        self.mixer, self.mlp = mixer, ParallelGatedMLP(hidden_size, 24)

    def forward(self, u: Tensor) -> Tensor:
        u = self.mixer(self.pre_norm(u)) + u
        return self.mlp(self.post_norm(u)) + u


class StripedHyena(nn.Module):
    """ids [B, L] -> logits [B, L, vocab]; `layers` names each block's mixer."""

    def __init__(self, layers: Sequence[str], hidden_size: int = 16, vocab_size: int = 23):
        super().__init__()
        self.embedding_layer = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(
            StripedBlock(
                RotaryAttention(hidden_size, 4, 2)
                if style == "attention"
                else HyenaCascade(hidden_size, style),
                hidden_size,
            )
            for style in layers
        )
        self.norm = RMSNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding_layer(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding_layer.weight.T
