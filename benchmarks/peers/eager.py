"""Eager: a new input is added at once to everything it contributes to. Θ(L²) reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Peer, Piece, quadrature, spread


class Eager(Peer):
    """One pass over the filters and over all outputs that are still to come, which are read and written."""

    name = "eager"

    def __init__(self, filters: Tensor, history: Tensor) -> None:
        super().__init__(filters, history)
        self.pending = torch.zeros_like(filters)

    def push(self, y: Tensor) -> Tensor:
        t, self.position = self.position, self.position + 1
        return self.add(t, y)[:, 0].clone()

    def add(self, t: int, y: Tensor) -> Tensor:
        """Add what input t contributes to all positions from t on; returns their sums so far, [C, L - t]."""
        later = self.pending[:, t:]
        return later.addcmul_(self.filters[:, : self.length - t], y[:, None])

    def pieces(self) -> list[Piece]:
        def at(t: int, weight: float) -> Piece:
            y = self.history[:, t].clone()

            def run() -> Tensor:
                return self.add(t, y)

            return Piece(
                f"position {t}", weight, range(t, t + 1), range(t, self.length), run, self.pending[:, t:]
            )

        return [at(t, weight) for t, weight in quadrature(spread(self.length))]
