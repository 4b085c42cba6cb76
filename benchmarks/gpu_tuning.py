"""Measure every form of every tile, and keep the table where decoders on this machine find it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_setting import Place, Setting, operands
from fi_compile.kernels import tuning
from fi_compile.kernels.gpu import ROUNDING
from fi_compile.kernels.tile import tile_reference
from fi_compile.mixers.tile_work import KeptSpectra
from fi_compile.mixers.triton_tiles import TritonTiles
from fi_compile.schedule import Tile


class Forced(TritonTiles):
    """Tiles in the form that is asked for."""

    wanted = "direct"

    def form(self, tile: Tile) -> str:
        """What is asked for."""
        return self.wanted


class _Run:
    """A tile in one form, on spectra of its own."""

    def __init__(
        self, form: str, tile: Tile, filters: Tensor, history: Tensor, pending: Tensor, precision: str
    ):
        self._tiles, self._kept = Forced(filters, None, None, precision=precision), KeptSpectra()
        self._tiles.wanted = form
        self._operands = tile, history, pending, self._kept

    def anew(self) -> None:
        """Every block is transformed."""
        self._kept.clear()
        self._tiles.add(*self._operands)

    def again(self) -> None:
        """Blocks that are kept are not."""
        self._tiles.add(*self._operands)


def tune(
    setting: Setting, place: Place, repeats: int, precision: str = "float32"
) -> dict[tuning.Key, Mapping[str, float]]:
    """Seconds of each offered form by key, for the tiles of a setting; forms that disagree raise SystemExit."""
    filters, rows = operands(setting, place.device)
    history, pending = (
        Forced(filters, None, None).new_state(setting.batch, setting.channels) for _ in range(2)
    )
    at = torch.arange(setting.length, device=place.device) % rows.shape[0]
    history.copy_(rows[at].permute(1, 2, 0))
    found = {}
    for side, blocks in itertools.product(setting.sides, (1, 2)):
        stop = side * blocks
        if stop + side > setting.length:
            continue
        tile = Tile(range(stop), range(stop, stop + side), side, reused=blocks > 1)
        seconds = {}
        for form in Forced(filters, None, None).offered(side):
            run = _Run(form, tile, filters, history, pending, precision)
            pending.zero_()
            run.anew()
            _compare(form, tile, history, pending, filters, precision)
            # Of two blocks a tile makes the spectra of one: half way between both and none.
            runs = (run.anew, run.again) if blocks > 1 else (run.again,)
            seconds[form] = statistics.mean(place.seconds(r, repeats) for r in runs)
        sizes = setting.channels, setting.batch, side, blocks
        found[tuning.architecture(place.device), precision, *sizes] = seconds
    return found


def _compare(
    form: str, tile: Tile, history: Tensor, pending: Tensor, filters: Tensor, precision: str
) -> None:
    """The last channel of the last row against the definition."""
    start, outputs = tile.outputs.start, min(tile.side, 256)
    y, k = history[-1:, -1:, :start].double(), filters[-1:, : start + outputs].double()
    wanted = tile_reference(y, k, outputs)
    error = float((pending[-1:, -1:, start : start + outputs] - wanted).abs().max())
    bound = 3 * torch.finfo(torch.float32).eps * float(y.norm() * k.norm())
    if precision != "float32" and form in ("matrix", "stream"):
        bound += ROUNDING[precision] * float(y.norm() * k.norm(p=1))
    if not error <= bound:
        raise SystemExit(f"tiles of {tile.side} by {form!r} are off by {error:.1e}: nothing is kept")


def tune_all(
    settings: Iterable[Setting],
    place: Place,
    repeats: int,
    path: Path | None,
    precisions: Sequence[str] = ("float32",),
) -> dict[str, object]:
    """Tune the settings that fit, save, and say what was chosen."""
    measured, skipped = {}, []
    for setting in settings:
        if setting.nbytes > place.room():
            skipped.append(f"{setting}: {setting.nbytes / 1e9:.0f} GB do not fit")
            continue
        for precision in precisions:
            measured.update(tune(setting, place, repeats, precision))
        print(f"tuned {setting}")
    where = tuning.save(measured, path)
    entries = [
        {
            **dict(zip((*tuning.NAMES, *tuning.SIZES), key, strict=True)),
            "seconds": dict(seconds),
        }
        for key, seconds in measured.items()
    ]
    print(f"{len(entries)} tiles measured, kept in {where}")
    return {"tiles": entries, "skipped": skipped}
