"""The long convolutions of all layers as one stack of channels, and their state while decoding.

Tiles read inputs up to a position and write outputs beyond it, so one launch serves the channels of
every layer: the across-layer parallelism of Flash Inference (arXiv 2410.12982, section 3.2). Only
the sum inside the current base block belongs to the step, which lives in a compiled graph.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .bank import FilterBank, state_dtype
from .flight import Flight
from .tile_work import KeptSpectra

__all__ = ["ConvState", "FilterBank", "state_dtype"]


class ConvState:
    """What a stack keeps of `batch` sequences in lockstep.

    history [B, Cin, capacity]: inputs before the current base block, zero or unread beyond.
    pending [B, Cout, capacity]: what positions before the block contribute to those from it on. Where each channel has
    one of both they are one tensor: a position's pending output is in `block_pending` when its input arrives.
    block_inputs [K, B, Cin], block_pending [K, B, Cout]: the current block, position-major; with deferred tiles the
    block before it too.
    `position` is the next one to be computed, `origin` where the schedule was last restarted. Both, and all positions
    here, count from `dropped`: where the bank says how far filters reach, a state that is full drops its oldest inputs
    and restarts, and so goes on for ever. Where the bank keeps no history, a full state gives up all of its inputs once
    what they contribute to the rest of the sequence is pending.

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
        self._limit = (
            min(self.capacity, self.bank.total - self.dropped) if self.bank.halved else self.capacity
        )
        # Of the row 0 of the block's buffers, and where the current block ends.
        self._block_start, self._block_end = origin, self._end_of_block(origin)

    def _end_of_block(self, start: int) -> int:
        """Where a block ends: early at the half where inputs are given up."""
        end = start + self.bank.hop
        return min(end, self.capacity) if self.bank.halved and not self.dropped else end

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
    def large_bytes(self) -> int:
        """Bytes of everything but the current block."""
        return self.nbytes - self.block_inputs.nbytes - self.block_pending.nbytes

    @property
    def operations(self) -> float:
        """Floating-point operations that pieces of deferred tiles have taken so far."""
        return self._flight.operations

    def advance(self) -> None:
        """The step at `position` is done: go on, and at the end of a block run its tiles.

        Raises IndexError at the capacity, RuntimeError where the state is not consistent.
        """
        position = self.position + 1
        if position > self._limit or not self.consistent:
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
        if self.bank.halved and end == self.capacity and not self.dropped:
            self._begin_rest(self.history, end)
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
        self._block_end = self._end_of_block(start)
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

    def _begin_rest(self, inputs: Tensor, length: int) -> None:
        """Give up the inputs [B, Cin, P] of the first P positions for what they contribute to all others."""
        self.consistent = False
        self._kept.clear()
        self.bank.write_rest(inputs, self.pending)
        if not self.bank.in_place:
            self.history.zero_()
        self.dropped, self.position, self._flushed = length, 0, 0
        self._begin_schedule(0)
        self._load_block()
        self.consistent = True

    def _load_block(self, row: int = 0) -> None:
        """From `row` of the block's buffers on: the positions' pending outputs, no inputs yet."""
        pending = self.pending[:, :, self._block_start + row : self._block_start + self.bank.block]
        self.bank.tiles.read_columns(self.block_pending[row : row + pending.shape[2]], pending)
        # Later rows weigh nothing in a block's sum, but nothing times infinity is NaN.
        self.block_inputs[row:] = 0

    def _flush(self, end: int) -> None:
        start = self._flushed
        if start < end:
            rows = self.block_inputs[start - self._block_start : end - self._block_start]
            self.bank.tiles.write_columns(self.history[:, :, start:end], rows)
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
        if self.bank.halved and self.dropped:
            raise RuntimeError("the inputs of the first half were given up: fill a new state")
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
        if self.bank.halved and length >= self.capacity:
            self._begin_rest(inputs, length)
            return
        self.position = self._flushed = 0
        self.dropped = 0 if self.bank.reach is None else max(0, length // half - 1) * half
        self.write_history(inputs[:, :, self.dropped :])
        self.restart(length - self.dropped)

    @property
    def _first(self) -> int:
        """Where the current block begins."""
        return max(self._block_start, self._block_end - self.bank.hop)

    def can_rewind(self, position: int) -> bool:
        """Whether all inputs are kept that outputs from a position of the sequence on depend on."""
        reach = self.bank.reach
        if self.bank.halved and self.dropped:
            return self.consistent and self._first <= position - self.dropped <= self.position
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
        if self.consistent and self._first <= position <= self.position:
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
        new.schedule, new.origin, new._limit = self.schedule, self.origin, self._limit
        new._block_start, new._block_end, new._flushed = self._block_start, self._block_end, self._flushed
        new._kept, new._flight = KeptSpectra(), Flight()
        return new
