"""Ways to write causal attention and its linear forms: functions of q, k, v `[B, H, L, 2]`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def lags(x: Tensor, length: int) -> Tensor:
    """`[L, L]`: row minus column; negative above the diagonal."""
    i = torch.arange(length, device=x.device)
    return i[:, None] - i[None, :]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tril_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def additive_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q.new_full((q.shape[-2], q.shape[-2]), -torch.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhic,bhjc->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(lags(q, q.shape[-2]) < 0, float("-inf"))
    return torch.einsum("bhij,bhjc->bhic", scores.softmax(-1), v)


def finite_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = lags(q, q.shape[-2]) >= 0
    return torch.where(seen, scores, torch.finfo(q.dtype).min).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slope = 2.0 ** -torch.arange(1, q.shape[1] + 1, device=q.device, dtype=q.dtype)
    lag = lags(q, q.shape[-2])
    bias = (-slope[:, None, None] * lag).masked_fill(lag < 0, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = torch.arange(q.shape[-2], device=q.device, dtype=q.dtype)
    rate = 10 ** -torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    angle = rate[:, None] * t
    cos, sin = angle.cos(), angle.sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window: int = 9) -> Tensor:
    lag = lags(q, q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0) & (lag < window))


def linear_quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    scores = scores.masked_fill(lags(q, q.shape[-2]) < 0, 0)
    return scores @ v / scores.sum(-1, keepdim=True)


def linear_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    norm = (q * k.cumsum(2)).sum(-1, keepdim=True)
    return (q.unsqueeze(-2) @ state).squeeze(-2) / norm


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gamma = 1 - 2.0 ** -torch.arange(3, 3 + q.shape[1], device=q.device, dtype=q.dtype)
    lag = lags(q, q.shape[-2])
    decay = torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp(min=0), 0.0)
    return (q @ k.mT * decay) @ v


def linear_chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int = 16) -> Tensor:
    """Padded to whole chunks: a masked product within each, a running sum of outer products across."""
    length = q.shape[-2]
    pad = (0, 0, 0, (-length) % chunk)
    q, k, v = (F.pad(x, pad).unflatten(-2, (-1, chunk)) for x in (q, k, v))
    within = (q @ k.mT).tril() @ v
    state = k.mT @ v
    across = q @ (state.cumsum(2) - state)
    return (within + across).flatten(2, 3)[..., :length, :] / 8


def delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeltaNet in closed form: each write first takes away what was stored under its key."""
    k = F.normalize(k, dim=-1)
    overlap = (k @ k.mT).tril(-1)
    writes = torch.linalg.solve_triangular(overlap, v, upper=False, unitriangular=True)
    return (q @ k.mT).tril() @ writes


class Attention(nn.Module):
    """Heads of two channels around one way to attend; `grouped`: all heads share keys and values."""

    def __init__(self, width: int, l_max: int, attend: Attend, grouped: bool = False):
        super().__init__()
        self.attend, self.heads = attend, width // 2
        self.kv_heads = 1 if grouped else self.heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 4 * self.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, 2).transpose(1, 2)
        kv = self.kv(x).view(batch, length, 2, self.kv_heads, 2).permute(2, 0, 3, 1, 4)
        k, v = kv.repeat_interleave(self.heads // self.kv_heads, dim=2).unbind(0)
        y = self.attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


ATTENTION: dict[str, Attend] = {
    "sdpa": sdpa,
    "tril_mask": tril_mask,
    "additive_mask": additive_mask,
    "by_hand": by_hand,
    "finite_minus_infinity": finite_minus_infinity,
    "alibi": alibi,
    "rotary": rotary,
    "sliding_window": sliding_window,
    "linear_quadratic": linear_quadratic,
    "linear_cumsum": linear_cumsum,
    "retention": retention,
    "linear_chunked": linear_chunked,
    "delta_rule": delta_rule,
}
