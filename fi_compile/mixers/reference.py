"""The semantic nodes a raised program is made of, as plain torch functions over whole sequences.

All take ``x``, layout_in of [B, Cin, n]; ``kernel`` [P, …], the filters of pairs of an output and an input channel,
``fan_in`` of them for each output channel in turn; ``source`` int64 [P], the input channel of each pair, None where it
is the pair's own number; ``offset`` [Cout, ≥ n] or [Cout, 1]. They return layout_out of [B, Cout, n] in the precision
of ``dtype``, of ``x`` where that is None; sums are made in the kernel's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout

_CHUNK_BYTES = 1 << 26


def long_conv(
    x: Tensor,
    kernel: Tensor,
    offset: Tensor | None = None,
    source: Tensor | None = None,
    *,
    layout_in: Layout,
    layout_out: Layout,
    fan_in: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A causal convolution with long filters [P, ≥ n or the filters' whole support], by FFT."""
    out = convolve(layout_in.flatten(x).to(kernel.dtype), kernel, source, fan_in)
    return layout_out.as_value(_shifted(out, offset), dtype or x.dtype)


def convolve(x: Tensor, kernel: Tensor, source: Tensor | None, fan_in: int) -> Tensor:
    """The sum over each output's pairs of x [B, Cin, n] * kernel [P, m]: the first n outputs [B, P / fan_in, n]."""
    batch, _, n = x.shape
    lags = kernel[:, :n]
    size = _smooth(n + lags.shape[1] - 1)
    out = x.new_empty(batch, kernel.shape[0] // fan_in, n)
    chunk = max(1, _CHUNK_BYTES // (8 * size * batch) // fan_in)
    for start in range(0, out.shape[1], chunk):
        stop = min(start + chunk, out.shape[1])
        pairs = slice(start * fan_in, stop * fan_in)
        rows = x[:, pairs] if source is None else x[:, source[pairs]]
        spectrum = torch.fft.rfft(rows, n=size) * torch.fft.rfft(lags[pairs], n=size)
        out[:, start:stop] = torch.fft.irfft(sum_pairs(spectrum, fan_in), n=size)[..., :n]
    return out


def convolve_at(positions: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None, fan_in: int) -> Tensor:
    """The same at some positions, int64 [m], by direct sums: [B, P / fan_in, m]."""
    columns = []
    for t in positions.tolist():
        lags = min(t + 1, kernel.shape[1])
        newest = x[..., t + 1 - lags : t + 1].flip(-1)
        newest = newest if source is None else newest[:, source]
        columns.append(sum_pairs((newest * kernel[:, :lags]).sum(-1), fan_in))
    return torch.stack(columns, -1)


def short_conv(
    x: Tensor,
    kernel: Tensor,
    offset: Tensor | None = None,
    source: Tensor | None = None,
    *,
    layout_in: Layout,
    layout_out: Layout,
    fan_in: int = 1,
    at: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same with filters of few lags [P, M], by direct sums; ``at`` says which, where they are not 0 … M-1."""
    flat = layout_in.flatten(x).to(kernel.dtype)
    if at is not None:
        out = _sparse(flat, kernel, source, fan_in, at)
        return layout_out.as_value(_shifted(out, offset), dtype or x.dtype)
    padded = torch.nn.functional.pad(flat, (kernel.shape[1] - 1, 0))
    weight = kernel.flip(-1)
    if is_dense(fan_in, flat.shape[1]):
        out = torch.nn.functional.conv1d(padded, dense(weight, source, fan_in, flat.shape[1]))
    else:
        rows = padded if source is None else padded[:, source]
        out = sum_pairs(torch.nn.functional.conv1d(rows, weight.unsqueeze(1), groups=len(weight)), fan_in)
    return layout_out.as_value(_shifted(out, offset), dtype or x.dtype)


def _sparse(x: Tensor, kernel: Tensor, source: Tensor | None, fan_in: int, at: tuple[int, ...]) -> Tensor:
    matrix = dense(kernel, source, fan_in, x.shape[1]) if is_dense(fan_in, x.shape[1]) else None
    total = x.new_zeros(())
    for tap, lag in enumerate(at):
        rows = torch.nn.functional.pad(x, (lag, 0))[..., : x.shape[-1]]
        if matrix is not None:
            total = total + matrix[..., tap] @ rows
        else:
            rows = rows if source is None else rows[:, source]
            total = total + sum_pairs(rows * kernel[:, tap, None], fan_in)
    return total


def scan(
    x: Tensor,
    kernel: Tensor,
    offset: Tensor | None = None,
    source: Tensor | None = None,
    *,
    layout_in: Layout,
    layout_out: Layout,
    fan_in: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same with constant filters [P, ≥ 1]: running sums."""
    flat = layout_in.flatten(x).to(kernel.dtype).cumsum(-1)
    if source is not None:
        flat = flat[:, source]
    return layout_out.as_value(_shifted(sum_pairs(flat * kernel[:, :1], fan_in), offset), dtype or x.dtype)


def sum_pairs(value: Tensor, fan_in: int) -> Tensor:
    """Pairs [B, P, …] summed for each output channel: [B, P / fan_in, …]."""
    return value if fan_in == 1 else value.unflatten(1, (-1, fan_in)).sum(2)


def is_dense(fan_in: int, channels_in: int) -> bool:
    """Whether a matrix of all channels is no more work than gathering the pairs."""
    return fan_in > 1 and 2 * fan_in >= channels_in


def dense(kernel: Tensor, source: Tensor | None, fan_in: int, channels_in: int) -> Tensor:
    """Filters of pairs [P, m] as a matrix of filters [Cout, Cin, m]."""
    count, taps = kernel.shape
    if source is None:
        source = torch.arange(count, device=kernel.device)
    out = kernel.new_zeros(count // fan_in, channels_in, taps)
    index = source.view(-1, fan_in, 1).expand(-1, -1, taps)
    return out.scatter_add_(1, index, kernel.view(-1, fan_in, taps))


def _shifted(value: Tensor, offset: Tensor | None) -> Tensor:
    return value if offset is None else value + offset[:, : value.shape[-1]]


def _smooth(size: int) -> int:
    """The smallest number ≥ size of the form 2^a, 3·2^a or 5·2^a: a fast transform length."""
    candidates = []
    for odd in (1, 3, 5):
        power = odd
        while power < size:
            power *= 2
        candidates.append(power)
    return min(candidates)


REFERENCES = {"long_conv": long_conv, "short_conv": short_conv, "scan": scan}
