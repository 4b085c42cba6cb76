"""The rates of this machine: measured once, and kept in the user's cache.

`FLASHINF_COSTS=builtin` measures nothing and uses the constants of `costs.py`. The cache is `costs.json` where compiled
steps are kept too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .costs import BLOCKS, BUILTIN, BUILTIN_NATIVE, Rates
from .errors import FlashinfWarning
from .kept import cache_directory
from .kernels.tile import add_tile_direct
from .mixers.lane_tiles import LaneTiles
from .mixers.tile_work import KeptSpectra
from .mixers.tiles import TorchTiles
from .schedule import Tile

VERSION = 5
# Values of each array that is measured on: together they fit in no cache.
_VALUES = 1 << 22
# How long a rate is tried at least. Two threads beside another process wait for each other most of the time.
_SECONDS = 0.1


def rates_of_machine(native: bool = False) -> Rates:
    """The rates of this machine at the present number of threads: from the cache, or measured and put there.

    native: with compiled tiles.
    """
    if os.environ.get("FLASHINF_COSTS") == "builtin":
        return BUILTIN_NATIVE if native else BUILTIN
    return _rates(str(cache_file()), torch.get_num_threads(), native)


@cache
def _rates(path: str, threads: int, native: bool) -> Rates:
    file, name = Path(path), f"{threads} native" if native else str(threads)
    known = _read(file)
    found = known.get(name)
    if found is None:
        found = known[name] = measure_rates(native)
        _write(file, known)
    return found


def measure_rates(native: bool = False) -> Rates:
    """Run tiles of several sides on data that is in no cache: a second or two."""
    with torch.inference_mode(False), torch.no_grad():
        data, make = torch.randn(3, _VALUES), LaneTiles if native else TorchTiles
        one, three = ([_time_tile(make, data, side, blocks) for side in BUILTIN.sides] for blocks in (1, 3))
        block = tuple(max(0.0, (many - few) / 2) for few, many in zip(one, three, strict=True))
        column, load = _time_moves(make, data)
        return Rates(
            BUILTIN.sides,
            tuple(one),
            block,
            direct=_time_direct(),
            end=_time_end(make),
            column=column,
            load=load,
            row=_time_row(),
            piece=_time_piece(make),
            native=native,
        )


def _time_tile(make: type[TorchTiles], data: Tensor, side: int, blocks: int) -> float:
    """A tile of some blocks of inputs, per value of a block; torch's transform the newest only."""
    filters, history, pending = (part.view(1, -1, 4 * side) for part in data)
    tiles, kept = make(filters[0], None, None), KeptSpectra()
    tile = Tile(range((3 - blocks) * side, 3 * side), range(3 * side, 4 * side), side)

    tiles.add(tile, history, pending, kept)  # makes the spectra that are kept
    if make is LaneTiles:  # threads share the whole of a tile; a piece may be too narrow for that
        return _fastest(lambda: tiles.add(tile, history, pending, kept)) / (data[0].numel() // 4)
    work = tiles.begin(tile, history, pending, kept)
    # By pieces: short enough to run undisturbed now and then on a machine that is busy.
    pieces = cycle(range(work.count))
    return _fastest(lambda: work.run(next(pieces)), 5 * work.count) * work.count / (data[0].numel() // 4)


def _time_direct() -> float:
    values, filters = torch.randn(1, 256, 16), torch.randn(256, 32)
    outputs = torch.zeros_like(values)
    return _fastest(lambda: add_tile_direct(outputs, values, filters)) / 256 / 16**2


def _time_moves(make: type[TorchTiles], data: Tensor, channels: int = 2048) -> tuple[float, float]:
    """A channel's part of a base block to a state's positions or back, and each value of it more."""
    states = data.view(len(data), 1, channels, -1)
    tiles = make(states[0, 0], None, None)

    def seconds(block: int) -> float:
        rows = torch.zeros(block, 1, channels)
        places = [(state, p) for p in range(0, states.shape[-1], 2 * block) for state in states]
        turns = cycle(places)

        def run() -> None:
            state, p = next(turns)
            tiles.write_columns(state[:, :, p : p + block], rows)
            state, p = next(turns)
            tiles.read_columns(rows, state[:, :, p : p + block])

        return _fastest(run) / 2 / channels

    few, many = min(BLOCKS), max(BLOCKS)
    short, long = seconds(few), seconds(many)
    load = max(0.0, (long - short) / (many - few))
    return max(0.0, short - few * load), load


def _time_end(make: type[TorchTiles], channels: int = 16, block: int = 16) -> float:
    """The end of a block of hardly any values, after a step that left nothing of it in the caches near by."""
    state, rows, weights = (
        torch.zeros(1, channels, 4 * block),
        torch.zeros(block, 1, channels),
        torch.ones(_VALUES),
    )
    tiles, kept = make(torch.zeros(channels, 4 * block), None, None), KeptSpectra()
    tile = Tile(range(block), range(block, 2 * block), block)

    def run() -> None:
        tiles.write_columns(state[:, :, :block], rows)
        tiles.add(tile, state, state, kept)
        tiles.read_columns(rows, state[:, :, block : 2 * block])
        rows.zero_()

    times, end = [], perf_counter() + _SECONDS
    while not times or perf_counter() < end:
        weights.sum()
        times.append(_time(run))
    return statistics.median(times)


def _time_row(channels: int = 512, rows: int = 32, times: int = 50) -> float:
    """A product and a sum of what is in a cache near by."""
    inputs, weights = torch.zeros(2, rows * channels)
    return _fastest(lambda: [torch.dot(inputs, weights) for _ in range(times)]) / times / rows / channels


def _time_piece(make: type[TorchTiles], times: int = 50) -> float:
    tiles, little = make(torch.zeros(1, 128), None, None), torch.zeros(1, 1, 128)
    work = tiles.begin(Tile(range(32), range(32, 64)), little, little, KeptSpectra())
    return _fastest(lambda: [work.run(0) for _ in range(times)]) / times


def _fastest(run: Callable[[], Any], least: int = 5) -> float:
    """Seconds of the fastest of many runs: what others do on the machine only ever adds."""
    end, times = perf_counter() + _SECONDS, []
    while len(times) < least or perf_counter() < end:
        times.append(_time(run))
    return min(times)


def _time(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def cache_file() -> Path:
    """Where the rates are kept."""
    return cache_directory() / "costs.json"


def machine() -> str:
    """What measured rates are good for: this processor under this torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} x{os.cpu_count()}, torch {torch.__version__}"


def _read(file: Path) -> dict[str, Rates]:
    """Rates by number of threads; nothing, with a warning, where the file is not of this version and machine."""
    try:
        text = file.read_bytes()
    except OSError:
        return {}
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, not {VERSION}")
        if content["machine"] != machine():
            raise ValueError(f"it was measured on {content['machine']}")
        return {threads: _checked(given) for threads, given in content["rates"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"the measured costs in {file} are ignored and measured anew: {type(error).__name__}: {error}",
            FlashinfWarning,
            stacklevel=2,
        )
        return {}


def _checked(given: dict[str, Any]) -> Rates:
    sides = tuple(int(side) for side in given["sides"])
    tile, block = (tuple(float(x) for x in given[name]) for name in ("tile", "block"))
    others = {name: float(given[name]) for name in ("direct", "end", "column", "load", "row", "piece")}
    if sides != BUILTIN.sides or not len(tile) == len(block) == len(sides):
        raise ValueError("it lists other tiles")
    if not all(0 <= x < 1 for x in (*tile, *block, *others.values())):
        raise ValueError("a rate is out of range")
    return Rates(sides, tile, block, **others, native=bool(given["native"]))


def _write(file: Path, known: dict[str, Rates]) -> None:
    content = {"version": VERSION, "machine": machine(), "rates": {t: asdict(r) for t, r in known.items()}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix="costs", suffix=".json")
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=1)
        os.replace(name, file)
    except OSError:
        pass  # measured again by the next process
