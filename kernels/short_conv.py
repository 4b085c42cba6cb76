"""One step of a short convolution on a ring of its newest inputs.

`y[t] = Σ_{d < M} k[d] · x[t - d]`, where x of position p lies in row `p mod R` of the ring, R >= M, and positions
before the first count as zero. In all forms, of one dtype, float32 or float64: ring [R, B, Cin], x [B, Cin], kernel
[M, P], lag 0 first; position: int64 of one element. Pair p of an output and an input channel reads input channel
`source[p]` (int64 [P]; None: p), and the P / Cout pairs of an output channel follow each other.
"""

import torch
from torch import Tensor


def short_conv_step_reference(
    ring: Tensor, position: int, x: Tensor, kernel: Tensor, source: Tensor | None = None, fan_in: int = 1
) -> tuple[Tensor, Tensor]:
    """The definition: the output [B, Cout], and the ring after it."""
    ring = ring.clone()
    ring[position % ring.shape[0]] = x
    pairs = x.new_zeros(x.shape[0], kernel.shape[1])
    for lag in range(kernel.shape[0]):
        row = ring[(position - lag) % ring.shape[0]]
        pairs = pairs + (row if source is None else row[:, source]) * kernel[lag]
    return pairs.unflatten(1, (-1, fan_in)).sum(-1), ring


def short_conv_step(
    ring: Tensor, position: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None = None, fan_in: int = 1
) -> Tensor:
    """The output [B, Cout]; writes x into the ring."""
    size, lags = ring.shape[0], torch.arange(1, kernel.shape[0], device=ring.device)
    past, now = ring.index_select(0, (position - lags) % size), x
    if source is not None:
        past, now = past.index_select(2, source), x.index_select(1, source)
    pairs = (past * kernel[1:].unsqueeze(1)).sum(0) + now * kernel[0]
    ring.index_copy_(0, position % size, x.unsqueeze(0))
    return pairs if fan_in == 1 else pairs.unflatten(1, (-1, fan_in)).sum(-1)
