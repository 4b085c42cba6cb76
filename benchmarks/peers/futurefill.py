"""Epoched FutureFill (Agarwal et al., arXiv 2410.03766): lazy inside an epoch of K positions, one fill at its end.

A fill computes what all inputs so far contribute to the next K outputs, Θ(L^1.5 √log L) operations with K ≈ √(L log L).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import Peer, Piece, quadrature, spread
from .recent import Recent
from .transforms import Transform

EPOCHS = (128, 256, 512, 1024, 2048, 4096)


class FutureFill(Peer):
    """As published: a fill is one transform of the whole past. Sizes are powers of two, so filter spectra are kept."""

    name = "FutureFill"

    def __init__(self, filters: Tensor, history: Tensor, epoch: int = 1024) -> None:
        super().__init__(filters, history)
        self.epoch = min(epoch, self.length)
        self.recent = Recent(filters, self.epoch)
        self.pending = filters.new_zeros(filters.shape[0], self.epoch)
        self._prepare()

    def _prepare(self) -> None:
        self.kept: dict[int, tuple[Transform, Tensor]] = {}

    def push(self, y: Tensor) -> Tensor:
        start, local = self.position - self.position % self.epoch, self.position % self.epoch
        if local == 0 and start:
            self.store(start)
            self.fill(start)
        self.position += 1
        return self.recent.push(local, y) + self.pending[:, local]

    def store(self, end: int) -> None:
        """The epoch that ends here becomes history."""
        self.history[:, end - self.epoch : end] = self.recent.inputs

    def fill(self, start: int) -> Tensor:
        """Write what inputs 0 ... start - 1 contribute to the epoch that begins here; returns it, [C, K]."""
        n = 1 << (start + self.epoch - 1).bit_length()
        if n not in self.kept:
            transform = Transform(self.filters.shape[0], n, self.filters)
            self.kept[n] = transform, transform.spectra(self.filters[:, :n])
        transform, spectra = self.kept[n]
        for group in transform.groups():
            product = transform.forward(self.history[group, :start])
            product *= spectra[group]
            # What wraps around lands below `start`.
            self.pending[group] = transform.inverse(product)[:, start : start + self.epoch]
        return self.pending

    def pieces(self) -> list[Piece]:
        epochs, k = self.length // self.epoch, self.epoch
        inside = self.recent.pieces(self.history, epochs // 2 * k)
        fills = [
            Piece(
                f"fill at {e * k}",
                weight,
                range(e * k),
                range(e * k, e * k + k),
                lambda e=e: self.fill(e * k),
            )
            for e, weight in quadrature(self._sampled(epochs))
            if e
        ]
        end = epochs // 2 * k + k
        return [*inside, *fills, Piece("store an epoch", epochs, range(0), range(0), lambda: self.store(end))]

    def _sampled(self, epochs: int) -> Iterable[int]:
        # Transforms double in size after a power of two: a place on both sides of each.
        doubled = [1 << p for p in range(epochs.bit_length())]
        return [e for d in doubled for e in (d - 1, d) if e < epochs] + [epochs - 1]


class PartitionedFutureFill(FutureFill):
    """A stronger fill than the published one: the spectra of all epochs are kept, products summed (Gardner 1995)."""

    name = "FutureFill, kept spectra"

    def _prepare(self) -> None:
        epochs, channels, k = self.length // self.epoch, self.filters.shape[0], self.epoch
        self.transform = Transform(channels, 2 * k, self.filters)
        shape = (epochs, channels, k + 1)
        self.inputs = torch.zeros(shape, dtype=self.transform.product.dtype)
        self.lags = torch.zeros(
            shape, dtype=self.transform.product.dtype
        )  # row d: lags (d - 1) K ... (d + 1) K - 1
        for d in range(1, epochs):
            self.lags[d] = self.transform.spectra(self.filters[:, (d - 1) * k : (d + 1) * k])
        self.total = torch.empty_like(self.transform.product)

    def keep(self, end: int) -> None:
        """Keep the spectra of the epoch that ends here."""
        epoch, columns = end // self.epoch - 1, slice(end - self.epoch, end)
        for group in self.transform.groups():
            self.inputs[epoch, group] = self.transform.forward(self.history[group, columns])

    def store(self, end: int) -> None:
        """The epoch that ends here becomes history."""
        super().store(end)
        self.keep(end)

    def fill(self, start: int) -> Tensor:
        """As above, from the kept spectra."""
        epochs = start // self.epoch
        for group in self.transform.groups():
            total = self.total[: group.stop - group.start].zero_()
            for e in range(epochs):
                total.addcmul_(self.inputs[e, group], self.lags[epochs - e, group])
            self.pending[group] = self.transform.inverse(total)[:, self.epoch :]
        return self.pending

    def pieces(self) -> list[Piece]:
        for e in range(self.length // self.epoch):
            self.keep((e + 1) * self.epoch)
        return super().pieces()

    def _sampled(self, epochs: int) -> Iterable[int]:
        return spread(epochs)
