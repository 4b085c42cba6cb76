import dataclasses
from typing import ClassVar

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_compile.schedule import Schedule, ScheduleError, Tile

BLOCKS = [1, 2, 3, 8, 24, 32]
TILINGS = [(radix, deferred) for radix in (2, 3, 4, 8) for deferred in (False, True)]


@st.composite
def schedules(draw, smallest=1, largest=200):
    capacity = draw(st.integers(smallest, largest))
    origin = draw(st.integers(0, capacity))
    tiling = draw(st.sampled_from(TILINGS))
    return Schedule(draw(st.sampled_from(BLOCKS)), capacity, origin, *tiling)


class Mutant(Schedule):
    """A schedule whose tiles are given: what the proof is to judge."""

    tiles: ClassVar[dict]

    def with_tiles(self, tiles):
        object.__setattr__(self, "tiles", tiles)
        return self

    def tiles_after(self, position):
        return tuple(self.tiles.get(position, ()))


def tiles_of(schedule):
    return {t: list(schedule.tiles_after(t)) for t in range(schedule.origin, schedule.capacity)}


def mutant(schedule, tiles):
    return Mutant(**dataclasses.asdict(schedule)).with_tiles(tiles)


def first_violation(schedule):
    """The proof by hand: simulate the positions, meeting pairs one at a time."""
    origin, capacity, block = schedule.origin, schedule.capacity, schedule.block
    met = {}
    for t in range(origin, capacity):
        start = origin + (t - origin) // block * block
        if schedule.deferred:
            start = max(origin, start - block)
        for i in range(start, t + 1):
            met[i, t] = met.get((i, t), 0) + 1
        if any(met.get((i, t), 0) != 1 for i in range(origin, t + 1)):
            return "cover"
        for tile in schedule.tiles_after(t):
            for i in tile.inputs:
                for j in tile.outputs:
                    slack = tile.side if schedule.deferred else 0
                    if not origin <= i <= t < j - slack or j >= capacity:
                        return "timing"
                    met[i, j] = met.get((i, j), 0) + 1
    return None


@given(schedules(), st.lists(st.floats(0, 1), max_size=4))
def test_every_pair_is_met_once_in_time_also_after_restarts(schedule, restarts):
    schedule.prove()
    assert first_violation(schedule) is None
    # A rewind or a prefill begins a new schedule anywhere, most often in mid-block.
    for part in restarts:
        origin = int(part * schedule.capacity)
        schedule = dataclasses.replace(schedule, origin=origin)
        schedule.prove()
        assert first_violation(schedule) is None


