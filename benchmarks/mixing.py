"""Mixing alone: all long convolutions of a model of C channels, position by position, each way it can be done.

flashinf's state machine and the published schedule run every position, in turns. The others are so slow that their
pieces are timed one by one, at sampled positions, and multiplied by how often each is run; every piece is compared with
float64 at the size it is timed at.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from . import gate
from .filters import history, hyena_like
from .measure import Times, once, read_bandwidth, timed
from .peers.base import Peer
from .peers.blocked_lazy import BlockedLazy
from .peers.eager import Eager
from .peers.flashinf import Flashinf
from .peers.futurefill import EPOCHS, FutureFill, PartitionedFutureFill
from .peers.lazy import Lazy
from .peers.published import Published
from .peers.recurrence import Recurrence, approximation_error, modal_filter
from .setup import Bench

ORDERS = (16, 64)
_RECURRENCE_CHECKED = 512  # positions
_TURNS = 3


def run(bench: Bench) -> None:
    """Every peer at every length of the run."""
    curves: dict[str, list[tuple[int, str, float]]] = {}
    for length in bench.sizes.lengths:
        for name, (subject, seconds) in measure(bench, length).items():
            curves.setdefault(name, []).append((length, subject, seconds))
    for name, points in curves.items():
        lengths, subjects, seconds = zip(*points, strict=True)
        bench.section.curve("mixing", name, lengths, seconds, subjects)


def measure(bench: Bench, length: int) -> dict[str, tuple[str, float]]:
    """All peers at one length, and the ratios: what was checked and the seconds of all positions, by name."""
    section, channels = bench.section, bench.sizes.channels
    at = f"L={length}"
    bench.say(f"{at}: {channels} filters")
    filters, inputs = hyena_like(channels, length), history(channels, length)
    whole: dict[str, tuple[str, float]] = {}
    check_flashinf(bench, filters, inputs)
    bandwidth, error = read_bandwidth()
    section.check(f"reading {at}", error, 1e-5, "the number of values summed")
    section.figure(f"{at} read bandwidth", bandwidth / 1e9, "GB/s", f"reading {at}")
    for make in _peers(filters, inputs):
        peer = make()
        subject = f"{peer.name} {at}"
        bench.say(f"{at}: {peer.name}")
        pieces = peer.pieces()
        section.check(
            subject, gate.check_pieces(pieces, filters, inputs), gate.BOUND, "direct sums in float64"
        )
        times = [timed(piece.run, bench.sizes.repeats) for piece in pieces]
        total = sum(p.count * t.median for p, t in zip(pieces, times, strict=True))
        whole[peer.name] = subject, total
        section.figure(f"{at} {peer.name}", total, "s", subject, note=peer.sampled + _block(peer))
        if isinstance(peer, Lazy):
            _lazy_bandwidth(bench, at, subject, filters, times[-1], bandwidth)
        del peer, pieces
        gc.collect()
    _recurrences(bench, filters, whole, at)
    peer = _in_turns(bench, filters, inputs, whole, at)
    total = whole[Flashinf.name][1]
    peer.restart()
    tiles, name = once(peer.run_tiles), f"{at} flashinf, tiles and moving blocks alone"
    section.figure(name, tiles, "s", f"flashinf {at}", note="the rest are sums inside blocks, and calls")
    predicted = peer.tiling.seconds * length
    section.figure(
        f"{at} flashinf, measured or predicted, the larger over the other",
        max(total / predicted, predicted / total),
        "×",
        f"flashinf {at}",
        bench.target("≤", 1.3),
        f"predicted {predicted:.3g} s from rates measured once on this machine",
    )
    _ratios(bench, whole, at, length)
    return whole


def check_flashinf(bench: Bench, filters: Tensor, inputs: Tensor) -> None:
    """All positions, in a few channels."""
    channels, length = filters.shape
    some = sorted({0, channels // 3, channels // 2, channels - 1})
    error = gate.check_push(Flashinf(filters), inputs, some)
    bench.section.check(f"flashinf L={length}", error, gate.BOUND, "direct sums in float64")


def _in_turns(
    bench: Bench, filters: Tensor, inputs: Tensor, whole: dict[str, tuple[str, float]], at: str
) -> Flashinf:
    """flashinf and the schedule it began with, every position of both run, in turns: what drifts meets both."""
    mine, theirs = Flashinf(filters), Published(filters, inputs)
    bench.say(f"{at}: {mine.name} and {theirs.name} in turns")
    error = gate.check_pieces(theirs.pieces(), filters, inputs)
    bench.section.check(f"{theirs.name} {at}", error, gate.BOUND, "direct sums in float64")
    rows = inputs.T.contiguous()

    def run(peer: Flashinf | Published, step: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> float:
        peer.restart()
        return once(lambda: [None for y in rows if step(y) is None])

    def run_both() -> tuple[float, float]:
        return run(mine, mine.step, rows.split(1)), run(theirs, theirs.push, rows.unbind(0))

    run_both()  # which makes the spectra
    turns = [run_both() for _ in range(_TURNS)]
    chosen = f"; base block {mine.tiling.block}, radix {mine.tiling.radix}"
    for peer, seconds, also in zip((mine, theirs), zip(*turns, strict=True), (chosen, ""), strict=True):
        times, subject = Times(seconds), f"{peer.name} {at}"
        whole[peer.name] = subject, times.median
        note = f"every position run, {_TURNS} times in turns ({times.spread:.2f}×){also}"
        bench.section.figure(f"{at} {peer.name}", times.median, "s", subject, note=note)
    return mine


def _peers(filters: Tensor, inputs: Tensor) -> Iterable[Callable[[], Peer]]:
    yield lambda: Lazy(filters, inputs)
    yield lambda: BlockedLazy(filters, inputs)
    yield lambda: Eager(filters, inputs)
    for kind in (FutureFill, PartitionedFutureFill):
        yield lambda kind=kind: kind(filters, inputs, best_epoch(kind, filters, inputs))


def best_epoch(kind: type[FutureFill], filters: Tensor, inputs: Tensor) -> int:
    """The fastest epoch, measured on an eighth of the channels."""
    some = max(1, filters.shape[0] // 8)
    cost: dict[int, float] = {}
    for epoch in EPOCHS:
        if 4 * epoch <= filters.shape[1]:
            pieces = kind(filters[:some], inputs[:some], epoch).pieces()
            cost[epoch] = sum(p.count * timed(p.run, 2, 0.2).median for p in pieces)
    return min(cost, key=cost.__getitem__, default=filters.shape[1] // 4)


def _block(peer: Peer) -> str:
    if isinstance(peer, FutureFill):
        return f"; epochs of {peer.epoch}, the fastest of {', '.join(map(str, EPOCHS))}"
    return f"; K = {peer.block}" if isinstance(peer, BlockedLazy) else ""


def _lazy_bandwidth(
    bench: Bench, at: str, subject: str, filters: Tensor, newest: Times, bandwidth: float
) -> None:
    """How near the lazy baseline comes to the machine's limit, at the last position."""
    rate = 2 * filters.nbytes / newest.median
    of = (subject, f"reading {at}")
    bench.section.figure(f"{at} lazy reads at", rate / 1e9, "GB/s", subject)
    bench.section.figure(
        f"{at} lazy, share of the read bandwidth", rate / bandwidth, "", of, bench.target("≥", 0.8)
    )


