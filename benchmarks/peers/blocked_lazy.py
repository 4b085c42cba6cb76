"""Blocked lazy: one read of the history serves the next K outputs. Θ(L² / K) reads, Θ(L²) operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Peer, Piece, quadrature, spread
from .native import sums
from .recent import Recent


class BlockedLazy(Peer):
    """At the start of a block of K = 16 positions the past is summed for all of them, in registers."""

    name = "blocked lazy"
    block = 16

    def __init__(self, filters: Tensor, history: Tensor) -> None:
        super().__init__(filters, history)
        # Lag d lies at K + L - 1 - d; a last block that the end cuts short reads the zeros before lag L - 1.
        self.reversed = torch.nn.functional.pad(filters.flip(-1), (self.block, 0))
        self.recent = Recent(filters, self.block)
        self.pending = filters.new_zeros(filters.shape[0], self.block)

    def push(self, y: Tensor) -> Tensor:
        start, local = self.position - self.position % self.block, self.position % self.block
        self.position += 1
        if local == 0 and start:
            self.flush(start)
            self.pending = self.past(start)
        return self.recent.push(local, y) + self.pending[:, local]

    def flush(self, end: int) -> None:
        """The block that ends here becomes history."""
        self.history[:, end - self.block : end] = self.recent.inputs

    def past(self, start: int) -> Tensor:
        """What inputs before a block contribute to it: [C, K]."""
        # Output start + s reads input i at lag start + s - i, which lies at L - 1 - start + (K - s) + i.
        window = self.reversed[:, self.length - start :]
        return sums(self.history[:, :start], window, self.block).flip(-1)

    def pieces(self) -> list[Piece]:
        blocks, k = self.length // self.block, self.block
        inside = self.recent.pieces(self.history, (blocks // 2) * k)
        past = [
            Piece(
                f"block at {b * k}",
                weight,
                range(b * k),
                range(b * k, b * k + k),
                lambda b=b: self.past(b * k),
            )
            for b, weight in quadrature(spread(blocks))
        ]
        start = blocks // 2 * k + k
        return [*inside, *past, Piece("store a block", blocks, range(0), range(0), lambda: self.flush(start))]
