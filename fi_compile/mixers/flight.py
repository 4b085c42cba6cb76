"""Deferred tiles under way: every position does its share of them, so that none waits for a large one.

A tile of side S has S positions to be computed in, in pieces. Each position earns the sum over all tiles of their
work divided by their time, and spends it on the tile that is due first: served in this order all are done in time,
since equal shares would do. Source: docs/algorithms.md, "Deferred tiles".
"""

from __future__ import annotations

from dataclasses import dataclass

from .tile_work import TileWork


@dataclass
class _Flying:
    work: TileWork
    share: float  # operations a position
    done: int = 0

    @property
    def due(self) -> int:
        return self.work.tile.outputs.start

    @property
    def finished(self) -> bool:
        return self.done == self.work.count


class Flight:
    """The tiles of one state that have begun and are not due yet, at most one of each side."""

    def __init__(self) -> None:
        self._flying: dict[int, _Flying] = {}
        self._earned = 0.0
        self.operations = 0.0  # done so far, by tiles that were finished or not

    def launch(self, work: TileWork) -> None:
        """Begin a tile; the one of the same side before it must have been finished."""
        side = work.tile.side
        if side in self._flying:
            raise RuntimeError(
                f"tile {self._flying[side].work.tile} is under way and tile {work.tile} begins"
            )
        self._flying[side] = _Flying(work, work.total / side)

    def advance(self) -> None:
        """Do the share of one position."""
        self._earned += sum(flying.share for flying in self._flying.values())
        while self._earned > 0:
            waiting = [flying for flying in self._flying.values() if not flying.finished]
            if not waiting:
                self._earned = 0.0
                return
            self._run(min(waiting, key=lambda flying: flying.due))

    def finish(self, position: int | None = None) -> None:
        """Complete and forget what is due at `position`, or everything."""
        for flying in list(self._flying.values()):
            if position is None or flying.due <= position:
                while not flying.finished:
                    self._run(flying)
                del self._flying[flying.work.tile.side]

    def _run(self, flying: _Flying) -> None:
        flying.work.run(flying.done)
        operations = flying.work.operations(flying.done)
        flying.done += 1
        self._earned -= operations
        self.operations += operations

    def clear(self) -> None:
        """Drop everything: what was added to outputs so far is of no use."""
        self._flying.clear()
        self._earned = 0.0
