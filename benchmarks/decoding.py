"""Decoding ids position by position: every step's time, and the logits to check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fi_compile
from fi_compile.lane import Lane
from fi_compile.mixers.stack import ConvState

from .measure import once, timed
from .results import Section

BESIDE = 64  # times in a generation that something else is timed


@dataclass(frozen=True)
class Steps:
    """Seconds of each step, the logits [B, L, V] it returned, and seconds of what was timed between some of them."""

    seconds: np.ndarray
    logits: Tensor
    beside: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Over all positions."""
        return float(self.seconds.mean())

    def quantile(self, share: float) -> float:
        """The time that this share of all steps does not exceed."""
        return float(np.quantile(self.seconds, share))

    def without_block_ends(self, block: int) -> np.ndarray:
        """Seconds of the steps after which no tile ran."""
        return self.seconds[np.arange(1, len(self.seconds) + 1) % block != 0]

    def by_position(self, points: int = 24) -> tuple[list[float], list[float]]:
        """Mean seconds over stretches of positions that grow geometrically: their ends, and the means."""
        ends = np.unique(np.geomspace(64, len(self.seconds), points).astype(int))
        means = [float(self.seconds[a:b].mean()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        return ends.astype(float).tolist(), means


def decode(step: Callable[[Tensor], Tensor], ids: Tensor, beside: Callable[[], float] | None = None) -> Steps:
    """Step through ids [B, L]; in between, time something that a slow spell of the machine shall meet as well."""
    seconds, rows, others = np.empty(ids.shape[1]), [], []
    clock, every = time.perf_counter, max(1, ids.shape[1] // BESIDE)
    for t, token in enumerate(ids.T.contiguous()):
        start = clock()
        row = step(token)
        seconds[t] = clock() - start
        rows.append(row)
        if beside is not None and t % every == every // 2:
            others.append(beside())
    return Steps(seconds, torch.stack(rows, 1), tuple(others))


def compiled_alone(decoder: fi_compile.Decoder) -> float:
    """Median seconds of the compiled step of a decoder in lockstep, without what surrounds it; the sequence is lost."""
    seconds: list[float] = []
    for _ in range(8):
        decoder.reset()
        run = decoder.engine.step(lane_of(decoder))
        # The graph itself goes on to the next position, which must not leave the base block.
        seconds += [once(run) for _ in range(state_of(decoder).bank.block - 1)][1:]
    decoder.reset()
    return float(np.median(seconds))


def lane_of(decoder: fi_compile.Decoder) -> Lane:
    """Where a decoder in lockstep keeps the state of its rows."""
    ((lane, _),) = decoder._lanes
    return lane


def state_of(decoder: fi_compile.Decoder) -> ConvState:
    """The state of all long convolutions of a decoder in lockstep."""
    state = lane_of(decoder).conv
    assert state is not None
    return state


def where_time_goes(section: Section, name: str, of: str, steps: Steps, decoder: fi_compile.Decoder) -> None:
    """Figures of the parts of a mean step: the compiled graph, what surrounds it, and the ends of blocks."""
    plain = float(np.median(steps.without_block_ends(state_of(decoder).bank.block)))
    alone = compiled_alone(decoder)
    section.figure(f"{name}: compiled step alone", 1e6 * alone, "µs", of, note="median")
    section.figure(
        f"{name}: around it", 1e6 * (plain - alone), "µs", of, note="median of steps without tiles, less that"
    )
    section.figure(
        f"{name}: tiles", 1e6 * (steps.mean - plain), "µs", of, note="mean of all steps, less that median"
    )


def reading(nbytes: int) -> Callable[[], float]:
    """What times one read of so many bytes, as a step reads its weights: by the best of two ways to sum them.

    As in a generation they are read again and again, so that they may stay in a cache that is large enough.
    """
    values = torch.ones(-(-nbytes // 4))
    rows = values[: values.numel() // 1024 * 1024].view(-1, 1024)
    ways = (lambda: values.sum(), lambda: torch.mv(rows, rows[0]))
    best = min(ways, key=lambda way: timed(way, 20).median)
    return lambda: seconds_at(best)


def seconds_at(step: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a step that changes its state, after two that are not counted."""
    for _ in range(2):
        step()
    return float(np.median([once(step) for _ in range(repeats)]))
