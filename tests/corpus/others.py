"""Causal operators that are not long convolutions.

Factories `(width, l_max) -> mixer`, `[B, L, D] -> [B, L, D]`; `width` is even, heads have two channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import ATTENTION, Attention, lags, sdpa
from .weights import param

Factory = Callable[[int, int], nn.Module]


class Lambda(nn.Module):
    """A function of x `[B, L, D]`."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Scans and shifts.


class ExponentialAverage(nn.Module):
    """A moving average without a loop: a matrix of powers, `a^(i-j)` on and below the diagonal."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.logit = param(width)

    def forward(self, x: Tensor) -> Tensor:
        lag = lags(x, x.shape[1])
        log_a = F.logsigmoid(2 + self.logit)[:, None, None]
        weight = torch.exp(log_a * lag.clamp(min=0)).tril() * (1 - log_a.exp())
        return torch.einsum("cij,bjc->bic", weight, x)


class DataDecay(nn.Module):
    """A recurrence with input-dependent decay in closed form: `exp(G_i - G_j)`, G a cumulative sum."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.rate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        total = F.logsigmoid(1 + self.rate(x)).cumsum(1)
        gap = total[:, :, None] - total[:, None]
        seen = (lags(x, x.shape[1]) >= 0)[..., None]
        return (torch.exp(gap.masked_fill(~seen, float("-inf"))) * x[:, None]).sum(2)


def running_mean(x: Tensor) -> Tensor:
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return x.cumsum(1) / count[:, None]


def running_product(x: Tensor) -> Tensor:
    return (1 + 0.1 * torch.tanh(x)).cumprod(1)


def running_maximum_step(x: Tensor) -> Tensor:
    """By how much each position raises the maximum so far."""
    top = x.cummax(1).values
    return top - F.pad(top, (0, 0, 1, 0))[:, :-1]


def running_softmax(x: Tensor) -> Tensor:
    return torch.exp(x - x.logcumsumexp(1)) * x


def token_shift(x: Tensor) -> Tensor:
    """RWKV's shift: half of each position is replaced by the one before."""
    before = F.pad(x, (0, 0, 1, -1))
    return 0.5 * (x + before)


def difference(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)


# Local layers.


class GatedMLP(nn.Module):
    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class MergedMLP(nn.Module):
    """An MLP on the `[(B L), D]` view."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        flat = x.reshape(batch * length, width)
        return self.outer(F.gelu(self.inner(flat))).view(batch, length, width)


class SoftMoE(nn.Module):
    """Every expert on every position, weighted by a softmax over the experts."""

    def __init__(self, width: int, l_max: int, experts: int = 3):
        super().__init__()
        self.route, self.experts = nn.Linear(width, experts), param(experts, width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("bld,edf->blef", x, self.experts * x.shape[-1] ** 0.5)
        return (self.route(x).softmax(-1).unsqueeze(-1) * torch.tanh(out)).sum(2)


class TopOneMoE(SoftMoE):
    """Only the best expert of each position, picked by a gather."""

    def forward(self, x: Tensor) -> Tensor:
        weight, best = self.route(x).softmax(-1).max(-1)
        picked = self.experts[best] * x.shape[-1] ** 0.5
        return torch.tanh(torch.einsum("bld,bldf->blf", x, picked)) * weight.unsqueeze(-1)


class LearnedPositions(nn.Module):
    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.table = nn.Embedding(l_max, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class SinusoidalPositions(nn.Module):
    table: Tensor

    def __init__(self, width: int, l_max: int):
        super().__init__()
        rate = 100 ** -(torch.arange(width // 2) / (width // 2))
        angle = torch.arange(l_max)[:, None] * rate
        self.register_buffer("table", torch.cat([angle.sin(), angle.cos()], -1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[None, : x.shape[1]]


class RMSNorm(nn.Module):
    """By hand, with the float32 detour left out: it must hold in float64 too."""

    def __init__(self, width: int, l_max: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class PointwiseGate(nn.Module):
    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * self.value(x)


def function(f: Callable[[Tensor], Tensor]) -> Factory:
    return lambda width, l_max: Lambda(f)


OTHERS: dict[str, Factory] = {
    **{f"attention_{name}": partial(Attention, attend=f) for name, f in ATTENTION.items()},
    "attention_grouped": partial(Attention, attend=sdpa, grouped=True),
    "exponential_average": ExponentialAverage,
    "data_decay": DataDecay,
    "cumsum": function(lambda x: 0.2 * x.cumsum(1)),
    "running_mean": function(running_mean),
    "running_product": function(running_product),
    "running_maximum_step": function(running_maximum_step),
    "running_softmax": function(running_softmax),
    "token_shift": function(token_shift),
    "difference": function(difference),
    "gated_mlp": GatedMLP,
    "merged_mlp": MergedMLP,
    "soft_moe": SoftMoE,
    "top_one_moe": TopOneMoE,
    "learned_positions": LearnedPositions,
    "sinusoidal_positions": SinusoidalPositions,
    "layer_norm": lambda width, l_max: nn.LayerNorm(width),
    "rms_norm": RMSNorm,
    "torch_rms_norm": lambda width, l_max: nn.RMSNorm(width, eps=1e-6),
    "pointwise_gate": PointwiseGate,
}
