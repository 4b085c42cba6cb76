"""Which tile runs after which position: pure arithmetic, no tensors.

An online convolution has to meet every pair (input i, output j >= i) once, after input i exists and
before output j is read. Base blocks of K positions are summed inside the step, tiles above them begin at
block ends. Radix 2 is the dyadic tiling of Flash Inference (Oncescu et al., ICLR 2025, arXiv 2410.12982),
section 3; higher radices are van der Hoeven's, *Faster relaxed multiplication*; deferred tiles leave each
as many steps as it has outputs to be computed in; docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log

import numpy as np
import sympy


class ScheduleError(ValueError):
    """A schedule misses, repeats or mistimes a pair; the message names the first such pair."""


# Positions that a state of filters with an end can at least go back.
SLACK = 64


@dataclass(frozen=True)
class Tile:
    """Contributions of the positions `inputs` to the later positions `outputs`.

    block: inputs that are transformed together, at least as many as there are outputs; 0: all of them.
    reused: whether a later tile of this side meets the newest block too.
    """

    inputs: range
    outputs: range
    block: int = 0
    reused: bool = False

    @property
    def side(self) -> int:
        """The number of inputs that are transformed together."""
        return self.block or len(self.inputs)

    @property
    def gap(self) -> int:
        """Positions between the inputs and the outputs: a multiple of the side."""
        return self.outputs.start - self.inputs.stop

    @property
    def alone(self) -> bool:
        """Whether it meets one block of inputs, which no later tile of its side meets."""
        return not self.reused and len(self.inputs) == self.side

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Where each block of inputs begins, and how many sides before the outputs."""
        side, first = self.side, self.outputs.start
        return tuple((start, (first - start) // side) for start in self.inputs[::side])

    def __str__(self) -> str:
        i, o = self.inputs, self.outputs
        return f"[{i.start}, {i.stop}) -> [{o.start}, {o.stop})"


@dataclass(frozen=True)
class Schedule:
    """A tiling of positions `origin` ... `capacity - 1` over base blocks of `block`.

    Contributions of positions before `origin` are taken as already added (a prefill's). Blocks are
    aligned to `origin`; the last one may be cut short by the capacity. Pairs inside one block are
    the step's own work; `tiles_after` says what begins between two steps.

    radix: how many blocks of one level make a block of the next; 2 is the dyadic tiling, one block of inputs
    a tile. With more, a tile meets all earlier blocks of the next level's block at once. deferred: the step also
    sums the pairs of neighbouring blocks, and a tile of side S must be done only S positions after it can begin.

    Raises ValueError unless `block >= 1`, `radix >= 2` and `0 <= origin <= capacity`.
    """

    block: int
    capacity: int
    origin: int = 0
    radix: int = 2
    deferred: bool = False

    def __post_init__(self):
        if self.block < 1 or self.radix < 2 or not 0 <= self.origin <= self.capacity:
            raise ValueError(
                f"a schedule needs block >= 1, radix >= 2 and 0 <= origin <= capacity; found block={self.block},"
                f" radix={self.radix}, origin={self.origin}, capacity={self.capacity}"
            )

    @property
    def name(self) -> str:
        """What the tiling is called."""
        tiling = "dyadic" if self.radix == 2 else f"radix-{self.radix}"
        return f"deferred {tiling}" if self.deferred else tiling

    @property
    def overlap(self) -> int:
        """Positions beyond a base block to which the step itself adds the block's contributions."""
        return self.block if self.deferred else 0

    def tiles_after(self, position: int) -> tuple[Tile, ...]:
        """The tiles that begin once the input at `position` exists, in the order in which they are due.

        Each must be done before its first output is read: at once, or for deferred tiles within their side.
        """
        end = position + 1
        blocks, within = divmod(end - self.origin, self.block)
        if within or blocks < 1 or end >= self.capacity:
            return ()
        return tuple(self._deferred(end, blocks)) if self.deferred else (self._tile(end, blocks),)

    def _tile(self, end: int, blocks: int) -> Tile:
        """The newest blocks of the largest level that ends here, before the next one of the same size."""
        unit = 1
        while blocks % (unit * self.radix) == 0:
            unit *= self.radix
        digit, side = blocks // unit % self.radix, self.block * unit
        outputs = range(end, min(end + side, self.capacity))
        reused = digit < self.radix - 1 and end + side < self.capacity
        return Tile(range(end - digit * side, end), outputs, side, reused)

    def _deferred(self, end: int, blocks: int) -> Iterator[Tile]:
        """At each level that ends here: blocks at distance >= 2 of the next but one, whose parents are neighbours."""
        unit = 1
        while blocks % unit == 0:
            side = self.block * unit
            if end + side >= self.capacity:
                return
            target = blocks // unit + 1
            first = self._first_met(target)
            outputs = range(end + side, min(end + 2 * side, self.capacity))
            reused = self._first_met(target + 1) < target - 1 and end + 2 * side < self.capacity
            yield Tile(range(self.origin + first * side, end), outputs, side, reused)
            unit *= self.radix

    def _first_met(self, target: int) -> int:
        """The first block whose parent is the target block's or the one before."""
        return max(0, target // self.radix - 1) * self.radix

    def __iter__(self) -> Iterator[Tile]:
        """All tiles, in the order in which they run."""
        for position in range(self.origin, self.capacity):
            yield from self.tiles_after(position)

    def prove(self) -> None:
        """Check every pair (i, j), origin <= i <= j < capacity, against what `tiles_after` says.

        Each must be met exactly once, by a tile or in the step, not before input i exists and not after output
        j was read; a deferred tile has as many steps as it has outputs. Raises ScheduleError naming the first
        pair that is not.
        Takes O(capacity^2 / block) elementary operations in NumPy and O(capacity) memory.
        """
        _prove_timing(self)
        _prove_cover(self)

    def count_tiles(self, tokens: int | None = None) -> dict[int, int]:
        """How many tiles of each side begin while `tokens` positions pass (default: all of them)."""
        room = self.capacity - self.origin
        tokens = room if tokens is None else tokens
        # The block that ends at the capacity has nobody left to contribute to.
        blocks = max(0, min(tokens, room - 1)) // self.block
        counts = {}
        unit = 1
        while unit <= blocks:
            side = self.block * unit
            if self.deferred:
                count = min(blocks // unit, (room - 1) // side - 1)
            else:
                count = blocks // unit - blocks // (unit * self.radix)
            if count > 0:
                counts[side] = count
            unit *= self.radix
        return counts

    def count_inputs(self) -> dict[int, int]:
        """How many inputs the tiles of each side meet, all together."""
        room, counts = self.capacity - self.origin, {}
        for side, tiles in self.count_tiles().items():
            if self.deferred:
                counts[side] = side * sum(m - self._first_met(m + 1) for m in range(1, tiles + 1))
            else:
                # Tile m of its level meets m modulo the radix blocks.
                whole, rest = divmod((room - 1) // side, self.radix)
                counts[side] = side * (whole * self.radix * (self.radix - 1) + rest * (rest + 1)) // 2
        return counts

    def kept_blocks(self) -> dict[int, int]:
        """How many blocks of inputs of each side are kept at once, at most, for tiles that come later."""
        kept: dict[int, set[int]] = {}
        most: dict[int, int] = {}
        for tile in self:
            starts = [start for start, _ in tile.blocks]
            held = {start for start in kept.get(tile.side, ()) if start >= tile.inputs.start}
            kept[tile.side] = held | set(starts if tile.reused else starts[:-1])
            most[tile.side] = max(most.get(tile.side, 0), len(kept[tile.side]))
        return {side: count for side, count in most.items() if count}

    def cost(self) -> sympy.Expr:
        """Floating-point operations for L = K·R^p positions of C channels: a formula in L, C, K.

        A real transform of n values counts 5/2 n log2 n, a complex product 6, an addition of complex values 2 and
        a multiply-add 2. A tile of side U takes two transforms of 2U values (the filter's spectra are kept), U + 1
        products for each block of inputs, their sum and U additions; the step meets all rows of its block, of
        two where tiles are deferred, at every position.
        """
        return _formula(self.radix, self.deferred)

    def __str__(self) -> str:
        tokens = self.capacity - self.origin
        lines = [
            f"{self.name} schedule: positions {self.origin} ... {self.capacity - 1}, base block {self.block}",
            f"{'side':>10} {'tiles':>10} {'inputs met':>12} {'of all pairs':>13}",
        ]
        pairs = tokens * (tokens + 1) // 2
        tiled, met = dict.fromkeys(self.count_tiles(), 0), self.count_inputs()
        for tile in self:
            tiled[tile.side] += len(tile.inputs) * len(tile.outputs)
        lines.append(_row("in step", tokens, tokens, pairs - sum(tiled.values()), pairs))
        for side, count in self.count_tiles().items():
            lines.append(_row(side, count, met[side], tiled[side], pairs))
        return "\n".join(lines)

    def draw(self) -> str:
        """The triangle of pairs as text, a row per output and a column per input.

        `.` is summed in the step, `a` by the smallest tiles, `b` by those of the next side, ...
        Raises ValueError above 128 positions.
        """
        tokens = self.capacity - self.origin
        if tokens > 128:
            raise ValueError(f"a drawing has at most 128 positions, this schedule has {tokens}")
        rows = [["."] * (j + 1) for j in range(tokens)]
        for tile in self:
            letter = chr(ord("a") + round(log(tile.side / self.block, self.radix)))
            for j in tile.outputs:
                for i in tile.inputs:
                    rows[j - self.origin][i - self.origin] = letter
        return "\n".join("".join(row) for row in rows)


def _row(side: object, tiles: int, inputs: int, pairs: int, of: int) -> str:
    share = pairs / of if of else 0.0
    return f"{side!s:>10} {tiles:>10,} {inputs:>12,} {share:>13.1%}"


@cache
def _formula(radix: int, deferred: bool) -> sympy.Expr:
    length, channels, block = sympy.symbols("L C K", positive=True)
    level = sympy.Symbol("l", integer=True, nonnegative=True)
    side = block * radix**level
    count = length / side
    if deferred:
        # All blocks but the first two are met: by those from the parent's neighbour on to the last but one.
        tiles = count - 2
        inputs = sympy.Rational(3, 2) * (radix - 1) * count - (radix - 1) * (radix + 1)
    else:
        tiles = count * (radix - 1) / radix
        inputs = count * (radix - 1) / 2
    transforms = tiles * 10 * side * (1 + sympy.log(block, 2) + level * sympy.log(radix, 2))
    work = transforms + inputs * 6 * (side + 1) + (inputs - tiles) * 2 * (side + 1) + tiles * side
    levels = sympy.Symbol("p", integer=True, positive=True)
    total = sympy.summation(sympy.expand(work), (level, 0, levels - 1))
    total = total.subs(radix**levels, length / block).subs(levels, sympy.log(length / block, radix))
    return channels * (sympy.expand(total) + 2 * length * block * (2 if deferred else 1))


def _prove_timing(schedule: Schedule) -> None:
    for position in range(schedule.origin, schedule.capacity):
        for tile in schedule.tiles_after(position):
            i, o = tile.inputs, tile.outputs
            if i.step != 1 or o.step != 1 or not len(i) or not len(o):
                raise ScheduleError(f"tile {tile} after position {position} is empty or has gaps")
            if i.start < schedule.origin:
                raise ScheduleError(
                    f"pair ({i.start}, {o.start}): the input lies before the origin"
                    f" {schedule.origin}, its contributions are already in (tile {tile})"
                )
            if i.stop > position + 1:
                raise ScheduleError(
                    f"pair ({max(i.start, position + 1)}, {o.start}): met after position"
                    f" {position}, before its input exists (tile {tile})"
                )
            if o.start <= position:
                raise ScheduleError(
                    f"pair ({i.start}, {o.start}): met after position {position}, when its output"
                    f" had been read (tile {tile})"
                )
            if schedule.deferred and o.start < position + 1 + tile.side:
                raise ScheduleError(
                    f"pair ({i.start}, {o.start}): a deferred tile has {tile.side} positions to be computed in,"
                    f" this one begins after position {position} (tile {tile})"
                )
            if o.stop > schedule.capacity:
                raise ScheduleError(
                    f"pair ({i.start}, {max(o.start, schedule.capacity)}): the output lies beyond"
                    f" the capacity {schedule.capacity} (tile {tile})"
                )


def _prove_cover(schedule: Schedule) -> None:
    """Sweep over the inputs, holding how often each output is met by the current input's tiles."""
    first, capacity = schedule.origin, schedule.capacity
    # Rows change only where a tile's inputs begin or end, and where a base block begins.
    changes: dict[int, list[tuple[range, int]]] = {
        start: [] for start in range(first, capacity, schedule.block)
    }
    for tile in schedule:
        changes.setdefault(tile.inputs.start, []).append((tile.outputs, 1))
        changes.setdefault(tile.inputs.stop, []).append((tile.outputs, -1))
    met = np.zeros(capacity - first, dtype=np.int32)
    for i in sorted(changes):
        for outputs, change in changes[i]:
            met[outputs.start - first : outputs.stop - first] += change
        if i >= capacity:
            break
        block_end = first + ((i - first) // schedule.block + 1) * schedule.block + schedule.overlap
        block_end = min(block_end, capacity)
        wanted = np.zeros_like(met)
        wanted[block_end - first :] = 1
        wrong = np.flatnonzero(met != wanted)
        if len(wrong):
            j = int(wrong[0]) + first
            times = int(met[wrong[0]]) + (i <= j < block_end)
            raise ScheduleError(f"pair ({i}, {j}): met {times} times instead of once")


def window_size(reach: int, block: int) -> int:
    """The capacity of a bank for endless sequences whose filters reach `reach` lags: two halves of K·2^m positions."""
    half = block
    while half < reach + SLACK - 1:
        half *= 2
    return 2 * half
