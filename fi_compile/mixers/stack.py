"""The long convolutions of all layers as one stack of channels, and their state while decoding.

Tiles read inputs up to a position and write outputs beyond it, so one launch serves the channels of
every layer: the across-layer parallelism of Flash Inference (arXiv 2410.12982, section 3.2). Only
the sum inside the current base block belongs to the step, which lives in a compiled graph.
"""

from __future__ import annotations

from collections import Counter
from math import log2

import torch
from torch import Tensor

from fi_compile.kernels.block import block_table
from fi_compile.kernels.prefix import write_prefix
from fi_compile.mixers.tiles import TILES, KeptSpectra, TileWork
from fi_compile.schedule import SLACK, Schedule, Tile

from .flight import Flight
from .pairs import count_pairs


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of `dtype` keeps its state: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Values below which a piece of a tile costs its calls, and operations per value of a piece, about.
_SMALLEST_PIECE = 1 << 12
_PIECE_OPERATIONS = 90


class FilterBank:
    """The filters of a stack at one capacity: immutable, a copy of what it was given.

    filters: [F, capacity], float32 or float64, lag 0 first. source: int64 [Cout], the input channel
    of each output channel; None where they are the same. filter_index: int64 [Cout], the filter of
    each output channel; None where each has its own. block: the base block K. target: int64 [P], ascending, where
    output channels read several inputs each: `source` and `filter_index` then count pairs, and pair p belongs to
    output channel `target[p]`; None where a pair is an output channel. kernels: `torch` or `triton`, what
    runs the tiles (see `tiles`).

    reach: the number of lags from the first to the last that is not zero, where a sequence may go on beyond the
    capacity; None where it ends there. A state then drops inputs that no filter reaches any more, and keeps
    capacity // 2 >= reach + SLACK - 1 at least.

    radix, deferred: the tiling, see `Schedule`. Where tiles are deferred a step sums two base blocks of K/2 positions,
    K even, the current one and the one before.

    block_table [2K, P] is what `kernels.block.block_sum` reads; skip [P] is lag 0. Raises
    ValueError for shapes, indices or dtypes that do not fit together.
    """

    def __init__(
        self,
        filters: Tensor,
        source: Tensor | None = None,
        filter_index: Tensor | None = None,
        target: Tensor | None = None,
        *,
        channels_in: int,
        block: int,
        reach: int | None = None,
        kernels: str = "torch",
        radix: int = 2,
        deferred: bool = False,
    ):
        if filters.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"filters are float32 or float64, found {filters.dtype}")
        if filters.ndim != 2 or filters.shape[1] < 1:
            raise ValueError(f"filters are [F, capacity], found {list(filters.shape)}")
        if block < 1:
            raise ValueError(f"a base block has at least one position, found {block}")
        if deferred and (block % 2 or kernels != "torch"):
            raise ValueError(f"deferred tiles need two equal blocks and torch's kernels, found {block}, {kernels}")
        pairs = count_pairs(source, filter_index, channels_in, filters.shape[0])
        if target is not None and (target.numel() != pairs or bool((target.diff() < 0).any())):
            raise ValueError(
                f"target is ascending, one value for each of {pairs} pairs; found {target.numel()}"
            )
        # Ordinary tensors of our own, also under inference mode: they outlive the call.
        with torch.inference_mode(False), torch.no_grad():
            self.filters = filters.detach().clone(memory_format=torch.contiguous_format)
            self.source = None if source is None else source.detach().clone()
            self.filter_index = None if filter_index is None else filter_index.detach().clone()
            self.target = None if target is None else target.detach().clone()
            self.block_table = block_table(self.filters, block, self.filter_index)
            lag0 = self.filters[:, 0]
            index = self.filter_index
            self.skip = lag0.clone() if index is None else lag0.index_select(0, index)
        self.channels_in = channels_in
        self.channels_out = pairs if target is None else int(target[-1]) + 1
        self.block = block
        self.hop = block // 2 if deferred else block
        self.reach = reach
        if reach is not None and (self.capacity // 2 < reach + SLACK - 1 or self.capacity % (2 * block)):
            raise ValueError(
                f"filters that reach {reach} lags need a capacity of two halves, each of whole blocks and"
                f" of {reach + SLACK - 1} positions or more; found {self.capacity}"
            )
        chosen = kernels if target is None else "torch"  # the Triton kernels know no pairs
        self.tiles = TILES[chosen](self.filters, self.source, self.filter_index, self.target)
        self.radix = 2 if chosen == "triton" else radix  # those kernels serve one block of inputs a tile
        self.deferred = deferred

    @property
    def capacity(self) -> int:
        """The number of positions the filters reach."""
        return self.filters.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of filters and state."""
        return self.filters.dtype

    def schedule(self, origin: int) -> Schedule:
        """The tiling of the positions from `origin` on."""
        return Schedule(self.hop, self.capacity, origin, self.radix, self.deferred)

    @property
    def in_place(self) -> bool:
        """Whether inputs and what is pending of outputs can share memory: each channel has one of both."""
        return self.source is None and self.target is None and self.channels_in == self.channels_out

    def piece(self, batch: int) -> int:
        """Values of a transform that a piece of a deferred tile works on: about half of a position's work."""
        channels, side, work = self.channels_out * batch, self.hop, 0.0
        while 2 * side < self.capacity:
            work += 10 * log2(2 * side) + 12 * (self.radix - 1)
            side *= self.radix
        return max(_SMALLEST_PIECE, int(channels * work / _PIECE_OPERATIONS))

    @property
    def nbytes(self) -> int:
        """Bytes of filters, tables and what the tiles have made of them so far."""
        tensors = [self.filters, self.block_table, self.skip]
        tensors += [t for t in (self.source, self.filter_index, self.target) if t is not None]
        return sum(t.nbytes for t in tensors) + self.tiles.nbytes

    def add_tile(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> None:
        """Add to pending [B, Cout, capacity] what a tile's inputs in history contribute."""
        self.tiles.add(tile, history, pending, kept)

    def begin_tile(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> TileWork:
        """The same in pieces, none of which has run yet."""
        return TileWork(self.tiles, tile, history, pending, kept, self.piece(history.shape[0]))

    def write_prefix(self, history: Tensor, pending: Tensor, length: int) -> None:
        """Make pending[..., length:] what the first `length` inputs contribute, and no more."""
        inputs, outputs = history[:, :, :length], pending[:, :, length:]
        write_prefix(outputs, inputs, self.filters, self.source, self.filter_index, self.target)


class ConvState:
    """What a stack keeps of `batch` sequences in lockstep.

    history [B, Cin, capacity]: inputs before the current base block, zero or unread beyond.
    pending [B, Cout, capacity]: what positions before the block contribute to those from it on. Where each channel has
    one of both they are one tensor: a position's pending output is in `block_pending` when its input arrives.
    block_inputs [K, B, Cin], block_pending [K, B, Cout]: the current block, position-major; with deferred tiles the
    block before it too.
    `position` is the next one to be computed, `origin` where the schedule was last restarted. Both, and all positions
    here, count from `dropped`: where the bank says how far filters reach, a state that is full drops its oldest inputs
    and restarts, and so goes on for ever.

    A step at `position` computes, with j = `local`,
    `block_pending[j] + block_sum(block_inputs, table, j, source) + skip * input`, writes its input
    to `block_inputs[j]`, and then calls `advance()`.

    Mutating methods clear `consistent` while they work. Interrupted in between they leave it
    cleared, `advance` refuses, and `restart(position)` repairs: no input is dropped from
    `block_inputs` before `history` has it. `tiles_run` counts the tiles of this object by side,
    `positions_tiled` the inputs that passed through them.
    """

    def __init__(self, bank: FilterBank, batch: int):
        if batch < 1:
            raise ValueError(f"a state has at least one row, found {batch}")
        self.bank = bank
        block = bank.block
        with torch.inference_mode(False):
            self.history = bank.tiles.new_state(batch, bank.channels_in)
            self.pending = self.history if bank.in_place else bank.tiles.new_state(batch, bank.channels_out)
            new = bank.filters.new_zeros
            self.block_inputs = new(block, batch, bank.channels_in)
            self.block_pending = new(block, batch, bank.channels_out)
        self.position = 0
        self.dropped = 0
        self.consistent = True
        self.tiles_run: Counter[int] = Counter()
        self.positions_tiled = 0
        self._kept, self._flight = KeptSpectra(), Flight()
        self._begin_schedule(0)
        # history is valid below this position; block_inputs holds the inputs from here on.
        self._flushed = 0

    def _begin_schedule(self, origin: int) -> None:
        self.schedule = self.bank.schedule(origin)
        self.origin = origin
        # Of the row 0 of the block's buffers, and where the current block ends.
        self._block_start, self._block_end = origin, origin + self.bank.hop

    @property
    def batch(self) -> int:
        """The number of rows, B."""
        return self.history.shape[0]

    @property
    def capacity(self) -> int:
        """The number of positions there is room for."""
        return self.bank.capacity

    @property
    def local(self) -> int:
        """The row of the block's buffers that the position has, 0 ... K - 1."""
        return self.position - self._block_start

    @property
    def nbytes(self) -> int:
        """Bytes of the state's tensors and of the spectra it keeps; the bank's are its own."""
        return sum(t.nbytes for t in self._tensors()) + self._kept.nbytes

    def _tensors(self) -> tuple[Tensor, ...]:
        large = (self.history,) if self.pending is self.history else (self.history, self.pending)
        return *large, self.block_inputs, self.block_pending

    @property
    def operations(self) -> float:
        """Floating-point operations that pieces of deferred tiles have taken so far."""
        return self._flight.operations

    def advance(self) -> None:
        """The step at `position` is done: go on, and at the end of a block run its tiles.

        Raises IndexError at the capacity, RuntimeError where the state is not consistent.
        """
        position = self.position + 1
        if position > self.bank.capacity or not self.consistent:
            self._refuse()
        if position >= self._block_end:
            self._end_block(position)
        elif self.bank.deferred:
            self._advance_flight(position)
        else:
            self.position = position

    def _refuse(self) -> None:
        if not self.consistent:
            raise RuntimeError("an earlier change to this state did not finish; restart(position) repairs it")
        raise IndexError(f"the capacity of {self.bank.capacity} positions is used up; grow the state")

    @torch.no_grad()
    def _advance_flight(self, position: int) -> None:
        self.consistent = False
        self._flight.advance()
        self.position = position
        self.consistent = True

    @torch.no_grad()
    def _end_block(self, end: int) -> None:
        self.consistent = False
        self._flush(end)
        if self.bank.reach is not None and end + self.bank.hop > self.capacity:
            self._drop(end)
            return
        self._flight.finish(end)
        for tile in self.schedule.tiles_after(end - 1):
            if tile.gap:
                self._flight.launch(self.bank.begin_tile(tile, self.history, self.pending, self._kept))
            else:
                self.bank.add_tile(tile, self.history, self.pending, self._kept)
            self.tiles_run[tile.side] += 1
            self.positions_tiled += tile.side
        self._flight.advance()
        self.position = end
        self._next_block(end)
        self.consistent = True

    def _next_block(self, start: int) -> None:
        """Go on to the block that begins at `start`; with deferred tiles the one before it stays."""
        hop = self.bank.hop
        self._block_end = start + hop
        if not self.bank.deferred:
            self._block_start = start
            self._load_block()
        elif start - self._block_start == self.bank.block:
            self._block_start = start - hop
            for rows in (self.block_inputs, self.block_pending):
                rows[:hop] = rows[hop:]
            self._load_block(hop)

    def _drop(self, end: int) -> None:
        """Keep only the newest half of the inputs, and restart after it."""
        half = self.capacity // 2
        self.history[:, :, :half] = self.history[:, :, end - half : end].clone()
        self.dropped += end - half
        self.position = self._flushed = half
        self.restart(half)

    def _load_block(self, row: int = 0) -> None:
        """From `row` of the block's buffers on: the positions' pending outputs, no inputs yet."""
        pending = self.pending[:, :, self._block_start + row : self._block_start + self.bank.block]
        if pending.stride(2) == 1:
            # Compact first: transposing out of rows a capacity apart misses the cache at every value.
            pending = pending.contiguous()
        self.block_pending[row : row + pending.shape[2]] = pending.permute(2, 0, 1)
        # Later rows weigh nothing in a block's sum, but nothing times infinity is NaN.
        self.block_inputs[row:] = 0

    def _flush(self, end: int) -> None:
        start = self._flushed
        if start < end:
            rows = self.block_inputs[start - self._block_start : end - self._block_start]
            self.history[:, :, start:end] = rows.permute(1, 2, 0)
            self._flushed = end

    @torch.no_grad()
    def flush(self) -> None:
        """Bring the current block's inputs so far into `history`; they stay in `block_inputs`."""
        self._flush(self.position)

    @torch.no_grad()
    def write_history(self, inputs: Tensor, start: int = 0) -> None:
        """Make `inputs` [B, Cin, P] those of positions start ... start + P - 1; then `restart`.

        Positions before `start` must exist. The state is not consistent until `restart`. Raises
        ValueError where the shape does not fit or the capacity is passed.
        """
        stop = start + inputs.shape[-1]
        if inputs.shape[:-1] != self.history.shape[:-1] or stop > self.capacity:
            raise ValueError(
                f"inputs of shape {list(inputs.shape)} at position {start} do not fit a history of"
                f" shape {list(self.history.shape)}"
            )
        self._check_reached(start)
        self.flush()
        self.consistent = False
        self.position = start
        self._flushed = start
        self.history[:, :, start:stop] = inputs
        self._flushed = stop

    def _check_reached(self, position: int) -> None:
        reached = max(self.position, self._flushed)
        if not 0 <= position <= reached:
            raise ValueError(f"position {position} is outside 0 ... {reached}, what has been seen")

    @torch.no_grad()
    def restart(self, position: int) -> None:
        """Begin the schedule anew at `position` from the inputs before it, by one FFT.

        The same for prefill, rewind, growth and repair. Positions up to `position` must have been
        stepped through or written; raises ValueError otherwise.
        """
        self._check_reached(position)
        if self._flushed < position:
            self._flush(position)
        self.consistent = False
        self._kept.clear()
        self._flight.clear()
        if self.bank.reach is not None and position + self.bank.hop > self.capacity:
            self._drop(position)
            return
        # In this order: whatever lies below the larger of the two is in history, at every moment.
        self.position = position
        self._flushed = position
        self._begin_schedule(position)
        if not self.bank.in_place:
            self.history[:, :, position:] = 0
        self.bank.write_prefix(self.history, self.pending, position)
        self._load_block()
        self.consistent = True

    def fill(self, inputs: Tensor) -> None:
        """Take over the inputs [B, Cin, P] of a sequence's first P positions."""
        length, half = inputs.shape[-1], self.capacity // 2
        self.position = self._flushed = 0
        self.dropped = 0 if self.bank.reach is None else max(0, length // half - 1) * half
        self.write_history(inputs[:, :, self.dropped :])
        self.restart(length - self.dropped)

    def can_rewind(self, position: int) -> bool:
        """Whether all inputs are kept that outputs from a position of the sequence on depend on."""
        reach = self.bank.reach
        return (
            not self.dropped or position == 0 or (reach is not None and position - self.dropped >= reach - 1)
        )

    def rewind_sequence(self, position: int) -> None:
        """Back to a position of the sequence to which `can_rewind`."""
        if position == 0:
            self.dropped = 0
        self.rewind(position - self.dropped)

    def rewind(self, position: int) -> None:
        """Back to `position`: inside the current block at no cost, else by `restart`."""
        if self.consistent and self._block_end - self.bank.hop <= position <= self.position:
            self.consistent = False
            self._flushed = min(self._flushed, position)
            self.position = position
            self.block_inputs[position - self._block_start :] = 0
            self.consistent = True
        else:
            self.restart(position)

    @torch.no_grad()
    def grow(self, bank: FilterBank) -> ConvState:
        """A new state for a bank of other filters or capacity, restarted at this position.

        Raises ValueError where the bank has other input channels, dtype or too little capacity,
        RuntimeError where the state is not consistent.
        """
        if not self.consistent:
            self._refuse()
        if (bank.channels_in, bank.dtype) != (self.bank.channels_in, self.bank.dtype):
            raise ValueError(
                f"a bank of {bank.channels_in} input channels in {bank.dtype} cannot take over"
                f" {self.bank.channels_in} channels in {self.bank.dtype}"
            )
        self.flush()
        if self.dropped and (bank.reach, bank.capacity) != (self.bank.reach, self.capacity):
            raise ValueError(
                f"filters that reach {bank.reach} lags need inputs that a state for {self.bank.reach} has dropped"
            )
        grown = ConvState(bank, self.batch)
        grown.fill(self.history[:, :, : self.position])
        grown.dropped += self.dropped
        return grown

    def clone(self) -> ConvState:
        """An independent copy that shares the bank; its counters begin at zero."""
        return self.select_rows(torch.arange(self.batch, device=self.history.device))

    def _settle(self) -> None:
        self.consistent = False
        self._flight.finish()
        self.consistent = True

    @torch.no_grad()
    def select_rows(self, index: Tensor) -> ConvState:
        """A new state of rows `index` (int64 [B'], repeats allowed); its counters begin at zero.

        Raises RuntimeError where the state is not consistent.
        """
        if not self.consistent:
            self._refuse()
        # What is under way goes into pending outputs, as it would later.
        self._settle()
        new = ConvState.__new__(ConvState)
        with torch.inference_mode(False):
            new.history = self.bank.tiles.select_rows(self.history, index)
            new.pending = (
                new.history if self.bank.in_place else self.bank.tiles.select_rows(self.pending, index)
            )
            new.block_inputs = self.block_inputs.index_select(1, index)
            new.block_pending = self.block_pending.index_select(1, index)
        new.bank, new.position, new.consistent = self.bank, self.position, True
        new.tiles_run, new.positions_tiled = Counter(), 0
        new.dropped = self.dropped
        new.schedule, new.origin = self.schedule, self.origin
        new._block_start, new._block_end, new._flushed = self._block_start, self._block_end, self._flushed
        new._kept, new._flight = KeptSpectra(), Flight()
        return new
