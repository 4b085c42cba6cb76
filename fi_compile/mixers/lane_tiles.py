"""Tiles on a CPU by transforms across SIMD lanes (`kernels.tile_lanes`), whole or in pieces of channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fi_compile.costs import PIECE_OPERATIONS, piece_elements
from fi_compile.extension import lanes
from fi_compile.kernels.channels import chunk_width
from fi_compile.kernels.tile_lanes import TileCall, grain_of, one_by_one, task_costs
from fi_compile.schedule import Schedule, Tile

from .tile_work import KeptSpectra, TileWork, operations_of
from .tiles import TorchTiles

# Pieces of a deferred tile are so much smaller than what a position does on average, at whose end one may be begun.
_FINER = 2


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
        self.shared = None if filter_index is None else _filter_of_groups(filter_index, self.lanes)
        self._serves = filter_index is None or self.shared is not None

    def form(self, tile: Tile) -> str:
        """How a tile runs: `lanes`, or as torch would."""
        fits = self._serves and self.code.serves(tile.side) and len(tile.inputs) % tile.side == 0
        return "lanes" if fits else super().form(tile)

    def _at_once(self, form: str, tile: Tile) -> bool:
        return form == "lanes" or super()._at_once(form, tile)

    def add(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> None:
        """Add to pending what a tile's inputs in history contribute."""
        if self.form(tile) == "lanes":
            self.call(tile, history, pending).add()
        else:
            super().add(tile, history, pending, kept)

    def call(self, tile: Tile, history: Tensor, pending: Tensor) -> TileCall:
        """The same for tiles of the form `lanes`, to be run."""
        outputs, source = pending[:, :, tile.outputs.start : tile.outputs.stop], self.maps[0]
        if self._once(tile):
            return self.code.tile_once(outputs, history, tile.side, *tile.blocks[0], self.filters, source)
        met = [(start, self.lane_spectra(tile.side, distance)) for start, distance in tile.blocks]
        return self.code.tile(outputs, history, tile.side, met, source, self.shared)

    def _once(self, tile: Tile) -> bool:
        """Whether the spectra a tile meets are not worth keeping: two tiles of a sequence meet them at most.

        Making them on the way takes two thirds of a tile. For a deferred one there is no time.
        """
        return not tile.gap and tile.alone and self.meets_once(2 * tile.side, 1)

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
        if self.form(tile) != "lanes":
            return super().begin(tile, history, pending, kept, elements)
        call, batch, pairs = self.call(tile, history, pending), history.shape[0], pending.shape[1]
        elements = elements and elements // _FINER
        if elements and self.in_parts(tile.side, batch, elements):
            room = kept.room(tile.side, self.new_room)
            return _Parts(call, tile, batch, pairs, self.lanes, elements, room)
        return _Groups(call, tile, batch, pairs, self.lanes, elements)

    def new_room(self, side: int) -> Tensor:
        """Memory between the parts of a tile."""
        with torch.inference_mode(False):
            return self.filters.new_zeros(self.code.work_shape(side, self.filters.dtype))

    def in_parts(self, side: int, batch: int, elements: int) -> bool:
        """Whether a group of lanes is too much for one piece, which works on so many values."""
        return 2 * side * batch * self.lanes > elements

    def lane_spectra(self, side: int, distance: int) -> Tensor:
        """What tiles of `side` inputs at a distance read of the filters, made on first use."""

        def make(filters: Tensor, side: int) -> Tensor:
            spectra = self.code.spectra(filters, side, distance)
            return spectra if self.shared is None else one_by_one(spectra, len(filters))

        return self._keep("lanes", side, make, distance)

    def prepare(self, schedule: Schedule) -> None:
        """Make the spectra that a schedule's tiles meet."""
        super().prepare(schedule)
        for side, distance in self._lane_spectra_for(schedule):
            self.lane_spectra(side, distance)

    def predict_bytes(self, schedule: Schedule, batch: int, channels: int) -> tuple[int, int]:
        """Bytes of the spectra that a whole schedule leaves: of the filters, and of the inputs of one state."""
        ours, kept = super().predict_bytes(schedule, batch, channels)
        values = sum(prod(self._spectra_shape(side)) for side, _ in self._lane_spectra_for(schedule))
        ours += values * self.filters.itemsize
        if schedule.deferred:
            elements = piece_elements(schedule, self._outputs(channels) * batch) // _FINER
            sides = {tile.side for tile in schedule if self.form(tile) == "lanes"}
            split = [side for side in sides if self.in_parts(side, batch, elements)]
            kept += (
                sum(prod(self.code.work_shape(s, self.filters.dtype)) for s in split) * self.filters.itemsize
            )
        return ours, kept

    def _spectra_shape(self, side: int) -> tuple[int, ...]:
        shape = self.code.spectra_shape(len(self.filters), side, self.filters.dtype)
        return shape if self.shared is None else (len(self.filters), *shape[1:-1])

    def _outputs(self, inputs: int) -> int:
        """How many output channels there are for so many of inputs."""
        source, index, _ = self.maps
        known = source if source is not None else index
        return inputs if known is None else len(known)

    def _lane_spectra_for(self, schedule: Schedule) -> set[tuple[int, int]]:
        tiles = (tile for tile in schedule if self.form(tile) == "lanes" and not self._once(tile))
        return {(tile.side, distance) for tile in tiles for _, distance in tile.blocks}


