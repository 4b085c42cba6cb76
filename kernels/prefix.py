"""What the first P inputs contribute to every output from P on: prefill, rewind, growth.

`out[j] = sum over i < P of y[i] · rho[j - i]`, P <= j < capacity. Source: Flash Inference (arXiv
2410.12982), section on prefill; docs/algorithms.md.

In all forms: history [B, Cin, P], filters [F, capacity], of one dtype, float32 or float64; source,
filter_index, target: int64 [pairs] or None (see `channels`).
"""

from math import log2

import torch
from torch import Tensor

from fi_compile.kernels.channels import chunks, gathered, take, transform


def prefix_reference(
    history: Tensor,
    filters: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The definition, an input at a time. Returns [B, Cout, capacity - P]."""
    length, capacity = history.shape[-1], filters.shape[-1]
    if source is not None:
        history = history[:, source]
    if filter_index is not None:
        filters = filters[filter_index]
    out = history.new_zeros(history.shape[0], history.shape[1], capacity - length)
    for i in range(length):
        out += history[:, :, i, None] * filters[:, length - i : capacity - i]
    return gathered(out, target, 0, out.shape[1])[0]


def write_prefix(
    outputs: Tensor,
    history: Tensor,
    filters: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Write the contributions over `outputs` [B, Cout, capacity - P], by chunks of channels.

    One cyclic convolution of n >= capacity is enough: input i and lag d meet at i + d <= P - 1 +
    capacity - 1, so what wraps around lands below P, where nobody looks.
    """
    batch, channels, _ = outputs.shape
    length, capacity = history.shape[-1], filters.shape[-1]
    if length == 0 or length == capacity:
        outputs.zero_()
        return
    n = fast_length(capacity)
    if target is not None:
        outputs.zero_()
    for start, stop in chunks(channels if target is None else target.numel(), n * batch):
        product = transform(history, source, n, start, stop)
        product *= torch.fft.rfft(take(filters, filter_index, 0, start, stop), n=n)
        product, where = gathered(product, target, start, stop)
        sums = torch.fft.irfft(product, n=n)[..., length:capacity]
        if target is None:
            outputs[:, where] = sums
        else:  # a channel may have pairs in several chunks
            outputs[:, where] += sums


def fast_length(n: int) -> int:
    """The smallest even 2^a·3^b·5^c that is at least n."""
    best = 2
    while best < n:
        best *= 2
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = 2 * threes
            while twos < n:
                twos *= 2
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best


def prefix_cost(capacity: int) -> float:
    """Floating-point operations for one channel: three transforms and a product."""
    n = fast_length(capacity)
    return 3 * 2.5 * n * log2(n) + 3 * n
