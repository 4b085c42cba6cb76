"""Lazy: at every position the whole sum, one pass over the history and the filters. Θ(L²) reads."""

from __future__ import annotations

from torch import Tensor

from .base import Peer, Piece, quadrature, spread
from .native import sums


class Lazy(Peer):
    """Limited by how fast memory can be read: 2 C (t + 1) values at position t."""

    name = "lazy"

    def __init__(self, filters: Tensor, history: Tensor) -> None:
        super().__init__(filters, history)
        self.reversed = filters.flip(-1)  # lag d lies at L - 1 - d

    def push(self, y: Tensor) -> Tensor:
        t, self.position = self.position, self.position + 1
        self.history[:, t] = y
        return self.output(t)[:, 0]

    def output(self, t: int) -> Tensor:
        """Position t from inputs 0 ... t: [C, 1]."""
        return sums(self.history[:, : t + 1], self.reversed[:, self.length - 1 - t :])

    def pieces(self) -> list[Piece]:
        def at(t: int, weight: float) -> Piece:
            y = self.history[:, t].clone()

            def run() -> Tensor:
                self.history[:, t] = y
                return self.output(t)

            return Piece(f"position {t}", weight, range(t + 1), range(t, t + 1), run)

        return [at(t, weight) for t, weight in quadrature(spread(self.length))]
