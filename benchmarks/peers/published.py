"""Flash Inference as published (Oncescu et al., ICLR 2025, arXiv 2410.12982, algorithm 2): a tile after every position.

After position t the tile of side U = lowbit(t + 1) adds what the newest U inputs contribute to the next U. As in the
paper's "hybrid", each size runs on the kernel that was fastest there. Tiles of up to 32 lie inside an aligned block
of 64 positions, which is kept position-major so that no tile walks through memory a row at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fi_compile.extension import lanes

from .base import Peer, Piece
from .transforms import CompiledTile, DirectTile, TransformTile

_ALIGNED = 64


class Published(Peer):
    """The dyadic schedule without a base block, all channels of all layers in one launch."""

    name = "published schedule"

    def __init__(self, filters: Tensor, history: Tensor) -> None:
        super().__init__(filters, history)
        self.lags = filters[:, :_ALIGNED].T.contiguous()  # [64, C], lag d in row d
        channels = filters.shape[0]
        self.inputs, self.sums = filters.new_zeros(2, _ALIGNED, channels).unbind(0)
        self.pending = torch.zeros_like(filters)
        self.tiles: dict[int, TransformTile | CompiledTile | DirectTile] = {}
        side = _ALIGNED
        while 2 * side <= self.length:
            self.tiles[side] = self._fastest(side)
            side *= 2

    def _fastest(self, side: int) -> TransformTile | CompiledTile | DirectTile:
        code = lanes()
        transform = CompiledTile(self.filters, side, code) if code else TransformTile(self.filters, side)
        if side > 256:  # a product takes U / log U times the work
            return transform
        direct = DirectTile(self.filters, side)
        inputs, outputs = self.filters[:, :side], torch.zeros_like(self.filters[:, :side])
        return min((transform, direct), key=lambda tile: _seconds(lambda: tile.add(inputs, outputs)))

    def restart(self) -> None:
        """Back to position 0."""
        self.position = 0
        self.pending.zero_()
        self.sums.zero_()

    def push(self, y: Tensor) -> Tensor:
        t, self.position = self.position, self.position + 1
        z = self.diagonal(t % _ALIGNED, y)
        side = (t + 1) & -(t + 1)
        if side < _ALIGNED:
            self.small_tile(t % _ALIGNED + 1, side)
        else:
            self.flush(t + 1)
            if t + 1 < self.length:
                self.large_tile(t + 1, side)
                self.load(t + 1)
        return z

    def diagonal(self, local: int, y: Tensor) -> Tensor:
        """Store an input; what is pending there and its own contribution: [C]."""
        self.inputs[local] = y
        return torch.addcmul(self.sums[local], y, self.lags[0])

    def small_tile(self, end: int, side: int) -> None:
        """A tile inside the aligned block: inputs end - U ... end - 1, position-major."""
        outputs, inputs = self.sums[end : end + side], self.inputs[end - side : end]
        for k in range(side):  # input k contributes to output s at lag U + s - k
            outputs.addcmul_(inputs[k], self.lags[side - k : 2 * side - k])

    def large_tile(self, end: int, side: int) -> None:
        """A tile beyond the aligned block, on the history."""
        stop = min(end + side, self.length)
        self.tiles[side].add(self.history[:, end - side : end], self.pending[:, end:stop])

    def flush(self, end: int) -> None:
        """The aligned block that ends here becomes history."""
        self.history[:, end - _ALIGNED : end] = self.inputs.T

    def load(self, start: int) -> None:
        """The sums pending for the aligned block that begins here."""
        self.sums.copy_(self.pending[:, start : start + _ALIGNED].contiguous().T)

    def pieces(self) -> list[Piece]:
        length, here = self.length, _ALIGNED
        inputs = self.history[:, here : here + _ALIGNED].T.contiguous()
        self.inputs.copy_(inputs)
        blocks = length // _ALIGNED
        found = [
            Piece(
                "diagonal",
                length,
                range(here, here + 1),
                range(here, here + 1),
                lambda: self._diagonal(inputs[0]),
            ),
            Piece("flush", blocks, range(0), range(0), lambda: self.flush(here + _ALIGNED)),
            Piece("load", blocks - 1, range(0), range(0), lambda: self.load(here)),
        ]
        side = 1
        while side < length:
            small = side < _ALIGNED
            end = here + side if small else side
            found.append(
                Piece(
                    f"tile of {side}",
                    length // (2 * side),
                    range(end - side, end),
                    range(end, end + side),
                    self._run(small, end, side),
                    self.sums[side : 2 * side].T if small else self.pending[:, end : end + side],
                )
            )
            side *= 2
        return found

    def _diagonal(self, y: Tensor) -> Tensor:
        self.sums[0] = 0
        return self.diagonal(0, y).unsqueeze(1)

    def _run(self, small: bool, end: int, side: int) -> Callable[[], None]:
        if small:
            return lambda: self.small_tile(side, side)
        return lambda: self.large_tile(end, side)


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
