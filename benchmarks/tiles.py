"""The cost of tiles alone, and how it grows; recurrences beside it."""

from __future__ import annotations

from math import log2

import torch

from fi_compile.extension import lanes

from . import gate
from .filters import history, hyena_like
from .measure import once, timed
from .mixing import check_recurrence
from .peers.flashinf import Flashinf
from .peers.recurrence import Recurrence
from .peers.transforms import CompiledTile, TransformTile
from .setup import Bench

_SIDES = (32, 256, 2048, 16384)
_VALUES = 1 << 23  # of the inputs of one tile


def run(bench: Bench) -> None:
    """Tile time in ns a token and channel over L, against log² L."""
    channels, lengths = bench.sizes.channels, bench.sizes.tile_lengths
    cost = {}
    for length in lengths:
        bench.say(f"L={length}: {channels} channels")
        peer = _checked(bench, channels, length)
        peer.restart()
        first = once(peer.run_tiles)
        peer.restart()
        cost[length] = min(first, once(peer.run_tiles)) / length / channels * 1e9
        bench.section.figure(
            f"tiles to L={length}",
            cost[length],
            "ns per token and channel",
            _subject(channels, length),
            note="flush and load of blocks included, sums inside blocks not",
        )
    short, long = lengths[0], lengths[-1]
    growth = cost[long] / cost[short] / (log2(long) / log2(short)) ** 2
    bench.section.figure(
        f"growth from L={short} to {long} over that of log²",
        growth,
        "×",
        [_subject(channels, n) for n in (short, long)],
        bench.target("≤", 1.0),
    )
    of = [_subject(channels, n) for n in lengths]
    bench.section.curve("tiles", "flashinf", lengths, list(cost.values()), of)
    scale = cost[short] / log2(short) ** 2
    bench.section.curve("tiles", "log² L", lengths, [scale * log2(n) ** 2 for n in lengths], of)
    for side in _SIDES:
        if 2 * side <= long:
            _beside_torch(bench, channels, side)


def _beside_torch(bench: Bench, channels: int, side: int) -> None:
    """One tile by torch's transforms and by compiled ones."""
    code = lanes()
    if code is None:
        return
    channels = min(channels, max(16, _VALUES // side))
    filters, inputs = hyena_like(channels, 2 * side), history(channels, side)
    found = torch.zeros(2, channels, side)
    tiles = TransformTile(filters, side), CompiledTile(filters, side, code)
    for tile, out in zip(tiles, found, strict=True):
        tile.add(inputs, out)
    exact = torch.zeros(channels, side, dtype=torch.float64)
    TransformTile(filters.double(), side).add(inputs.double(), exact)
    unit = torch.finfo(torch.float32).eps * inputs.norm(dim=1) * filters.norm(dim=1)
    error = ((found - exact).abs().amax(-1) / unit).max()
    subject = f"one tile of {side}"
    bench.section.check(subject, float(error), gate.BOUND, "torch's transforms in float64")
    by_torch, compiled = (
        timed(lambda tile=tile: tile.add(inputs, found[0]), bench.sizes.repeats).median for tile in tiles
    )
    bench.section.figure(
        f"{subject} by torch's transforms / compiled",
        by_torch / compiled,
        "×",
        subject,
        note=f"{channels} channels",
    )


def crossover(bench: Bench) -> None:
    """Cost a token of recurrences of several orders, the same at every length, against that of tiles over L."""
    channels, lengths = bench.sizes.crossover_channels, bench.sizes.crossover
    cost = {}
    for length in lengths:
        bench.say(f"L={length}: {channels} channels")
        peer = _checked(bench, channels, length)
        rows = history(channels, length).T.contiguous()
        peer.restart()
        cost[length] = (
            once(lambda rows=rows, peer=peer: [None for y in rows if peer.push(y) is None]) / length
        )
    of = [_subject(channels, n) for n in lengths]
    bench.section.curve("crossover", "tiles (exact)", lengths, [1e6 * v for v in cost.values()], of)
    for order in bench.sizes.orders:
        bench.say(f"recurrence of order {order}")
        subject = f"recurrence of order {order}"
        check_recurrence(bench, order, subject)
        (piece,) = Recurrence.random(channels, order).pieces_of(1)
        step = timed(piece.run, bench.sizes.repeats).median
        bench.section.curve(
            "crossover", f"recurrence of order {order}", lengths, [1e6 * step] * len(lengths), subject
        )
        cheaper = [n for n in lengths if cost[n] < step]
        bench.section.figure(
            f"recurrence of order {order}",
            1e6 * step,
            "µs a token",
            [subject, *of],
            note=f"tiles, which are exact, cost less {f'to L={max(cheaper)}' if cheaper else 'at no length measured'}",
        )
    for length in lengths:
        bench.section.figure(
            f"tiles to L={length}", 1e6 * cost[length], "µs a token", _subject(channels, length)
        )


def _subject(channels: int, length: int) -> str:
    return f"tiles of {channels} channels to L={length}"


def _checked(bench: Bench, channels: int, length: int) -> Flashinf:
    inputs = history(channels, length)
    peer = Flashinf(hyena_like(channels, length))
    with torch.no_grad():
        error = gate.check_push(peer, inputs, sorted({0, channels // 2, channels - 1}))
    bench.section.check(_subject(channels, length), error, gate.BOUND, "direct sums in float64")
    return peer
