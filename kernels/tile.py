"""A tile: what U inputs contribute to the V <= U outputs that follow them, all channels at once.

`out[s] = sum over k < U of y[k] · rho[U + s - k]`, s < V, which reads the lags 1 ... U + V - 1.
Source: Flash Inference (arXiv 2410.12982), algorithm 2; docs/algorithms.md.

In all forms: inputs [B, Cin, U], filters [F, T] with T >= U + V, outputs [B, Cout, V], of one dtype,
float32 or float64; source, filter_index, target: int64 [pairs] or None (see `channels`).
"""

from math import log2

import torch
from torch import Tensor

from fi_compile.kernels.channels import chunks, gathered, take, transform


def tile_reference(
    inputs: Tensor,
    filters: Tensor,
    length: int,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The definition: a product with the Toeplitz matrix of each filter. Returns [B, Cout, V]."""
    side = inputs.shape[-1]
    if filters.shape[-1] < side + length:
        raise ValueError(
            f"a tile of {side} inputs and {length} outputs reads {side + length} lags; "
            f"the filters have {filters.shape[-1]}"
        )
    s = torch.arange(length, device=inputs.device)
    k = torch.arange(side, device=inputs.device)
    toeplitz = filters[:, side + s[:, None] - k[None, :]]
    if filter_index is not None:
        toeplitz = toeplitz[filter_index]
    if source is not None:
        inputs = inputs[:, source]
    return gathered(torch.einsum("csk,bck->bcs", toeplitz, inputs), target, 0, inputs.shape[1])[0]


def add_tile_direct(
    outputs: Tensor,
    inputs: Tensor,
    filters: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Add the tile to `outputs` by batched matrix products: for small U·V."""
    batch, _, length = outputs.shape
    side = inputs.shape[-1]
    channels = _pairs(outputs, target)
    # With reversed inputs the Toeplitz matrix becomes the Hankel matrix rho[1 + s + k], a view.
    hankel = filters[:, 1 : side + length].unfold(-1, side, 1)
    backwards = inputs.flip(-1)
    for start, stop in chunks(channels, side * (length + batch)):
        weights = take(hankel, filter_index, 0, start, stop)
        columns = take(backwards, source, 1, start, stop).permute(1, 2, 0)
        sums, where = gathered((weights @ columns).permute(2, 0, 1), target, start, stop)
        outputs[:, where] += sums


def tile_spectrum(filters: Tensor, side: int) -> Tensor:
    """The spectrum of lags 0 ... 2U - 1 that `add_tile_fft` wants: complex [F, U + 1].

    Lags beyond the filters' end count as zero.
    """
    return torch.fft.rfft(filters[:, : 2 * side], n=2 * side)


def add_tile_fft(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Add the tile to `outputs` by cyclic convolutions of length 2U with `tile_spectrum`.

    Of such a convolution the upper half is exact; the wraparound falls on the lower half.
    """
    batch, _, length = outputs.shape
    side = inputs.shape[-1]
    for start, stop in chunks(_pairs(outputs, target), 2 * side * batch):
        product = transform(inputs, source, 2 * side, start, stop)
        product *= take(spectrum, filter_index, 0, start, stop)
        product, where = gathered(product, target, start, stop)
        cyclic = torch.fft.irfft(product, n=2 * side)
        outputs[:, where] += cyclic[..., side : side + length]


def _pairs(outputs: Tensor, target: Tensor | None) -> int:
    return outputs.shape[1] if target is None else target.numel()


def tile_cost(side: int, length: int) -> dict[str, float]:
    """Floating-point operations for one channel of each form, weighted by how fast it runs.

    Building a Toeplitz matrix moves as many values as it multiplies: a direct multiply-add is
    charged like four operations of a transform.
    """
    transforms = 2 * 2.5 * 2 * side * log2(2 * side)
    return {"direct": 4.0 * side * length, "fft": transforms + 6 * (side + 1) + length}
