"""Functions of x `[B, L, D]` and of q, k, v `[B, H, L, 2]` that no incremental decoder equals, and why."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attend, lags
from .trap_convolutions import DEPENDS, SEES


def attend_by(mask: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    """Attention with a mask from (row, column)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        scores = (q @ k.mT).masked_fill(mask(i[:, None], i[None, :]), float("-inf"))
        return scores.softmax(-1) @ v

    return attend


def linear_without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v) / q.shape[-1]


def small_minus(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-8 is not minus infinity."""
    scores = q @ k.mT - 8.0 * (lags(q, q.shape[-2]) < 0)
    return scores.softmax(-1) @ v


def late_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask comes after the softmax, whose sum has seen every key."""
    return (q @ k.mT).softmax(-1).tril() @ v


DATA_TRAPS: dict[str, tuple[Callable, str]] = {
    "flip": (lambda x: x.flip(1), f"{SEES}: flip"),
    "roll": (lambda x: x.roll(1, 1), f"{SEES}: the last position comes first"),
    "shift_left": (lambda x: F.pad(x, (0, 0, -1, 1)), f"{SEES}: the next position"),
    "peek": (
        lambda x: x + 1e-3 * F.pad(x, (0, 0, -1, 1)),
        f"{SEES}: a thousandth of the next position",
    ),
    "peek_far": (
        lambda x: x + F.pad(x, (0, 0, 0, 60))[:, 60:],
        f"{SEES}: sixty positions ahead",
    ),
    "mean_over_time": (lambda x: x - x.mean(1, keepdim=True), f"{SEES}: mean over time"),
    "batch_norm": (
        lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
        f"{SEES}: statistics over batch and time",
    ),
    "instance_norm": (
        lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-3).sqrt(),
        f"{SEES}: statistics over time",
    ),
    "group_norm": (
        lambda x: F.group_norm(x.mT, 2).mT,
        f"{SEES}: channel-first GroupNorm averages over time",
    ),
    "softmax_over_time": (lambda x: x.softmax(1) * x, f"{SEES}: softmax over time"),
    "max_over_time": (lambda x: x - x.amax(1, keepdim=True), f"{SEES}: global max"),
    "cumsum_reversed": (lambda x: 0.1 * x.flip(1).cumsum(1).flip(1), f"{SEES}: from the end"),
    "rest_of_sum": (
        lambda x: x.sum(1, keepdim=True) - x.cumsum(1),
        f"{SEES}: the sum of what follows",
    ),
    "sort_over_time": (lambda x: x.sort(1).values, f"{SEES}: sort over time"),
    "top_positions": (
        lambda x: x * (x >= x.topk(torch.sym_min(3, x.shape[1]), 1).values[:, -1:]),
        f"{SEES}: the top three positions",
    ),
    "last_position": (lambda x: x + x[:, -1:], f"{SEES}: the last position everywhere"),
    "argmax_over_time": (
        lambda x: x + x.argmax(1, keepdim=True).to(x.dtype),
        f"{SEES}: argmax over time",
    ),
    "spectral_mix": (
        lambda x: torch.fft.fft(x, dim=1).real / 8,
        f"{SEES}: FNet's transform over time",
    ),
    "times_L": (lambda x: x * x.shape[1], f"{DEPENDS}: x * L"),
    "over_L": (lambda x: x / x.shape[1], f"{DEPENDS}: x / L"),
    "over_root_L": (lambda x: x.cumsum(1) / x.shape[1] ** 0.5, f"{DEPENDS}: / sqrt(L)"),
    "plus_full": (
        lambda x: x + torch.full((), x.shape[1], dtype=x.dtype),
        f"{DEPENDS}: full((), L)",
    ),
    "plus_full_vector": (
        lambda x: x + torch.full((x.shape[1], 1), x.shape[1], dtype=x.dtype),
        f"{DEPENDS}: full((L, 1), L)",
    ),
    "numel": (lambda x: x * (x.numel() / 1000), f"{DEPENDS}: numel"),
    "sum_of_ones": (
        lambda x: x * torch.ones_like(x[0, :, 0]).sum(),
        f"{DEPENDS}: ones(L).sum() is L",
    ),
    "last_index": (
        lambda x: x + torch.arange(x.shape[1], dtype=x.dtype)[-1:],
        f"{DEPENDS}: arange(L)[-1]",
    ),
    "arange_over_L": (
        lambda x: x + (torch.arange(x.shape[1], dtype=x.dtype) / x.shape[1])[:, None],
        f"{DEPENDS}: arange(L) / L",
    ),
    "linspace": (
        lambda x: x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None],
        f"{DEPENDS}: linspace(0, 1, L)",
    ),
    "from_the_end": (
        lambda x: x + 0.1 * torch.arange(x.shape[1] - 1, -1, -1, dtype=x.dtype)[:, None],
        f"{DEPENDS}: positions counted from the end",
    ),
    "parity_of_L": (lambda x: x + x.shape[1] % 2, f"{DEPENDS}: L % 2"),
    "threshold_40": (
        lambda x: x * (1 + torch.sym_max(0, x.shape[1] - 40)),
        f"{DEPENDS}: only beyond 40",
    ),
    "threshold_40_small": (
        lambda x: x * (1 + 1e-3 * torch.sym_max(0, x.shape[1] - 40)),
        f"{DEPENDS}: a little, only beyond 40",
    ),
    "length_leak_tiny": (lambda x: x * (1 + 1e-7 * x.shape[1]), f"{DEPENDS}: by 1e-7"),
    "dropped_beyond_40": (
        lambda x: x * (torch.arange(x.shape[1]) >= x.shape[1] - 40)[:, None],
        f"{DEPENDS}: only the newest 40 positions survive",
    ),
}
ATTENTION_TRAPS: dict[str, tuple[Attend, str]] = {
    "unmasked": (F.scaled_dot_product_attention, f"{SEES}: no mask"),
    "off_by_one": (attend_by(lambda i, j: j > i + 1), f"{SEES}: sees j <= i + 1"),
    "reversed": (attend_by(lambda i, j: j < i), f"{SEES}: the mask is transposed"),
    "mask_until_40": (attend_by(lambda i, j: (j > i) & (i < 40)), f"{SEES}: unmasked from row 40"),
    "mask_columns_until_70": (
        attend_by(lambda i, j: (j > i) & (j < 70)),
        f"{SEES}: unmasked from column 70",
    ),
    "window_both_sides": (attend_by(lambda i, j: (i - j).abs() > 4), f"{SEES}: |i - j| <= 4"),
    "block_diagonal": (attend_by(lambda i, j: i // 8 != j // 8), f"{SEES}: whole blocks of 8"),
    "linear_without_mask": (linear_without_mask, f"{SEES}: a sum over all keys"),
    "small_minus": (small_minus, f"{SEES}: -8 is not minus infinity"),
    "late_softmax": (late_softmax, f"{SEES}: masked after the softmax"),
    "scaled_by_L": (
        lambda q, k, v: F.scaled_dot_product_attention(q * (q.shape[-2] ** 0.5 / 4), k, v, is_causal=True),
        f"{DEPENDS}: temperature from the length",
    ),
}
