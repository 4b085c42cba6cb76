"""Tiles on a CPU by transforms across SIMD lanes (`kernels.tile_lanes`), whole or in pieces of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from fi_compile.extension import lanes
from fi_compile.kernels.channels import chunk_width
from fi_compile.kernels.tile_lanes import one_by_one
from fi_compile.schedule import Schedule, Tile

from .tile_work import KeptSpectra, TileWork, operations_of
from .tiles import TorchTiles


class LaneTiles(TorchTiles):
    """Tiles by compiled code, a group of channels at a time from the rows of the state and back; or torch's.

    A tile transforms all of the blocks it meets: no spectra of inputs are kept. Torch's are those whose side is no
    power of two, or too small, and all where channels that share a filter do not fill groups of lanes.
    """

    def __init__(
        self,
        filters: Tensor,
        source: Tensor | None,
        filter_index: Tensor | None,
        target: Tensor | None = None,
    ):
        super().__init__(filters, source, filter_index, target)
        code = lanes()
        if code is None or target is not None:
            raise ValueError("compiled tiles need a compiler, and serve one input a channel")
        self.code = code
        self.lanes = code.lanes(filters.dtype)
        self._shared = None if filter_index is None else _filter_of_groups(filter_index, self.lanes)
        self._serves = filter_index is None or self._shared is not None

    def form(self, tile: Tile) -> str:
        """How a tile runs: `lanes`, or as torch would."""
        fits = self._serves and self.code.serves(tile.side) and len(tile.inputs) % tile.side == 0
        return "lanes" if fits else super().form(tile)

    def _at_once(self, form: str, tile: Tile) -> bool:
        return form == "lanes" or super()._at_once(form, tile)

    def add(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> None:
        """Add to pending what a tile's inputs in history contribute."""
        if self.form(tile) == "lanes":
            self.run(tile, history, pending)
        else:
            super().add(tile, history, pending, kept)

    def run(
        self, tile: Tile, history: Tensor, pending: Tensor, channels: tuple[int, int] | None = None
    ) -> None:
        """The same for tiles of the form `lanes`: all output channels, or a range that begins at a group of lanes."""
        side, blocks, source = tile.side, tile.blocks, self.maps[0]
        outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        if len(blocks) == 1 and self.meets_once(side, blocks[0][1]):
            self.code.add_once(outputs, history, side, *blocks[0], self.filters, source, channels)
            return
        met = [(start, self.lane_spectra(side, distance)) for start, distance in blocks]
        self.code.add(outputs, history, side, met, source, channels, self._shared)

    def write_columns(self, columns: Tensor, rows: Tensor) -> None:
        """Positions of a state [B, C, n] from a block's rows [n, B, C]."""
        self.code.move(rows, columns, into_columns=True)

    def read_columns(self, rows: Tensor, columns: Tensor) -> None:
        """A block's rows [n, B, C] from positions of a state [B, C, n]."""
        self.code.move(rows, columns, into_columns=False)

    def begin(
        self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra, elements: int | None = None
    ) -> TileWork:
        """The same in pieces, none of which has run yet; elements: values that a piece works on."""
        if self.form(tile) == "lanes":
            return _Work(self, tile, history, pending, elements)
        return super().begin(tile, history, pending, kept, elements)

    def lane_spectra(self, side: int, distance: int) -> Tensor:
        """What tiles of `side` inputs at a distance read of the filters, made on first use."""

        def make(filters: Tensor, side: int) -> Tensor:
            spectra = self.code.spectra(filters, side, distance)
            return spectra if self._shared is None else one_by_one(spectra, len(filters))

        return self._keep("lanes", side, make, distance)

    def prepare(self, schedule: Schedule) -> None:
        """Make the spectra that a schedule's tiles meet."""
        super().prepare(schedule)
        for side, distance in self._lane_spectra_for(schedule):
            self.lane_spectra(side, distance)

    def predict_bytes(self, schedule: Schedule, batch: int, channels: int) -> tuple[int, int]:
        """Bytes of the spectra that a whole schedule leaves: of the filters, and of the inputs of one state."""
        ours, kept = super().predict_bytes(schedule, batch, channels)
        rows = (
            len(self.filters)
            if self._shared is not None
            else -(-len(self.filters) // self.lanes) * self.lanes
        )
        values = sum(4 * (side // 2 + 1) for side, _ in self._lane_spectra_for(schedule))
        return ours + rows * values * self.filters.itemsize, kept

    def _lane_spectra_for(self, schedule: Schedule) -> set[tuple[int, int]]:
        tiles = (tile for tile in schedule if self.form(tile) == "lanes")
        met = {
            (t.side, d, len(t.blocks) == 1 and self.meets_once(t.side, d)) for t in tiles for _, d in t.blocks
        }
        return {(side, distance) for side, distance, once in met if not once}


def _filter_of_groups(filter_index: Tensor, lanes: int) -> Tensor | None:
    """The filter of each group of so many channels, int64; None where a group has several."""
    groups = filter_index.split(lanes)
    if any(bool((group != group[0]).any()) for group in groups):
        return None
    return torch.stack([group[0] for group in groups])


class _Work(TileWork):
    """A tile across lanes in pieces of whole groups, each with its transforms."""

    def __init__(self, tiles: LaneTiles, tile: Tile, history: Tensor, pending: Tensor, elements: int | None):
        self._tiles, self._history, self._pending = tiles, history, pending
        batch, pairs = history.shape[0], pending.shape[1]
        width = -(-chunk_width(2 * tile.side * batch, elements) // tiles.lanes) * tiles.lanes
        transform, with_newest = operations_of(tile, batch, fresh=True)
        super().__init__(
            tile, (), pairs, pairs, width, transform, with_newest + transform * (len(tile.blocks) - 1)
        )

    def _transform(self, start: int, first: int, last: int) -> None:
        raise NotImplementedError("nothing is transformed beforehand")

    def _combine(self, first: int, last: int) -> None:
        self._tiles.run(self.tile, self._history, self._pending, (first, last))
