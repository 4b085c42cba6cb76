"""One step of a short convolution on a ring of its newest inputs.

`y[t] = Σ_{d < M} k[d] · x[t - d]`, where x of position p lies in row `p mod R` of the ring, R >= M, and positions
before the first count as zero. In all forms, of one dtype, float32 or float64: ring [R, B, Cin], x [B, Cin], kernel
[M, P], lag 0 first; position: int64 of one element. Pair p of an output and an input channel reads input channel
`source[p]` (int64 [P]; None: p), and the P / Cout pairs of an output channel follow each other. `lags`: what the rows
of the kernel but the first are the lags of, int64 [M - 1], where they are not 1 ... M - 1: the others are zero.
"""

import torch
from torch import Tensor


def short_conv_step_reference(
    ring: Tensor,
    position: int,
    x: Tensor,
    kernel: Tensor,
    source: Tensor | None = None,
    fan_in: int = 1,
    lags: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: the output [B, Cout], and the ring after it."""
    ring = ring.clone()
    ring[position % ring.shape[0]] = x
    pairs = x.new_zeros(x.shape[0], kernel.shape[1])
    for taps, lag in zip(kernel, range(len(kernel)) if lags is None else [0, *lags.tolist()], strict=True):
        row = ring[(position - lag) % ring.shape[0]]
        pairs = pairs + (row if source is None else row[:, source]) * taps
    return pairs.unflatten(1, (-1, fan_in)).sum(-1), ring


def short_conv_step(
    ring: Tensor,
    position: Tensor,
    x: Tensor,
    kernel: Tensor,
    source: Tensor | None = None,
    fan_in: int = 1,
    lags: Tensor | None = None,
    picks: bool = False,
) -> Tensor:
    """The output [B, Cout]; writes x into the ring. picks: zero times what is infinite, or no number, is zero."""
    size = ring.shape[0]
    if lags is None:
        lags = torch.arange(1, kernel.shape[0], device=ring.device)
    past, now = ring.index_select(0, (position - lags) % size), x
    if source is not None:
        past, now = past.index_select(2, source), x.index_select(1, source)
    if picks:
        past = torch.where(kernel[1:].unsqueeze(1) == 0, 0, past)
        now = torch.where(kernel[0] == 0, 0, now)
    pairs = (past * kernel[1:].unsqueeze(1)).sum(0) + now * kernel[0]
    ring.index_copy_(0, position % size, x.unsqueeze(0))
    return pairs if fan_in == 1 else pairs.unflatten(1, (-1, fan_in)).sum(-1)
