"""Convolutions by transforms on preallocated work, by groups of channels whose work stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fi_compile.kernels.tile_lanes import Lanes

QUANTUM = 1 << 18  # values of a group's transform


class Transform:
    """Real transforms of n values for groups of channels of [C, ...]: work for one group, spectra for all."""

    def __init__(self, channels: int, n: int, like: Tensor) -> None:
        self.n, self.channels = n, channels
        self.width = max(1, min(channels, QUANTUM // n))
        self.values = like.new_zeros(self.width, n)
        self.sums = like.new_empty(self.width, n)
        self.product = like.new_empty(self.width, n // 2 + 1, dtype=_complex(like.dtype))

    def groups(self) -> Iterator[slice]:
        """The groups of channels."""
        return (slice(c, min(c + self.width, self.channels)) for c in range(0, self.channels, self.width))

    def forward(self, values: Tensor) -> Tensor:
        """The spectra of a group's values [c, m], m <= n, zeros behind: a view of the work."""
        count, used = values.shape
        work = self.values[:count]
        work[:, :used] = values
        work[:, used:] = 0
        return torch.fft.rfft(work, out=self.product[:count])

    def inverse(self, product: Tensor) -> Tensor:
        """A group's values [c, n]: a view of the work."""
        return torch.fft.irfft(product, n=self.n, out=self.sums[: product.shape[0]])

    def spectra(self, values: Tensor) -> Tensor:
        """The spectra of all channels' values [C, m], kept: [C, n // 2 + 1]."""
        kept = values.new_empty(self.channels, self.n // 2 + 1, dtype=self.product.dtype)
        for group in self.groups():
            kept[group] = self.forward(values[group])
        return kept


class TransformTile:
    """What U inputs contribute to the U outputs after them, by transforms of 2U values (Flash Inference)."""

    def __init__(self, filters: Tensor, side: int) -> None:
        self.side = side
        self.transform = Transform(filters.shape[0], 2 * side, filters)
        self.spectra = self.transform.spectra(filters[:, : 2 * side])

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """inputs [C, U], outputs [C, V], V <= U."""
        for group in self.transform.groups():
            product = self.transform.forward(inputs[group])
            product *= self.spectra[group]
            sums = self.transform.inverse(product)
            outputs[group] += sums[:, self.side : self.side + outputs.shape[1]]


class DirectTile:
    """The same by products with Hankel matrices, views of the filters: for small U."""

    def __init__(self, filters: Tensor, side: int) -> None:
        self.side = side
        self.width = max(1, QUANTUM // (side * side))
        self.hankel = filters[:, 1 : 2 * side].contiguous().unfold(-1, side, 1)  # lag 1 + s + k

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """inputs [C, U], outputs [C, V], V <= U."""
        backwards = inputs.flip(-1).unsqueeze(-1)
        for c in range(0, inputs.shape[0], self.width):
            group = slice(c, c + self.width)
            outputs[group] += (self.hankel[group, : outputs.shape[1]] @ backwards[group])[..., 0]


class CompiledTile:
    """The same by flashinf's compiled transforms, `fi_compile.kernels.tile_lanes`."""

    def __init__(self, filters: Tensor, side: int, code: Lanes) -> None:
        self.side, self.code = side, code
        self.spectra = code.spectra(filters, side)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """inputs [C, U], outputs [C, V], V <= U, positions contiguous."""
        self.code.tile(outputs.unsqueeze(0), inputs.unsqueeze(0), self.side, [(0, self.spectra)]).add()


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
