"""Measured tables of tiles, and the command that measures them."""

import json
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fi_compile.errors import FlashinfWarning
from fi_compile.kernels import tuning
from fi_compile.mixers.tile_work import KeptSpectra
from fi_compile.mixers.tiles import TorchTiles
from fi_compile.mixers.triton_tiles import TritonTiles
from fi_compile.schedule import Tile

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import gpu

KEY = ("interpreted", "float32", 2, 1, 32, 1)
SECONDS = {"direct": 3e-5, "matrix": 1e-5, "fft": 2e-5}


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """Where the table lies, in a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tuning.cache_path()


def form(side: int = 32, length: int | None = None, batch: int = 1, channels: int = 2) -> str:
    """The form that is chosen for a tile when its state has `batch` rows."""
    tiles = TritonTiles(torch.zeros(channels, 4 * side), None, None)
    tile = Tile(range(side), range(side, side + (side if length is None else length)))
    state = tiles.new_state(batch, channels)
    tiles._run = tiles.begin = Mock()
    tiles.add(tile, state, state.clone())
    return tiles.form(tile)


def test_what_was_measured_is_chosen(path):
    assert form() == "direct"
    tuning.save({KEY: SECONDS})
    assert tuning.load().tiles == {KEY: SECONDS}
    assert form() == "matrix"
    # Another side, batch or number of channels, and tiles cut short, were not measured.
    assert form(64) == form(length=5) == form(batch=2) == form(channels=3) == "direct"
    tuning.save({KEY: {**SECONDS, "fft": 1e-6}, (*KEY[:4], 64, 1): SECONDS})
    assert form() == "fft"
    assert form(64) == "matrix"
    # A form that was not measured might be faster.
    tuning.save({KEY: {"matrix": 1e-6}})
    assert form() == "direct"


def test_a_table_for_channels_through_maps(path):
    tuning.save({KEY: SECONDS})
    tile = Tile(range(32), range(32, 64))
    for maps in ((torch.tensor([0, 0]), None), (None, torch.tensor([0, 0]))):
        assert TritonTiles(torch.zeros(1, 64), *maps).form(tile) == "matrix"
        assert TritonTiles(torch.zeros(2, 64), *(None if m is None else m.repeat(2) for m in maps)).form(
            tile
        ) == ("direct")


def test_tiles_that_keep_spectra_have_entries_of_their_own(path):
    """All of a side take one form, whether whole or cut short, for each number of rows its own."""
    tuning.save({KEY: SECONDS, (*KEY[:5], 2): {**SECONDS, "fft": 1e-6}, (*KEY[:3], 2, 32, 2): SECONDS})
    tiles = TritonTiles(torch.zeros(2, 256), None, None)
    found = []
    for batch, length in ((1, 32), (1, 5), (2, 32)):
        state = tiles.new_state(batch, 2)
        tile = Tile(range(64), range(64, 64 + length), 32, reused=True)
        work = tiles.begin(tile, state, state.clone(), KeptSpectra())
        found.append((tiles.form(tile), type(work).__module__))
    assert found == [("fft", TorchTiles.__module__)] * 2 + [("matrix", TritonTiles.__module__)]
    # Where channels meet nothing was measured.
    meeting = TritonTiles(torch.zeros(2, 256), None, None, torch.tensor([0, 0]))
    assert meeting.form(tile) == "direct"


@pytest.mark.parametrize("change", [{"format": 1}, {"versions": {"torch": "1.0", "triton": "2.0"}}])
def test_a_foreign_table_counts_as_none(path, change):
    tuning.save({KEY: SECONDS})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert form() == "direct"
    # And is replaced, not mixed with.
    tuning.save({(*KEY[:4], 64, 1): SECONDS})
    assert set(tuning.load().tiles) == {(*KEY[:4], 64, 1)}


def _entry(text: str, **change) -> str:
    table = json.loads(text)
    table["tiles"][0].update(change)
    return json.dumps(table)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: '{"format": "one"}',
        lambda text: json.dumps({**json.loads(text), "tiles": 3}),
        lambda text: _entry(text, side=-1),
        lambda text: _entry(text, side="32"),
        lambda text: _entry(text, seconds={"direct": "NaN"}),
        lambda text: _entry(text, seconds={"direct": 0.0}),
        lambda text: _entry(text, seconds=None),
        lambda text: _entry(text, architecture=None),
        lambda text: _entry(text, precision=None),
    ],
)
def test_a_corrupt_table_warns_and_the_datasheet_decides(path, spoil):
    tuning.save({KEY: SECONDS})
    path.write_text(spoil(path.read_text()))
    with pytest.warns(
        FlashinfWarning, match=r"tiles\.json is no table of tiles: .*python -m benchmarks\.gpu"
    ):
        assert form() == "direct"
    tuning.save({KEY: SECONDS})
    assert form() == "matrix"


def test_a_table_that_cannot_be_read_warns(path):
    path.mkdir(parents=True)
    with pytest.warns(FlashinfWarning, match="no table of tiles"):
        assert form() == "direct"


def test_the_command_at_toy_sizes(path, tmp_path, monkeypatch, capsys):
    """Tuning, mixers, whole models, files: everything but the tests, which need a GPU."""
    monkeypatch.setattr(gpu, "run_tests", lambda: 0)
    out = tmp_path / "out"
    assert gpu.main(["--tiny", "--precisions", "float32", "tf32", "--output", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["means nothing"]
    assert not path.exists()
    table = tuning.load(out / "tiles.json").tiles
    tiles = ((8, 1), (8, 2), (16, 1))
    assert set(table) == {
        ("interpreted", precision, 3, batch, *tile)
        for precision in ("float32", "tf32")
        for batch in (1, 2)
        for tile in tiles
    }
    schemes = {"lazy", "eager", "published", "torch", "flashinf"}
    for kind, more in (("mixers", set()), ("end_to_end", {"naive"})):
        for setting in found[kind]:
            assert set(setting) == {"setting", *schemes, *more}
            for name in schemes | more:
                assert set(setting[name]["seconds"]) == {"4", "8", "16", "32"}
                # A composed figure is a difference, which the noise of toy sizes may turn round.
                assert setting[name]["seconds"]["32"] > 0 or setting[name].get("composed")
    assert found["mixers"][0]["published"]["tiles"] == {"1": 16, "2": 8, "4": 4, "8": 2, "16": 1}
    assert found["mixers"][0]["flashinf"]["tiles"] == {"8": 2, "16": 1}
    assert "results are in" in capsys.readouterr().out


def test_no_figures_where_tests_or_results_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda: 1)
    assert gpu.main(["--tiny", "--output", str(tmp_path)]) == 1
    assert "mixers" not in json.loads((tmp_path / "results.json").read_text())
    monkeypatch.setattr(gpu, "run_tests", lambda: 0)
    from fi_compile.kernels import tile_direct

    monkeypatch.setattr(tile_direct, "lag_table", lambda filters, side: filters.t().contiguous().roll(1, 0))
    with pytest.raises(SystemExit, match=r"tiles of 8 by 'direct' are off .* nothing is kept"):
        gpu.main(["--tiny", "--output", str(tmp_path)])
    assert not (tmp_path / "tiles.json").exists()
