"""A tile on the CPU: transforms across SIMD lanes, each lane a channel, from rows of the state and back in one call.

`tile_lanes.cpp` is compiled for the processor it runs on and loaded here; the reference and torch's form are in `tile`.
The transforms are the radix-2 decimations of Cooley and Tukey (1965), two passes in one; two halves that are zero, or
not asked for, are left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import log, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("tile_lanes.cpp")
SMALLEST = 16  # inputs of a tile
# Values below which a second thread is not worth waking.
_SHARED = 1 << 17

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class _Filters(ctypes.Structure):
    _fields_ = [("filters", _Pointer), ("stride", _Int), ("lags", _Int), ("distance", _Int)]


class _Tile(ctypes.Structure):
    _fields_ = [
        ("inputs", _Pointer), ("inputs_row", _Int), ("inputs_channel", _Int),
        ("outputs", _Pointer), ("outputs_row", _Int), ("outputs_channel", _Int),
        ("source", _Pointer), ("shared", _Pointer),
        ("batch", _Int), ("first", _Int), ("last", _Int),
        ("side", _Int), ("length", _Int),
        ("blocks", _Int), ("starts", _Pointer), ("spectra", _Pointer), ("fresh", _Filters),
        ("threads", _Int), ("grain", _Int), ("work", _Pointer),
    ]  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = [
        ("rows", _Pointer), ("rows_position", _Int), ("rows_batch", _Int),
        ("columns", _Pointer), ("columns_batch", _Int), ("columns_channel", _Int),
        ("positions", _Int), ("batch", _Int), ("channels", _Int),
        ("threads", _Int),
    ]  # fmt: skip


class Lanes:
    """The compiled form.

    library: a file that `tile_lanes.cpp` was compiled to. Raises OSError where it cannot be loaded.
    """

    def __init__(self, library: Path) -> None:
        code = ctypes.CDLL(str(library))
        names = {torch.float32: "float", torch.float64: "double"}
        self._tasks = {dtype: getattr(code, f"run_tasks_{name}") for dtype, name in names.items()}
        self._add = {dtype: getattr(code, f"add_tile_{name}") for dtype, name in names.items()}
        self._make = {dtype: getattr(code, f"make_spectra_{name}") for dtype, name in names.items()}
        self._move = {dtype: getattr(code, f"move_block_{name}") for dtype, name in names.items()}
        self._lanes = {dtype: int(code.lanes(dtype.itemsize)) for dtype in names}

    def serves(self, side: int) -> bool:
        """Whether there are tiles of `side` inputs: a power of two, `SMALLEST` or more."""
        return side >= SMALLEST and side & (side - 1) == 0

    def lanes(self, dtype: torch.dtype) -> int:
        """Channels that one group of lanes holds."""
        return self._lanes[dtype]

    def spectra_shape(self, filters: int, side: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
        """Of the spectra of so many filters: [groups, side / 2 + 1, even and odd lags, real and imaginary, lanes]."""
        lanes = self._lanes[dtype]
        return -(-filters // lanes), side // 2 + 1, 2, 2, lanes

    def spectra(self, filters: Tensor, side: int, distance: int = 1) -> Tensor:
        """What tiles of `side` inputs, `distance` sides before their outputs, read of filters [F, T].

        Lags (distance - 1) · side ... (distance + 1) · side - 1; those beyond T count as zero. A frequency's partner is
        met with it, so that half of them are kept, in the order in which the transform leaves them.
        """
        made = filters.new_empty(self.spectra_shape(len(filters), side, filters.dtype))
        given = _filters(filters, distance)
        self._make[filters.dtype](
            _Pointer(made.data_ptr()),
            ctypes.byref(given),
            _Int(len(filters)),
            _Int(side),
            _Int(_threads(filters.numel())),
        )
        return made

    def add(
        self,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        blocks: Sequence[tuple[int, Tensor]],
        source: Tensor | None = None,
        channels: tuple[int, int] | None = None,
        shared: Tensor | None = None,
    ) -> None:
        """Add to `outputs` [B, Cout, V <= side] what blocks of `side` inputs contribute.

        inputs: [B, Cin, ...], positions contiguous in both; blocks: where each begins there, and the spectra for its
        distance; source: int64 [Cout] or None (see `channels`). channels: the range of output channels that is
        computed, from a multiple of `lanes` on; all where it is None. shared: int64 [groups], the one
        filter that all channels of a group of lanes have, and spectra as `one_by_one` lays them; or None. Nothing is
        checked.
        """
        tile = _tile(outputs, inputs, side, blocks, source, channels, shared)
        self._add[outputs.dtype](ctypes.byref(tile.given))

    def add_part(
        self,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        blocks: Sequence[tuple[int, Tensor]],
        source: Tensor | None,
        channels: tuple[int, int],
        shared: Tensor | None,
        row: int,
        tasks: tuple[int, int],
        grain: int,
        work: Tensor,
    ) -> None:
        """A range of the tasks that are the same for one row and one group of lanes, see `task_costs`.

        channels: the group's; work: what `work_shape` says, between the parts of one tile its own.
        """
        tile = _tile(outputs, inputs, side, blocks, source, channels, shared)
        tile.given.grain, tile.given.work = grain, work.data_ptr()
        self._tasks[outputs.dtype](ctypes.byref(tile.given), _Int(row), _Int(tasks[0]), _Int(tasks[1]))

    def work_shape(self, side: int, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of the memory that a tile in parts needs: for the sum, and for the next block."""
        return 2, 2 * side, self._lanes[dtype]

    def add_once(
        self,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        start: int,
        distance: int,
        filters: Tensor,
        source: Tensor | None = None,
        channels: tuple[int, int] | None = None,
    ) -> None:
        """The same for one block and spectra that are not worth keeping, of filters [Cout, T]."""
        tile = _tile(outputs, inputs, side, [(start, None)], source, channels, None)
        tile.given.fresh = _filters(filters, distance)
        self._add[outputs.dtype](ctypes.byref(tile.given))

    def move(self, rows: Tensor, columns: Tensor, into_columns: bool) -> None:
        """Copy a block [K, B, C], channels contiguous, into columns [B, C, K], positions contiguous; or back."""
        positions, batch, channels = rows.shape
        block = _Block(
            rows.data_ptr(), rows.stride(0), rows.stride(1),
            columns.data_ptr(), columns.stride(0), columns.stride(1),
            positions, batch, channels, _threads(rows.numel()),
        )  # fmt: skip
        self._move[rows.dtype](ctypes.byref(block), _Int(into_columns))


