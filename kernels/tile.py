"""A tile: what U inputs contribute to V later outputs, all channels at once.

`out[s] = sum over k < U of y[k] · rho[U + g + s - k]`, s < V, with a gap of g positions between inputs and outputs,
which reads the lags 1 + g ... U + g + V - 1. Source: Flash Inference (arXiv 2410.12982), algorithm 2;
docs/algorithms.md.

In all forms: inputs [B, Cin, U], filters [F, T] with T >= U + g + V, outputs [B, Cout, V], of one dtype,
float32 or float64; source, filter_index, target: int64 [pairs] or None (see `channels`).

By transforms the inputs are blocks of S >= V positions; the block that begins d·S positions before the outputs
meets the lags (d - 1)·S + 1 ... (d + 1)·S - 1, and products are summed before the one inverse transform.
"""

from collections.abc import Sequence
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
    gap: int = 0,
) -> Tensor:
    """The definition: a product with the Toeplitz matrix of each filter. Returns [B, Cout, V]."""
    side = inputs.shape[-1]
    reads = side + gap + length
    if filters.shape[-1] < reads:
        raise ValueError(
            f"a tile of {side} inputs and {length} outputs reads {reads} lags; "
            f"the filters have {filters.shape[-1]}"
        )
    filters = filters[:, gap:]
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
    gap: int = 0,
) -> None:
    """Add the tile to `outputs` by batched matrix products: for small U·V."""
    batch, _, length = outputs.shape
    side = inputs.shape[-1]
    channels = _pairs(outputs, target)
    # With reversed inputs the Toeplitz matrix becomes the Hankel matrix rho[1 + g + s + k], a view.
    hankel = filters[:, 1 + gap : side + gap + length].unfold(-1, side, 1)
    backwards = inputs.flip(-1)
    for start, stop in chunks(channels, side * (length + batch)):
        weights = take(hankel, filter_index, 0, start, stop)
        columns = take(backwards, source, 1, start, stop).permute(1, 2, 0)
        sums, where = gathered((weights @ columns).permute(2, 0, 1), target, start, stop)
        outputs[:, where] += sums


def tile_spectrum(filters: Tensor, side: int, distance: int = 1) -> Tensor:
    """The spectrum of lags (d - 1)·S ... (d + 1)·S - 1 for a block at distance d: complex [F, S + 1].

    Lags beyond the filters' end count as zero.
    """
    return torch.fft.rfft(filters[:, (distance - 1) * side : (distance + 1) * side], n=2 * side)


def add_products(
    outputs: Tensor,
    product: Tensor,
    others: Sequence[tuple[Tensor, Tensor]],
    side: int,
    pairs: tuple[int, int],
    target: Tensor | None = None,
) -> None:
    """Add to `outputs` what blocks contribute to the pairs start ... stop, by one inverse transform.

    product: complex [B, stop - start, S + 1], of one block, overwritten. others: for each other block the spectra of
    its inputs, as large, and of the filters [stop - start, S + 1]. Of a cyclic convolution of length 2S the upper
    half is exact; the wraparound falls on the lower half.
    """
    length = outputs.shape[-1]
    for inputs, spectrum in others:
        product.addcmul_(inputs, spectrum)
    product, where = gathered(product, target, *pairs)
    cyclic = torch.fft.irfft(product, n=2 * side)
    outputs[:, where] += cyclic[..., side : side + length]


def add_tile_fft(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Add to `outputs` the tile of one block by cyclic convolutions of length 2U with `tile_spectrum`."""
    side = inputs.shape[-1]
    for pairs in chunks(_pairs(outputs, target), 2 * side * outputs.shape[0]):
        product = transform(inputs, source, 2 * side, *pairs)
        product *= take(spectrum, filter_index, 0, *pairs)
        add_products(outputs, product, (), side, pairs, target)


def _pairs(outputs: Tensor, target: Tensor | None) -> int:
    return outputs.shape[1] if target is None else target.numel()


def tile_cost(side: int, length: int) -> dict[str, float]:
    """Floating-point operations for one channel of each form, weighted by how fast it runs.

    Building a Toeplitz matrix moves as many values as it multiplies: a direct multiply-add is
    charged like four operations of a transform.
    """
    transforms = 2 * 2.5 * 2 * side * log2(2 * side)
    return {"direct": 4.0 * side * length, "fft": transforms + 6 * (side + 1) + length}
