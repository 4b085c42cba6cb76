"""How long the slowest steps take: work by count, and times beside those of steps without tiles."""

from __future__ import annotations

from math import log2

import numpy as np
from torch import Tensor

from fi_compile.schedule import Schedule

from . import models
from .decoding import Steps, decode, state_of
from .setup import Bench


def run(bench: Bench) -> None:
    """The default schedule and the bounded one."""
    total = {latency: measure(bench, latency) for latency in ("throughput", "bounded")}
    ratio = total["bounded"] / total["throughput"]
    bench.section.figure(
        "total, bounded / throughput", ratio, "×", ("throughput", "bounded"), bench.target("≤", 1.15)
    )


def measure(bench: Bench, name: str) -> float:
    """Mean seconds of a step."""
    sizes, length, section = bench.sizes, bench.sizes.latency, bench.section
    model = models.hyena(sizes.width, sizes.layers, length)
    bench.say(f"{name}: analysis and compilation")
    decoder = bench.decoder(model, length, latency=name)
    bench.say(f"{name}: {length} steps")
    deferred: list[float] = []

    def step(token: Tensor) -> Tensor:
        row = decoder.step(token)
        deferred.append(state_of(decoder).operations)  # of tiles worked on in pieces, so far
        return row

    steps = decode(step, models.random_ids(1, length))
    section.check(name, *models.check_logits(model, steps.logits))
    schedule = decoder.report.schedule
    assert schedule is not None
    plain = steps.without_block_ends(schedule.block)
    for what, some in (("steps", steps.seconds), ("steps without a block's end", plain)):
        for label, value in (("median", 0.5), ("p99.9", 0.999), ("largest", 1.0)):
            section.figure(f"{name}: {what}, {label}", 1e3 * float(np.quantile(some, value)), "ms", name)
    bank = state_of(decoder).bank
    work = work_by_step(schedule, bank.block, bank.filters.shape[0]) + np.diff([0, *deferred])
    target = bench.target("≤", 2.5) if name == "bounded" else None
    section.figure(
        f"{name}: largest work of a step / mean", work.max() / work.mean(), "×", name, target, "by count"
    )
    _curve(bench, name, steps, plain)
    return steps.mean


def work_by_step(schedule: Schedule, rows: int, channels: int) -> np.ndarray:
    """Operations of mixing at each position, by count: `rows` summed in the step, and tiles run at once after it."""
    work = np.full(schedule.capacity, 2.0 * rows * channels)
    for t in range(schedule.capacity):
        for tile in schedule.tiles_after(t):
            if not tile.gap:  # else it is worked on in the steps that follow
                blocks = len(tile.blocks)
                transforms = 2 * 2.5 * 2 * tile.side * log2(2 * tile.side)
                work[t] += channels * (transforms + 6 * blocks * (tile.side + 1) + tile.side)
    return work


def _curve(bench: Bench, name: str, steps: Steps, plain: np.ndarray) -> None:
    share = np.geomspace(1 / len(steps.seconds), 1, 60)
    for label, some in ((name, steps.seconds), (f"{name}, no block's end", plain)):
        times = np.quantile(some, 1 - share)
        bench.section.curve("latency", label, share.tolist(), (1e6 * times).tolist(), name)
