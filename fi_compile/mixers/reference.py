"""The semantic nodes a raised program is made of, as plain torch functions over whole sequences."""

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
) -> Tensor:
    """A causal convolution with a long filter, by FFT.

    ``x``: layout_in of [B, Cin, n]; ``kernel``: [Cout, ≥ n or the filter's whole support]; ``offset``: [Cout, ≥ n]
    or [Cout, 1]. Returns layout_out of [B, Cout, n] in the dtype of ``x``; the sum is made in the kernel's dtype.
    """
    flat = layout_in.flatten(x).to(kernel.dtype)
    batch, _, n = flat.shape
    lags = kernel[:, :n]
    size = _smooth(n + lags.shape[1] - 1)
    out = flat.new_empty(batch, kernel.shape[0], n)
    chunk = max(1, _CHUNK_BYTES // (8 * size * batch))
    for start in range(0, kernel.shape[0], chunk):
        stop = min(start + chunk, kernel.shape[0])
        rows = flat[:, start:stop] if source is None else flat[:, source[start:stop]]
        spectrum = torch.fft.rfft(rows, n=size) * torch.fft.rfft(lags[start:stop], n=size)
        out[:, start:stop] = torch.fft.irfft(spectrum, n=size)[..., :n]
    return layout_out.unflatten(_shifted(out, offset)).to(x.dtype)


def short_conv(
    x: Tensor,
    kernel: Tensor,
    offset: Tensor | None = None,
    source: Tensor | None = None,
    *,
    layout_in: Layout,
    layout_out: Layout,
) -> Tensor:
    """The same with a filter of few lags [Cout, M], by direct sums."""
    flat = layout_in.flatten(x).to(kernel.dtype)
    if source is not None:
        flat = flat[:, source]
    taps = kernel.shape[1]
    padded = torch.nn.functional.pad(flat, (taps - 1, 0))
    out = torch.nn.functional.conv1d(padded, kernel.flip(-1).unsqueeze(1), groups=kernel.shape[0])
    return layout_out.unflatten(_shifted(out, offset)).to(x.dtype)


def scan(
    x: Tensor,
    kernel: Tensor,
    offset: Tensor | None = None,
    source: Tensor | None = None,
    *,
    layout_in: Layout,
    layout_out: Layout,
) -> Tensor:
    """The same with a constant filter [Cout, ≥ 1]: a running sum."""
    flat = layout_in.flatten(x).to(kernel.dtype)
    if source is not None:
        flat = flat[:, source]
    out = flat.cumsum(-1) * kernel[:, :1]
    return layout_out.unflatten(_shifted(out, offset)).to(x.dtype)


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
