"""Tiles compiled for this processor: against the definition, at awkward sizes, and as the state runs them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_compile import InputError, extension
from fi_compile.kernels.tile import tile_reference
from fi_compile.kernels.tile_lanes import SMALLEST, grain_of, one_by_one, task_costs
from fi_compile.mixers.lane_tiles import LaneTiles
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.mixers.tiles import choose_kernels
from fi_compile.schedule import Tile
from guarded import assert_close, rand, untouched

CODE = extension.lanes()
pytestmark = pytest.mark.skipif(CODE is None, reason="no C++ compiler")

UNITS = 3.0  # of eps · ‖inputs‖ · ‖filter‖
DTYPES = [torch.float32, torch.float64]


def fenced(values):
    """Values [B, C, T] as a view with contiguous positions, and the memory around it filled with sevens."""
    b, c, t = values.shape
    around = values.new_full((b + 2, c + 2, t + 6), 7.0)
    view = around[1 : 1 + b, 1 : 1 + c, 3 : 3 + t]
    view.copy_(values)
    return view, around


def scale(inputs, filters, before=0.0):
    return inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max() + before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("side", "channels", "batch"),
    [
        *((side, *few) for side in (16, 32, 64, 128, 256, 512) for few in ((1, 1), (16, 3), (37, 2))),
        *((1024, 17, 1), (4096, 1, 2)),  # through caches
    ],
)
def test_a_tile_is_its_definition(side, channels, batch, dtype):
    """Any number of channels, clipped outputs, inputs further off; nothing beside the outputs is touched."""
    history = rand(batch, channels, 3 * side, dtype=dtype)
    filters = rand(channels, 4 * side, dtype=dtype, seed=1)
    for length, distance in ((side, 1), (side - 5, 2), (1, 1)):
        start = (2 - distance) * side + 1  # inputs that are not aligned
        inputs, gap = history[:, :, start : start + side], (distance - 1) * side
        before = rand(batch, channels, length, dtype=dtype, seed=2)
        expected = before + tile_reference(inputs.double(), filters.double(), length, gap=gap)
        spectra = CODE.spectra(filters, side, distance)
        for add, what in (
            (CODE.tile, ([(start, spectra)],)),
            (CODE.tile_once, (start, distance, filters)),
        ):
            outputs, around = fenced(before)
            add(outputs, history, side, *what).add()
            assert untouched(around, outputs)
            assert_close(outputs, expected, scale(inputs, filters, before.abs().max()), UNITS)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tile_is_its_definition(data):
    """Several blocks, maps of channels, shared filters, ranges of channels, lags that end within the tile."""
    dtype = data.draw(st.sampled_from(DTYPES))
    lanes = CODE.lanes(dtype)
    side = 1 << data.draw(st.integers(4, 9))
    length, count = data.draw(st.integers(1, side)), data.draw(st.integers(1, 3))
    batch, inputs, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    channels = (groups - 1) * lanes + data.draw(st.integers(1, lanes))
    mapped = data.draw(st.booleans())
    source = (
        torch.randint(inputs, (channels,), generator=torch.Generator().manual_seed(side)) if mapped else None
    )
    history = rand(batch, inputs if mapped else channels, count * side, dtype=dtype)
    known = data.draw(st.integers(1, (count + 1) * side))  # lags beyond them are zero
    shared = torch.arange(groups) % 2 if data.draw(st.booleans()) else None
    filters = rand(channels if shared is None else 2, known, dtype=dtype, seed=1)
    index = None if shared is None else shared.repeat_interleave(lanes)[:channels]
    padded = torch.nn.functional.pad(filters, (0, (count + 1) * side - known))
    blocks = []
    for start in range(0, count * side, side):
        spectra = CODE.spectra(filters, side, count - start // side)
        blocks.append((start, spectra if shared is None else one_by_one(spectra, 2)))
    before = rand(batch, channels, length, dtype=dtype, seed=2)
    expected = before + tile_reference(history.double(), padded.double(), length, source, index)
    first = lanes * data.draw(st.integers(0, groups - 1))
    outputs, around = fenced(before)
    CODE.tile(outputs, history, side, blocks, source, shared).add((first, channels))
    assert untouched(around, outputs)
    assert torch.equal(outputs[:, :first], before[:, :first])
    units = scale(history, filters, before.abs().max())
    assert_close(outputs[:, first:], expected[:, first:], units, UNITS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "grain"), [(64, 16), (128, 8), (256, 4), (1024, 64), (4096, 1024)])
def test_a_tile_in_parts_is_the_same(side, grain, dtype):
    """Task by task, on memory that holds anything at first, in rows and groups that do not know of each other."""
    lanes = CODE.lanes(dtype)
    history, filters = (
        rand(2, lanes + 3, 2 * side, dtype=dtype),
        rand(lanes + 3, 3 * side, dtype=dtype, seed=1),
    )
    blocks = [(start, CODE.spectra(filters, side, 2 - start // side)) for start in (0, side)]
    before = rand(2, lanes + 3, side - 3, dtype=dtype, seed=2)
    whole, (parts, around) = before.clone(), fenced(before)
    CODE.tile(whole, history, side, blocks).add()
    call = CODE.tile(parts, history, side, blocks)
    work = torch.full(CODE.work_shape(side, dtype), torch.nan, dtype=dtype)
    costs = task_costs(side, 2, grain)
    for row in range(2):
        for first in range(0, lanes + 3, lanes):
            last = min(first + lanes, lanes + 3)
            for task in range(len(costs)):
                call.add_part(row, (first, last), (task, task + 1), grain, work)
    assert untouched(around, parts)
    assert torch.equal(parts, whole)


def test_grains():
    assert [grain_of(4096, n) for n in (1e9, 1024, 1000, 64, 0)] == [1024, 1024, 256, 64, 16]
    assert [grain_of(32, n) for n in (1e9, 0)] == [8, 8]
    # Finer tasks are more of them, of the same work.
    assert sum(task_costs(4096, 2, 1024)) == pytest.approx(sum(task_costs(4096, 2, 64)))
    assert max(task_costs(4096, 2, 64)) < max(task_costs(4096, 2, 1024)) / 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_channels_share_nothing(bad):
    """What one channel holds does not reach another, not even as rounding."""
    history, filters = rand(1, 20, 64, dtype=torch.float32), rand(20, 128, dtype=torch.float32, seed=1)
    clean, spoiled = torch.zeros(2, 1, 20, 64).unbind(0)
    spectra = CODE.spectra(filters, 64)
    CODE.tile(clean, history, 64, [(0, spectra)]).add()
    history[0, 3] = bad
    CODE.tile(spoiled, history, 64, [(0, spectra)]).add()
    others = [c for c in range(20) if c != 3]
    assert torch.equal(clean[:, others], spoiled[:, others])
    assert not torch.equal(clean[:, 3], spoiled[:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "channels"), [(16, 16), (32, 37), (5, 3), (1, 64)])
def test_blocks_move_between_rows_and_columns(positions, channels, dtype):
    rows = rand(positions, 2, channels, dtype=dtype)
    columns, around = fenced(torch.zeros(2, channels, positions, dtype=dtype))
    CODE.move(rows, columns, into_columns=True)
    assert torch.equal(columns, rows.permute(1, 2, 0))
    assert untouched(around, columns)
    back = torch.zeros_like(rows)
    CODE.move(back, columns, into_columns=False)
    assert torch.equal(back, rows)


def test_threads_change_nothing(monkeypatch):
    history, filters = rand(1, 300, 2048, dtype=torch.float32), rand(300, 4096, dtype=torch.float32, seed=1)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outputs = torch.zeros(1, 300, 2048)
        CODE.tile(outputs, history, 2048, [(0, CODE.spectra(filters, 2048))]).add()
        found.append(outputs)
    assert torch.equal(*found)


def tile(side, outputs=None, blocks=1):
    end = side * blocks
    return Tile(range(0, end), range(end, end + (outputs or side)), side)


@pytest.mark.parametrize(
    ("index", "side", "form"),
    [
        (None, SMALLEST, "lanes"),
        (None, 4096, "lanes"),
        (None, SMALLEST // 2, "direct"),
        (None, 3 * 256, "fft"),  # no power of two
        ([0] * 16 + [1] * 20, 64, "lanes"),  # every group of lanes has one filter
        ([0] * 15 + [1] * 21, 1024, "fft"),
    ],
)
def test_what_is_served_and_what_is_torchs(index, side, form):
    index = None if index is None else torch.tensor(index)
    filters = rand(36 if index is None else 2, 4 * side, dtype=torch.float32)
    assert LaneTiles(filters, None, index).form(tile(side)) == form


@pytest.mark.parametrize("radix", [2, 4])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("index", [None, [0] * 16 + [2] * 16 + [1] * 5])
def test_a_state_runs_by_either(radix, deferred, index, monkeypatch):
    """The same sequence by torch's tiles and by these; every tile at the capacity is clipped."""
    monkeypatch.setattr("fi_compile.costs._SMALLEST_PIECE", 256)  # deferred tiles in parts of a group
    capacity, channels = 700, 37
    filters = rand(channels if index is None else 3, capacity) / 20
    index = None if index is None else torch.tensor(index)
    inputs, found = rand(2, channels, capacity, seed=1), []
    for kernels in ("torch", "native"):
        bank = FilterBank(
            filters,
            None,
            index,
            channels_in=channels,
            block=32,
            radix=radix,
            deferred=deferred,
            kernels=kernels,
        )
        assert isinstance(bank.tiles, LaneTiles) == (kernels == "native")
        state, pending = ConvState(bank, 2), []
        for t in range(capacity):
            pending.append(state.block_pending[state.local].clone())
            state.block_inputs[state.local] = inputs[:, :, t]
            state.advance()
        found.append(torch.stack(pending))
        assert bool(state._kept._rooms) == (deferred and kernels == "native")
        predicted = bank.predict_bytes(2)
        assert bank.nbytes == predicted["filters"] + predicted["spectra of filters"]
        assert state.nbytes == predicted["state"] + predicted["spectra of inputs"]
    assert found[1].abs().max() > 0.1
    assert (found[0] - found[1]).abs().max() < 1e-13 * found[0].abs().max() * 100


def test_who_runs_the_tiles(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_kernels("auto", cpu) == choose_kernels("native", cpu) == "native"
    assert choose_kernels("torch", cpu) == "torch"
    with pytest.raises(InputError, match="on the CPU"):
        choose_kernels("native", torch.device("cuda"))
    monkeypatch.setattr("fi_compile.mixers.tiles.lanes", lambda: None)
    assert choose_kernels("auto", cpu) == "torch"
    with pytest.raises(InputError, match="compiler"):
        choose_kernels("native", cpu)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(extension, "_found_lanes", [])
    return tmp_path


def test_one_that_computes_wrongly_is_not_used(fresh, monkeypatch, caplog):
    monkeypatch.setattr(extension, "tile_reference", lambda *given: tile_reference(*given) + 1)
    with caplog.at_level("INFO"):
        assert extension.lanes() is None
    assert "not those of the definition" in caplog.text


def test_without_a_compiler_there_are_none(fresh, monkeypatch, caplog):
    monkeypatch.setattr(extension, "_FLAGS", ("--no-such-flag",))
    with caplog.at_level("INFO"):
        assert extension.lanes() is None
    assert "no-such-flag" in caplog.text
