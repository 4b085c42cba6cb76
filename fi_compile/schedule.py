"""Which tile runs after which position: pure arithmetic, no tensors.

An online convolution has to meet every pair (input i, output j >= i) once, after input i exists and
before output j is read. The dyadic schedule does so with O(L log L) traffic: base blocks of K
positions are summed inside the step, square tiles above them run at block ends. Source: Flash
Inference (Oncescu et al., ICLR 2025, arXiv 2410.12982), section 3; docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import sympy


class ScheduleError(ValueError):
    """A schedule misses, repeats or mistimes a pair; the message names the first such pair."""


# Positions that a state of filters with an end can at least go back.
SLACK = 64


@dataclass(frozen=True)
class Tile:
    """Contributions of the positions `inputs` to the later positions `outputs`."""

    inputs: range
    outputs: range

    @property
    def side(self) -> int:
        """The number of inputs, U; there are at most U outputs."""
        return len(self.inputs)

    def __str__(self) -> str:
        i, o = self.inputs, self.outputs
        return f"[{i.start}, {i.stop}) -> [{o.start}, {o.stop})"


@dataclass(frozen=True)
class Schedule:
    """The dyadic tiling of positions `origin` ... `capacity - 1` over base blocks of `block`.

    Contributions of positions before `origin` are taken as already added (a prefill's). Blocks are
    aligned to `origin`; the last one may be cut short by the capacity. Pairs inside one block are
    the step's own work; `tiles_after` says what runs between two steps.

    Raises ValueError unless `block >= 1` and `0 <= origin <= capacity`.
    """

    block: int
    capacity: int
    origin: int = 0

    def __post_init__(self):
        if self.block < 1 or not 0 <= self.origin <= self.capacity:
            raise ValueError(
                f"a schedule needs block >= 1 and 0 <= origin <= capacity; found block={self.block},"
                f" origin={self.origin}, capacity={self.capacity}"
            )

    def tiles_after(self, position: int) -> tuple[Tile, ...]:
        """The tiles to run once the input at `position` exists, before `position + 1` is read."""
        end = position + 1
        blocks, within = divmod(end - self.origin, self.block)
        if within or blocks < 1 or end >= self.capacity:
            return ()
        side = self.block * (blocks & -blocks)
        return (Tile(range(end - side, end), range(end, min(end + side, self.capacity))),)

    def __iter__(self) -> Iterator[Tile]:
        """All tiles, in the order in which they run."""
        for position in range(self.origin, self.capacity):
            yield from self.tiles_after(position)

    def prove(self) -> None:
        """Check every pair (i, j), origin <= i <= j < capacity, against what `tiles_after` says.

        Each must be met exactly once, by a tile or inside a base block, not before input i exists
        and not after output j was read. Raises ScheduleError naming the first pair that is not.
        Takes O(capacity^2 / block) elementary operations in NumPy and O(capacity) memory.
        """
        _prove_timing(self)
        _prove_cover(self)

    def count_tiles(self, tokens: int | None = None) -> dict[int, int]:
        """How many tiles of each side run while `tokens` positions pass (default: all of them)."""
        room = self.capacity - self.origin
        tokens = room if tokens is None else tokens
        # The block that ends at the capacity has nobody left to contribute to.
        blocks = max(0, min(tokens, room - 1)) // self.block
        counts = {}
        unit = 1
        while unit <= blocks:
            counts[self.block * unit] = (blocks + unit) // (2 * unit)
            unit *= 2
        return counts

    def cost(self) -> sympy.Expr:
        """Floating-point operations for L = K·2^P positions of C channels: a formula in L, C, K.

        A real transform of n values counts 5/2 n log2 n, a complex product 6, a multiply-add 2. A
        tile of side U takes two transforms of 2U values (the filter's spectrum is kept), U + 1
        products and U additions; the step meets all K rows of its block at every position.
        """
        return _formula()

    def __str__(self) -> str:
        tokens = self.capacity - self.origin
        lines = [
            f"dyadic schedule: positions {self.origin} ... {self.capacity - 1}, base block {self.block}",
            f"{'side':>10} {'tiles':>10} {'inputs met':>12} {'of all pairs':>13}",
        ]
        pairs = tokens * (tokens + 1) // 2
        tiled = dict.fromkeys(self.count_tiles(), 0)
        for tile in self:
            tiled[tile.side] += len(tile.inputs) * len(tile.outputs)
        lines.append(_row("in step", tokens, tokens, pairs - sum(tiled.values()), pairs))
        for side, count in self.count_tiles().items():
            lines.append(_row(side, count, count * side, tiled[side], pairs))
        return "\n".join(lines)

    def draw(self) -> str:
        """The triangle of pairs as text, a row per output and a column per input.

        `.` is summed in the step, `a` by the smallest tiles, `b` by those of twice their side, ...
        Raises ValueError above 128 positions.
        """
        tokens = self.capacity - self.origin
        if tokens > 128:
            raise ValueError(f"a drawing has at most 128 positions, this schedule has {tokens}")
        rows = [["."] * (j + 1) for j in range(tokens)]
        for tile in self:
            letter = chr(ord("a") + (tile.side // self.block).bit_length() - 1)
            for j in tile.outputs:
                for i in tile.inputs:
                    rows[j - self.origin][i - self.origin] = letter
        return "\n".join("".join(row) for row in rows)


def _row(side: object, tiles: int, inputs: int, pairs: int, of: int) -> str:
    share = pairs / of if of else 0.0
    return f"{side!s:>10} {tiles:>10,} {inputs:>12,} {share:>13.1%}"


@cache
def _formula() -> sympy.Expr:
    length, channels, block = sympy.symbols("L C K", positive=True)
    levels = sympy.log(length / block, 2)
    # Level q has 2^(P-1-q) tiles of side K·2^q: L/2 inputs a level, whatever q is.
    transforms = 5 * length * (levels * (1 + sympy.log(block, 2)) + levels * (levels - 1) / 2)
    products = 3 * length * levels + 6 * (length / block - 1)
    additions = length * levels / 2
    in_step = 2 * length * block
    return channels * (transforms + products + additions + in_step)


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
        block_end = min(first + ((i - first) // schedule.block + 1) * schedule.block, capacity)
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
