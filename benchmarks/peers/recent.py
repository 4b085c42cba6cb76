"""The newest inputs, compact: what blocked algorithms sum directly until their block is full."""

from __future__ import annotations

from torch import Tensor

from .base import Piece, quadrature
from .native import sums


class Recent:
    """Inputs [C, K] of the current block and the first K lags of each filter, both in as little memory as can be."""

    def __init__(self, filters: Tensor, block: int) -> None:
        self.block = block
        self.lags = filters[:, :block].flip(-1).contiguous()  # lag d lies at K - 1 - d
        self.inputs = filters.new_zeros(filters.shape[0], block)

    def push(self, local: int, y: Tensor) -> Tensor:
        """Position `local` of the block and what its inputs up to there contribute: [C]."""
        self.inputs[:, local] = y
        return self.sum(local)[:, 0]

    def sum(self, local: int) -> Tensor:
        """What inputs 0 ... local of the block contribute to the newest of them: [C, 1]."""
        return sums(self.inputs[:, : local + 1], self.lags[:, self.block - 1 - local :])

    def pieces(self, history: Tensor, start: int) -> list[Piece]:
        """The work inside all blocks of a history [C, L], timed in the block that begins at `start`."""
        self.inputs.copy_(history[:, start : start + self.block])
        blocks, columns = (
            history.shape[1] // self.block,
            history[:, start : start + self.block].T.contiguous(),
        )

        def run(local: int) -> Tensor:
            return self.push(local, columns[local]).unsqueeze(1)

        places = quadrature({0, *(self.block >> s for s in range(1, 7)), self.block - 1})
        return [
            Piece(
                f"inside a block, position {local}",
                blocks * weight,
                range(start, start + local + 1),
                range(start + local, start + local + 1),
                lambda local=local: run(local),
            )
            for local, weight in places
        ]
