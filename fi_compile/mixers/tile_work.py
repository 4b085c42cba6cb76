"""A tile by transforms, in pieces of channels, and the spectra of its inputs, which later tiles meet too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import log2

from torch import Tensor

from fi_compile.schedule import Tile


class KeptSpectra:
    """The spectra of blocks of inputs that several tiles of one state meet: for each side a ring [R, B, Cin, ...].

    The block that begins at a position lies in row position // side mod R. A ring grows to the most blocks that are
    met at once. Or, where tiles keep none, what a tile under way has in hand, one of each side.
    """

    def __init__(self) -> None:
        self._rings: dict[int, Tensor] = {}
        self._held: dict[int, list[int]] = {}
        self._rooms: dict[int, Tensor] = {}

    def room(self, side: int, new: Callable[[int], Tensor]) -> Tensor:
        """Memory of the one tile of a side that is under way; it may hold anything when that begins."""
        if side not in self._rooms:
            self._rooms[side] = new(side)
        return self._rooms[side]

    def reserve(self, tile: Tile, starts: Sequence[int], new: Callable[[int], Tensor]) -> list[int]:
        """Make room for the blocks of a tile that begin at `starts`, forget those before its first; which are missing.

        new: a ring of so many rows.
        """
        side = tile.side
        held = [start for start in self._held.get(side, ()) if start >= tile.inputs.start]
        missing = [start for start in starts if start not in held]
        ring, rows = self._rings.get(side), len(held) + len(missing)
        if rows and (ring is None or len(ring) < rows):
            grown = self._rings[side] = new(rows)
            if ring is not None:
                for start in held:
                    grown[start // side % rows].copy_(ring[start // side % len(ring)])
        self._held[side] = held + missing
        return missing

    def ring(self, side: int) -> Tensor:
        """All rows for a side."""
        return self._rings[side]

    def row(self, side: int, start: int) -> int:
        """The row of the block of `side` inputs that begins at `start`."""
        return start // side % len(self._rings[side])

    def of(self, side: int, start: int) -> Tensor:
        """The spectra of the block of `side` inputs that begins at `start`, [B, Cin, ...]."""
        return self._rings[side][self.row(side, start)]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(tensor.nbytes for tensor in (*self._rings.values(), *self._rooms.values()))

    def clear(self) -> None:
        """The inputs have changed: nothing is known of any block."""
        self._held.clear()


class TileWork(ABC):
    """A tile in `count` pieces, which are run in order."""

    tile: Tile
    count: int

    @abstractmethod
    def run(self, index: int) -> None:
        """Piece `index` of `count`."""

    def run_all(self) -> None:
        """Every piece."""
        for index in range(self.count):
            self.run(index)

    @abstractmethod
    def operations(self, index: int) -> float:
        """Floating-point operations of a piece, as `Schedule.cost` counts them."""

    @property
    @abstractmethod
    def total(self) -> float:
        """Floating-point operations of all pieces."""


class SpectralWork(TileWork):
    """A tile in pieces of channels: transforms of blocks of inputs, which are kept, then what they contribute.

    missing: where blocks begin that are transformed beforehand, for `inputs` channels; pairs: of an input channel and
    a filter. width: the channels of a piece. transforming, combining: floating-point operations a channel.
    """

    def __init__(
        self,
        tile: Tile,
        missing: Sequence[int],
        inputs: int,
        pairs: int,
        width: int,
        transforming: float,
        combining: float,
    ):
        self.tile = tile
        self._missing, self._inputs, self._pairs, self._width = missing, inputs, pairs, width
        self._transforming, self._combining = transforming, combining
        self._forward = -(-inputs // width)
        self._before = len(missing) * self._forward  # pieces that transform, before those that combine
        self.count = self._before + -(-pairs // width)

    def run(self, index: int) -> None:
        """Piece `index` of `count`."""
        if index < self._before:
            block, piece = divmod(index, self._forward)
            first = piece * self._width
            self._transform(self._missing[block], first, min(first + self._width, self._inputs))
        else:
            first = (index - self._before) * self._width
            self._combine(first, min(first + self._width, self._pairs))

    @abstractmethod
    def _transform(self, start: int, first: int, last: int) -> None:
        """The block that begins at `start`, of input channels first ... last."""

    @abstractmethod
    def _combine(self, first: int, last: int) -> None:
        """Add what pairs first ... last contribute."""

    def operations(self, index: int) -> float:
        """Floating-point operations of a piece, as `Schedule.cost` counts them."""
        if index < self._before:
            return self._transforming * min(self._width, self._inputs - index % self._forward * self._width)
        return self._combining * min(self._width, self._pairs - (index - self._before) * self._width)

    @property
    def total(self) -> float:
        """Floating-point operations of all pieces."""
        return len(self._missing) * self._inputs * self._transforming + self._pairs * self._combining


def operations_of(tile: Tile, batch: int, fresh: bool) -> tuple[float, float]:
    """Operations a channel of a transform of one block, and of a tile's products and what is transformed with them.

    fresh: whether the newest block is transformed with the products.
    """
    transform = batch * 5 * tile.side * log2(2 * tile.side)
    products = batch * (tile.side + 1) * (8 * len(tile.blocks) - 2)
    return transform, products + transform * (2 if fresh else 1)