class _Given(NamedTuple):
    """What C++ reads, and what it points to."""

    given: _Tile
    pointed: tuple[Any, ...]


def _tile(
    outputs: Tensor,
    inputs: Tensor,
    side: int,
    blocks: Sequence[tuple[int, Tensor | None]],
    source: Tensor | None,
    channels: tuple[int, int] | None,
    shared: Tensor | None,
) -> _Given:
    batch, every, length = outputs.shape
    first, last = channels or (0, every)
    starts = (_Int * len(blocks))(*(start for start, _ in blocks))
    known = [spectra.data_ptr() for _, spectra in blocks if spectra is not None]
    spectra = (_Pointer * len(known))(*known)
    given = _Tile(
        inputs.data_ptr(), inputs.stride(0), inputs.stride(1),
        outputs.data_ptr(), outputs.stride(0), outputs.stride(1),
        None if source is None else source.data_ptr(),
        None if shared is None else shared.data_ptr(),
        batch, first, last, side, length,
        len(blocks), ctypes.addressof(starts), ctypes.addressof(spectra) if known else None, _Filters(),
        _threads(batch * (last - first) * side),
    )  # fmt: skip
    return _Given(given, (starts, spectra))


def grain_of(side: int, values: float) -> int:
    """The largest part of a tile, side / 4^k with k >= 1, of so many values at most; the least there is."""
    grain = side // 4
    while grain > values and grain >= 4 * SMALLEST:
        grain //= 4
    return grain


def task_costs(side: int, blocks: int, grain: int) -> list[float]:
    """Floating-point operations of a channel in each task of a tile in parts, in the order in which they run.

    In every stage there are side / grain: for each block of inputs passes down to parts of `grain` values, these parts,
    the product; then the parts and the passes of the way back.
    """
    levels, each = round(log(side / grain, 4)), side // grain
    passes, part, product = 8.5 * grain, 4.25 * grain * log2(grain), 14.0 * grain
    stages = blocks * [*levels * [passes], part, product] + [part, *levels * [passes]]
    return [cost for cost in stages for _ in range(each)]


def one_by_one(spectra: Tensor, filters: int) -> Tensor:
    """Spectra of groups of lanes as those of one filter after the other: [F, side / 2 + 1, 2, 2]."""
    groups, pairs, lanes = spectra.shape[0], spectra.shape[1], spectra.shape[-1]
    return spectra.permute(0, 4, 1, 2, 3).reshape(groups * lanes, pairs, 2, 2)[:filters].contiguous()


def _filters(filters: Tensor, distance: int) -> _Filters:
    return _Filters(filters.data_ptr(), filters.stride(0), filters.shape[1], distance)


def _threads(values: int) -> int:
    return torch.get_num_threads() if values >= _SHARED else 1