def _recurrences(bench: Bench, filters: Tensor, whole: dict[str, tuple[str, float]], at: str) -> None:
    channels, length = filters.shape
    sampled = filters[:: max(1, channels // 8)][:8].double()
    for order in ORDERS:
        peer = Recurrence.random(channels, order)
        subject = f"{peer.name} {at}"
        bench.say(f"{at}: {peer.name}")
        check_recurrence(bench, order, subject)
        (piece,) = peer.pieces_of(length)
        total = piece.count * timed(piece.run, bench.sizes.repeats).median
        error = max(approximation_error(k, order) for k in sampled)
        note = f"an approximation: its filters are off by up to {error:.0%} (8 of {channels} fitted)"
        whole[peer.name] = subject, total
        bench.section.figure(f"{at} {peer.name}", total, "s", subject, note=note)


def check_recurrence(bench: Bench, order: int, subject: str) -> None:
    """A recurrence against its own filters in float64: what it approximates is another matter."""
    small = Recurrence.random(4, order)
    small.filters = modal_filter(*small.given, _RECURRENCE_CHECKED)
    error = gate.check_push(small, torch.randn(4, _RECURRENCE_CHECKED))
    bench.section.check(subject, error, order * gate.BOUND, "its own filter in float64")


def _ratios(bench: Bench, whole: dict[str, tuple[str, float]], at: str, length: int) -> None:
    mine, ours = whole[Flashinf.name]
    others = {name: v for name, v in whole.items() if name != Flashinf.name}
    wanted = {(Lazy.name, 1 << 16): 180, (Lazy.name, 1 << 17): 350}
    exact = {n: v for n, v in others.items() if not n.startswith("recurrence")}
    for name, (subject, total) in others.items():
        target = wanted.get((name, length))
        bench.section.figure(
            f"{at} {name} / flashinf",
            total / ours,
            "×",
            (subject, mine),
            bench.target("≥", target) if target else None,
        )
    name, (subject, total) = min(exact.items(), key=lambda item: item[1][1])
    bench.section.figure(
        f"{at} best other / flashinf", total / ours, "×", (subject, mine), bench.target("≥", 1.5), note=name
    )
