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
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("tile_lanes.cpp")
SMALLEST = 16  # inputs of a tile
# Values below which a second thread is not worth waking.
_SHARED = 1 << 15

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
        code, names = ctypes.CDLL(str(library)), {torch.float32: "float", torch.float64: "double"}

        def functions(name: str, *arguments: Any) -> dict[torch.dtype, Any]:
            found = {dtype: getattr(code, f"{name}_{suffix}") for dtype, suffix in names.items()}
            for function in found.values():
                function.argtypes, function.restype = arguments, None
            return found

        self.run = functions("add_tile", _Pointer)
        self.run_tasks = functions("run_tasks", _Pointer, _Int, _Int, _Int)
        self._move = functions("move_block", _Pointer, _Int)
        self._make = functions("make_spectra", _Pointer, _Pointer, _Int, _Int, _Int)
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
        make = self._make[filters.dtype]
        make(made.data_ptr(), ctypes.addressof(given), len(filters), side, _threads(filters.numel()))
        return made

    def tile(
        self,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        blocks: Sequence[tuple[int, Tensor]],
        source: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> TileCall:
        """What adds to `outputs` [B, Cout, V <= side] what blocks of `side` inputs contribute.

        inputs: [B, Cin, ...], positions contiguous in both; blocks: where each begins there, and the spectra for its
        distance; source: int64 [Cout] or None (see `channels`). shared: int64 [groups], the one filter that all
        channels of a group of lanes have, and spectra as `one_by_one` lays them; or None. Nothing is checked.
        """
        call = TileCall(self, outputs, inputs, side, [start for start, _ in blocks], source, shared)
        call.meets([spectra for _, spectra in blocks])
        return call

    def tile_once(
        self,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        start: int,
        distance: int,
        filters: Tensor,
        source: Tensor | None = None,
    ) -> TileCall:
        """The same for one block and spectra that are not worth keeping, of filters [Cout, T]."""
        call = TileCall(self, outputs, inputs, side, [start], source, None)
        call.given.fresh = _filters(filters, distance)
        return call

    def work_shape(self, side: int, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of the memory that a tile in parts needs: for the sum, and for the next block."""
        return 2, 2 * side, self._lanes[dtype]

    def move(self, rows: Tensor, columns: Tensor, into_columns: bool) -> None:
        """Copy a block [K, B, C], channels contiguous, into columns [B, C, K], positions contiguous; or back."""
        positions, batch, channels = rows.shape
        block = _Block(
            rows.data_ptr(), rows.stride(0), rows.stride(1),
            columns.data_ptr(), columns.stride(0), columns.stride(1),
            positions, batch, channels, _threads(rows.numel()),
        )  # fmt: skip
        self._move[rows.dtype](ctypes.addressof(block), into_columns)


class TileCall:
    """A tile of certain tensors, to be run at once or bit by bit; see :meth:`Lanes.tile`."""

    def __init__(
        self,
        code: Lanes,
        outputs: Tensor,
        inputs: Tensor,
        side: int,
        starts: Sequence[int],
        source: Tensor | None,
        shared: Tensor | None,
    ) -> None:
        batch, self._channels, length = outputs.shape
        begins = (_Int * len(starts))(*starts)
        self.given = _Tile(
            inputs.data_ptr(), inputs.stride(0), inputs.stride(1),
            outputs.data_ptr(), outputs.stride(0), outputs.stride(1),
            None if source is None else source.data_ptr(),
            None if shared is None else shared.data_ptr(),
            batch, 0, self._channels, side, length,
            len(starts), ctypes.addressof(begins),
        )  # fmt: skip
        self._code, self._dtype = code, outputs.dtype
        self._pointed: list[Any] = [outputs, inputs, begins, source, shared]
        self._address = ctypes.addressof(self.given)

    def meets(self, spectra: Sequence[Tensor]) -> None:
        """The filters' spectra, for each block of inputs."""
        pointers = (_Pointer * len(spectra))(*(block.data_ptr() for block in spectra))
        self.given.spectra = ctypes.addressof(pointers)
        self._pointed += [pointers, *spectra]

    def add(self, channels: tuple[int, int] | None = None) -> None:
        """Run it for all output channels, or a range of them that begins at a multiple of the lanes."""
        given = self.given
        given.first, given.last = channels or (0, self._channels)
        given.threads = _threads(given.batch * (given.last - given.first) * given.side)
        self._code.run[self._dtype](self._address)

    def add_part(
        self, row: int, channels: tuple[int, int], tasks: tuple[int, int], grain: int, work: Tensor
    ) -> None:
        """A range of the tasks that are the same for one row and one group of lanes, see `task_costs`.

        channels: the group's; work: what `Lanes.work_shape` says, between the parts of one tile its own.
        """
        given = self.given
        given.first, given.last = channels
        given.grain, given.work = grain, work.data_ptr()
        self._code.run_tasks[self._dtype](self._address, row, *tasks)


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