def _filter_of_groups(filter_index: Tensor, lanes: int) -> Tensor | None:
    """The filter of each group of so many channels, int64; None where a group has several."""
    groups = filter_index.split(lanes)
    if any(bool((group != group[0]).any()) for group in groups):
        return None
    return torch.stack([group[0] for group in groups])


class _Groups(TileWork):
    """A tile across lanes, some groups of channels a piece; elements: values of a transform that one works on."""

    def __init__(self, call: TileCall, tile: Tile, batch: int, pairs: int, lanes: int, elements: int | None):
        width = -(-chunk_width(2 * tile.side * batch, elements) // lanes) * lanes
        self.tile, self._call = tile, call
        self._channels = [(c, min(c + width, pairs)) for c in range(0, pairs, width)]
        self.count = len(self._channels)
        transform, with_newest = operations_of(tile, batch, fresh=True)
        self._each = with_newest + transform * (len(tile.blocks) - 1)

    def run(self, index: int) -> None:
        """Piece `index` of `count`."""
        self._call.add(self._channels[index])

    def operations(self, index: int) -> float:
        """Floating-point operations of a piece."""
        first, last = self._channels[index]
        return (last - first) * self._each

    @property
    def total(self) -> float:
        """Floating-point operations of all pieces."""
        return self._channels[-1][1] * self._each


class _Parts(TileWork):
    """A tile across lanes where one group of channels is too much for a piece: parts of one row of a group each.

    room: memory between the parts. elements: values of a transform that one piece works on.
    """

    def __init__(
        self, call: TileCall, tile: Tile, batch: int, pairs: int, lanes: int, elements: int, room: Tensor
    ):
        self.tile, self._call, self._room, self._batch = tile, call, room, batch
        self._grain = grain_of(tile.side, elements / lanes)
        costs = task_costs(tile.side, len(tile.blocks), self._grain)
        self._parts = _runs(costs, PIECE_OPERATIONS * elements / lanes)
        self._channels = [(c, min(c + lanes, pairs)) for c in range(0, pairs, lanes)]
        self.count = len(self._channels) * batch * len(self._parts)

    def run(self, index: int) -> None:
        """Piece `index` of `count`."""
        place, part = divmod(index, len(self._parts))
        group, row = divmod(place, self._batch)
        self._call.add_part(row, self._channels[group], self._parts[part][0], self._grain, self._room)

    def operations(self, index: int) -> float:
        """Floating-point operations of a piece."""
        place, part = divmod(index, len(self._parts))
        first, last = self._channels[place // self._batch]
        return (last - first) * self._parts[part][1]

    @property
    def total(self) -> float:
        """Floating-point operations of all pieces."""
        return self._channels[-1][1] * self._batch * sum(cost for _, cost in self._parts)


def _runs(costs: Sequence[float], most: float) -> list[tuple[tuple[int, int], float]]:
    """Tasks in runs that cost so much at most, or are one task: their ranges, and what they cost."""
    found: list[tuple[tuple[int, int], float]] = []
    first, sum_ = 0, 0.0
    for task, cost in enumerate(costs):
        if sum_ and sum_ + cost > most:
            found.append(((first, task), sum_))
            first, sum_ = task, 0.0
        sum_ += cost
    return [*found, ((first, len(costs)), sum_)]