@pytest.mark.parametrize("capacity", [1, 2, 63, 500, 4096, 5000])
@pytest.mark.parametrize("block", [1, 32])
def test_prove_reaches_real_capacities(capacity, block):
    Schedule(block, capacity).prove()
    Schedule(block, capacity, capacity // 3).prove()
    for radix, deferred in TILINGS:
        Schedule(max(4, block), capacity, capacity // 3, radix, deferred).prove()


def change(tile, kind, by):
    i, o = tile.inputs, tile.outputs
    ranges = {
        "later inputs": (range(i.start + by, i.stop + by), o),
        "earlier inputs": (range(i.start - by, i.stop - by), o),
        "fewer inputs": (range(i.start + by, i.stop), o),
        "more inputs": (range(i.start - by, i.stop), o),
        "fewer outputs": (i, range(o.start, o.stop - by)),
        "more outputs": (i, range(o.start, o.stop + by)),
        "earlier outputs": (i, range(o.start - by, o.stop - by)),
        "later outputs": (i, range(o.start + by, o.stop + by)),
    }
    return Tile(*ranges[kind], tile.side)


KINDS = [
    "later inputs", "earlier inputs", "fewer inputs", "more inputs",
    "fewer outputs", "more outputs", "earlier outputs", "later outputs",
]  # fmt: skip


@settings(max_examples=200)
@given(schedules(40, 120), st.sampled_from([*KINDS, "drop", "repeat", "delay"]), st.data())
def test_a_mutation_fails_the_proof(schedule, kind, data):
    tiles = tiles_of(schedule)
    busy = [t for t, some in tiles.items() if some]
    if not busy:
        return
    t = data.draw(st.sampled_from(busy))
    tile, *rest = tiles[t]
    if kind == "drop":
        tiles[t] = rest
    elif kind == "repeat":
        tiles[t].append(tile)
    elif kind == "delay":
        tiles[t + 1] = [*tiles.get(t + 1, []), tile]
        tiles[t] = rest
    else:
        tiles[t] = [change(tile, kind, data.draw(st.integers(1, 3))), *rest]
    broken = mutant(schedule, tiles)
    assert first_violation(broken) is not None
    with pytest.raises(ScheduleError):
        broken.prove()


@pytest.mark.parametrize(
    ("after", "tile", "message"),
    [
        (3, None, r"pair \(0, 4\): met 0 times"),
        (3, Tile(range(0, 4), range(4, 7)), r"pair \(0, 7\): met 0 times"),
        (3, Tile(range(1, 4), range(4, 8)), r"pair \(0, 4\): met 0 times"),
        (3, Tile(range(0, 4), range(3, 8)), r"pair \(0, 3\): met after position 3, when its output"),
        (3, Tile(range(0, 5), range(4, 8)), r"pair \(4, 4\): met after position 3, before its input"),
        (7, Tile(range(0, 8), range(8, 17)), r"pair \(0, 16\): the output lies beyond"),
        (11, Tile(range(4, 12), range(12, 16)), r"pair \(4, 12\): met 2 times"),
    ],
)
def test_the_first_violated_pair_is_named(after, tile, message):
    schedule = Schedule(4, 16)
    tiles = tiles_of(schedule) | {after: [] if tile is None else [tile]}
    with pytest.raises(ScheduleError, match=message):
        mutant(schedule, tiles).prove()


def test_inputs_of_the_prefill_are_not_tiled_again():
    tiles = {11: [Tile(range(4, 12), range(12, 16))]}
    with pytest.raises(ScheduleError, match=r"pair \(4, 12\): the input lies before the origin 8"):
        mutant(Schedule(4, 16, 8), tiles).prove()


@given(schedules(), st.integers(0, 250))
def test_tiles_are_counted_as_they_run(schedule, tokens):
    counted, met = {}, {}
    for t in range(schedule.origin, min(schedule.origin + tokens, schedule.capacity)):
        for tile in schedule.tiles_after(t):
            counted[tile.side] = counted.get(tile.side, 0) + 1
    assert schedule.count_tiles(tokens) == dict(sorted(counted.items()))
    for tile in schedule:
        met[tile.side] = met.get(tile.side, 0) + len(tile.inputs)
    assert schedule.count_inputs() == dict(sorted(met.items()))


@given(schedules(), st.data())
def test_blocks_of_a_tile(schedule, data):
    """What is transformed together lies at whole distances, and is kept while later tiles meet it, not longer."""
    tiles = list(schedule)
    for tile in tiles:
        assert [start for start, _ in tile.blocks] == list(
            range(tile.inputs.start, tile.inputs.stop, tile.side)
        )
        assert all(start + distance * tile.side == tile.outputs.start for start, distance in tile.blocks)
        assert tile.gap == (tile.side if schedule.deferred else 0)
        assert len(tile.outputs) <= tile.side
    kept = schedule.kept_blocks()
    for place, tile in enumerate(tiles):
        later = {
            start for other in tiles[place + 1 :] if other.side == tile.side for start, _ in other.blocks
        }
        assert tile.reused == (tile.blocks[-1][0] in later)
        assert len([start for start, _ in tile.blocks if start in later]) <= kept.get(tile.side, 0)


@pytest.mark.parametrize(("radix", "deferred"), TILINGS)
def test_cost_is_the_sum_over_the_tiles(radix, deferred):
    length, channels, block = sympy.symbols("L C K", positive=True)
    for k, n in [(4, 4 * radix**2), (32, 32 * radix**3), (16, 16)]:
        operations = 2 * n * k * (2 if deferred else 1)
        for tile in Schedule(k, n, 0, radix, deferred):
            side, blocks = tile.side, len(tile.blocks)
            operations += 2 * sympy.Rational(5, 2) * 2 * side * sympy.log(2 * side, 2)
            operations += (6 * blocks + 2 * (blocks - 1)) * (side + 1) + side
        formula = Schedule(k, n, 0, radix, deferred).cost().subs({length: n, channels: 3, block: k})
        assert float(formula) == pytest.approx(float(3 * operations), rel=1e-12)


@pytest.mark.parametrize(
    "arguments", [(0, 8), (-1, 8), (4, 8, 9), (4, 8, -1), (4, -1), (4, 8, 0, 1)], ids=repr
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="a schedule needs"):
        Schedule(*arguments)


def test_table_and_drawing():
    schedule = Schedule(2, 9, 1)
    assert schedule.draw() == "\n".join(
        [
            ".",
            "..",
            "aa.",
            "aa..",
            "bbbb.",
            "bbbb..",
            "bbbbaa.",
            "bbbbaa..",
        ]
    )
    assert str(schedule).splitlines() == [
        "dyadic schedule: positions 1 ... 8, base block 2",
        "      side      tiles   inputs met  of all pairs",
        "   in step          8            8         33.3%",
        "         2          2            4         22.2%",
        "         4          1            4         44.4%",
    ]
    schedule = Schedule(1, 8, 0, 4)
    assert schedule.draw().splitlines()[3:] == ["aaa.", "bbbb.", "bbbba.", "bbbbaa.", "bbbbaaa."]
    assert str(schedule).splitlines()[3:] == [
        "         1          6           12         33.3%",
        "         4          1            4         44.4%",
    ]
    schedule = Schedule(1, 8, 0, 2, True)
    assert schedule.draw().splitlines()[3:] == ["aa..", "bba..", "bbaa..", "bbbba..", "bbbbaa.."]
    assert str(schedule).startswith("deferred dyadic schedule: positions 0 ... 7, base block 1\n")
    with pytest.raises(ValueError, match="at most 128"):
        Schedule(2, 200).draw()
