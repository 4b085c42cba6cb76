"""What mixing takes, from a machine's rates, and the tiling that they recommend.

`rates.py` measures them. The formulas count tiles and inputs exactly, as `Schedule` does; docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Protocol

from .schedule import Schedule

# Values below which a piece of a tile costs its calls, and operations per value of a piece, about.
_SMALLEST_PIECE = 1 << 13
PIECE_OPERATIONS = 60

RADICES = (2, 4, 8)
_WORTH_SPECTRA = 1.1  # how many times faster a tiling has to be that keeps several spectra of each size
BLOCKS = (16, 32, 64)


@dataclass(frozen=True)
class Rates:
    """Seconds in float32 at one number of threads; float64 takes twice as long.

    sides: of the tiles that were measured. tile: a tile of one block of inputs, per input and channel, at each side;
    block: each further block of inputs. direct: a multiply-add of a direct tile. end: the end of a base block, whatever
    it holds. column, load: a channel, and a value of it, on the way from the base block to the history or back. row: a
    row and channel of the sum in the step. piece: beginning a piece of a tile. native: whether tiles are compiled
    (`mixers.lane_tiles`): none is direct, no spectra of inputs are kept.
    """

    sides: tuple[int, ...]
    tile: tuple[float, ...]
    block: tuple[float, ...]
    direct: float
    end: float
    column: float
    load: float
    row: float
    piece: float
    native: bool = False

    def tile_seconds(self, side: int, blocks: float, channels: int) -> dict[str, float]:
        """A tile of `side` outputs and `blocks` blocks of inputs, by each form there is."""
        transform = self._at(self.tile, side) + self._at(self.block, side) * (blocks - 1)
        forms = {"fft": self.piece + channels * side * transform}
        if not self.native:
            forms["direct"] = self.piece + channels * self.direct * side * side * blocks
        return forms

    def _at(self, values: Sequence[float], side: int) -> float:
        """Between two sides that were measured, a straight line over log2."""
        for i in range(1, len(self.sides)):
            if side <= self.sides[i] or i == len(self.sides) - 1:
                low, high = log2(self.sides[i - 1]), log2(self.sides[i])
                part = max(0.0, (log2(side) - low) / (high - low))
                return values[i - 1] + part * (values[i] - values[i - 1])
        return values[0]

    def seconds_per_token(self, schedule: Schedule, channels: int, rows: int) -> float:
        """All mixing of `channels`, a step summing `rows` rows, over the whole of a schedule."""
        tokens = max(1, schedule.capacity - schedule.origin)
        counts, inputs = schedule.count_tiles(), schedule.count_inputs()
        total = 0.0
        for side, count in counts.items():
            total += count * min(self.tile_seconds(side, inputs[side] / side / count, channels).values())
            if schedule.radix > 2 and not self.native:  # spectra of inputs are kept
                total += inputs[side] / schedule.radix * channels * self._at(self.block, side)
            if schedule.deferred:
                width = max(1, piece_elements(schedule, channels) // (2 * side))
                total += count * self.piece * 2 * ceil(channels / width)
        summed = (rows - 1) / 2 if self.native else rows  # torch's sum reads rows of zeros, too
        ends = (self.end + channels * 2 * self.column) / schedule.block
        return total / tokens + ends + channels * (2 * self.load + summed * self.row)


def piece_elements(schedule: Schedule, channels: int) -> int:
    """Values of a transform that a piece of a deferred tile works on: about what a position does on average."""
    side, operations = schedule.block, 0.0
    while 2 * side < schedule.capacity:
        operations += 10 * log2(2 * side) + 12 * (schedule.radix - 1)
        side *= schedule.radix
    return max(_SMALLEST_PIECE, int(channels * operations / PIECE_OPERATIONS))


BUILTIN = Rates(
    sides=(32, 128, 512, 2048, 8192, 32768),
    tile=(5.5e-9, 5.2e-9, 5.5e-9, 6.5e-9, 8.0e-9, 12e-9),
    block=(1.1e-9, 1.1e-9, 1.1e-9, 1.2e-9, 1.3e-9, 1.3e-9),
    direct=1.2e-9,
    end=0.15e-3,
    column=20e-9,
    load=0.5e-9,
    row=0.25e-9,
    piece=30e-6,
)
BUILTIN_NATIVE = replace(
    BUILTIN,
    tile=(1.2e-9, 1.2e-9, 2.0e-9, 2.2e-9, 2.4e-9, 2.7e-9),
    block=(0.7e-9, 0.7e-9, 1.2e-9, 1.4e-9, 1.5e-9, 1.7e-9),
    end=60e-6,
    column=11e-9,
    load=0.4e-9,
    piece=15e-6,
    native=True,
)


class Costs(Protocol):
    """What a tiling is chosen by: `Rates`, or a GPU's datasheet (`gpu_costs`)."""

    def seconds_per_token(self, schedule: Schedule, channels: int, rows: int) -> float:
        """All mixing of `channels`, a step summing `rows` rows, over the whole of a schedule."""
        ...


@dataclass(frozen=True)
class Tiling:
    """How a stack is tiled: rows K of the block's buffers, radix, whether tiles are deferred; seconds a token."""

    block: int
    radix: int = 2
    deferred: bool = False
    seconds: float = 0.0

    def schedule(self, capacity: int) -> Schedule:
        """The tiling of `capacity` positions."""
        return Schedule(
            self.block // 2 if self.deferred else self.block, capacity, 0, self.radix, self.deferred
        )

    def __str__(self) -> str:
        return f"base block {self.block}, radix {self.radix}: {1e6 * self.seconds:.3g} µs of mixing a token predicted"


def choose_tiling(
    rates: Costs,
    capacity: int,
    channels: int,
    *,
    block: int | str = "auto",
    radix: int | str = "auto",
    latency: str = "throughput",
    double: bool = False,
) -> Tiling:
    """The tiling of least predicted time a token, among those that the options leave; one of a higher radix where it is
    a tenth faster.

    channels: of all convolutions; where there are none, K says how many rows of tables are loaded at a time.
    """
    deferred = latency == "bounded"
    if not channels:
        return Tiling(32 if isinstance(block, str) else block + block % 2 * deferred, 2, deferred)
    found = []
    for rows in BLOCKS if isinstance(block, str) else (block,):
        even = rows + rows % 2 if deferred else rows
        radices = ((2, 4) if deferred else RADICES) if isinstance(radix, str) else (radix,)
        for base in radices:
            tiling = Tiling(even, base, deferred)
            seconds = rates.seconds_per_token(tiling.schedule(capacity), channels, even)
            found.append(Tiling(even, base, deferred, seconds * (2 if double else 1)))
    return min(found, key=lambda tiling: tiling.seconds * (_WORTH_SPECTRA if tiling.radix > 2 else 1))
