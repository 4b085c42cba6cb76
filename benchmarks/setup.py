"""How large a run is, and what every measurement is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import fi_compile

from .models import decoder_for
from .results import Section, Target


@dataclass(frozen=True)
class Sizes:
    """Lengths L in positions, widths in channels.

    ``channels`` and ``lengths``: mixing alone. ``tile_lengths``: the growth of tile time. ``width`` × ``layers``: the
    model decoded, to each of ``decoded``. ``orders``, ``crossover``: recurrences against tiles. ``options``: those of
    every decoder.
    """

    channels: int = 2048
    lengths: tuple[int, ...] = (1 << 16, 1 << 17)
    tile_lengths: tuple[int, ...] = tuple(1 << p for p in range(13, 18))
    width: int = 256
    layers: int = 8
    decoded: tuple[int, ...] = (1 << 16, 1 << 17)
    small_width: int = 64
    small_length: int = 1 << 14
    growing: int = 1 << 14
    prefill: int = 1 << 15
    memory: int = 1 << 17
    latency: int = 1 << 16
    depths: tuple[int, int] = (4, 32)
    depth_width: int = 256
    depth_length: int = 1 << 11
    batch: int = 8
    batch_length: int = 1 << 12
    orders: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    crossover: tuple[int, ...] = tuple(1 << p for p in range(10, 18))
    crossover_channels: int = 512
    repeats: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)


SIZES = {
    "full": Sizes(),
    "quick": Sizes(
        channels=256,
        lengths=(1 << 13,),
        tile_lengths=(1 << 11, 1 << 12, 1 << 13),
        width=64,
        layers=2,
        decoded=(1 << 12,),
        small_length=1 << 12,
        growing=1 << 10,
        prefill=1 << 12,
        memory=1 << 12,
        latency=1 << 12,
        depths=(1, 2),
        depth_width=64,
        depth_length=1 << 9,
        batch_length=1 << 10,
        orders=(4, 16, 64),
        crossover=(1 << 10, 1 << 11, 1 << 12),
        crossover_channels=128,
        repeats=3,
    ),
}


@dataclass
class Bench:
    """What a measurement is given: sizes, and where its figures go."""

    sizes: Sizes
    mode: str
    section: Section
    quiet: bool = False
    write: Callable[[], object] = lambda: None
    started: float = field(default_factory=time.perf_counter)

    @property
    def full(self) -> bool:
        """Whether sizes are those that targets are stated for."""
        return self.mode == "full"

    def target(self, relation: str, value: float) -> Target | None:
        """A target, which is stated for the full sizes only."""
        return Target(relation, value) if self.full else None

    def decoder(self, model: nn.Module, length: int, batch: int = 1, **options: Any) -> fi_compile.Decoder:
        """A compiled decoder of a model, at position 0."""
        return decoder_for(model, length, batch, **{**self.sizes.options, **options})

    def say(self, text: str) -> None:
        """A line of progress; what was found so far is written."""
        self.write()
        if not self.quiet:
            print(f"[{time.perf_counter() - self.started:7.1f} s] {self.section.name}: {text}", flush=True)
