"""Measure every form of every tile, and keep the table where decoders on this machine find it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.gpu_setting import Place, Setting, operands
from fi_compile.kernels import tuning
from fi_compile.kernels.tile import tile_reference
from fi_compile.mixers.triton_tiles import TritonTiles
from fi_compile.schedule import Tile


class Forced(TritonTiles):
    """Tiles in the form that is asked for."""

    wanted = "direct"

    def form(self, tile: Tile) -> str:
        """What is asked for."""
        return self.wanted


def tune(setting: Setting, place: Place, repeats: int) -> dict[tuning.Key, Mapping[str, float]]:
    """Seconds of each offered form by key, for the tiles of a setting; forms that disagree raise SystemExit."""
    filters, rows = operands(setting, place.device)
    tiles = Forced(filters, None, None)
    history, pending = (tiles.new_state(setting.batch, setting.channels) for _ in range(2))
    at = torch.arange(setting.length, device=place.device) % rows.shape[0]
    history.copy_(rows[at].permute(1, 2, 0))
    found = {}
    for side in setting.sides:
        if 2 * side > setting.length:
            continue
        tile, seconds = Tile(range(side), range(side, 2 * side)), {}
        for form in tiles.offered(side):
            tiles.wanted = form
            pending.zero_()
            tiles.add(tile, history, pending)
            _compare(form, side, history, pending, filters)
            seconds[form] = place.seconds(lambda t=tile: tiles.add(t, history, pending), repeats)
        found[tuning.architecture(place.device), setting.channels, setting.batch, side] = seconds
    return found


def _compare(
    form: str, side: int, history: torch.Tensor, pending: torch.Tensor, filters: torch.Tensor
) -> None:
    """The last channel of the last row against the definition."""
    outputs = min(side, 256)
    y, k = history[-1:, -1:, :side].double(), filters[-1:, : 2 * side].double()
    wanted = tile_reference(y, k, outputs)
    error = float((pending[-1:, -1:, side : side + outputs] - wanted).abs().max())
    if not error <= 3 * torch.finfo(torch.float32).eps * float(y.norm() * k.norm()):
        raise SystemExit(f"tiles of {side} by {form!r} are off by {error:.1e}: nothing is kept")


def tune_all(settings: Iterable[Setting], place: Place, repeats: int, path: Path | None) -> dict[str, object]:
    """Tune the settings that fit, save, and say what was chosen."""
    measured, skipped = {}, []
    for setting in settings:
        if setting.nbytes > place.room():
            skipped.append(f"{setting}: {setting.nbytes / 1e9:.0f} GB do not fit")
            continue
        measured.update(tune(setting, place, repeats))
        print(f"tuned {setting}")
    where = tuning.save(measured, path)
    entries = [
        {
            "architecture": key[0],
            "channels": key[1],
            "batch": key[2],
            "side": key[3],
            "seconds": dict(seconds),
        }
        for key, seconds in measured.items()
    ]
    print(f"{len(entries)} tiles measured, kept in {where}")
    return {"tiles": entries, "skipped": skipped}
