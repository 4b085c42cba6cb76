"""The choice of a tiling by cost, and the cache of measured rates."""

import gc
import json
from dataclasses import asdict, replace

import pytest
import torch

import fi_compile
from decoding import decoder, ids, language_model
from fi_compile import costs, rates
from fi_compile.costs import BUILTIN, BUILTIN_NATIVE, choose_tiling
from fi_compile.extension import lanes
from fi_compile.mixers.lane_tiles import LaneTiles
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.schedule import Schedule


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A cache of our own, and a machine that is measured in no time."""
    monkeypatch.delenv("FLASHINF_COSTS")
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path / "deep" / "er"))
    rates._rates.cache_clear()
    monkeypatch.setattr(rates, "measure_rates", Measured())
    yield rates.cache_file()
    rates._rates.cache_clear()


class Measured:
    """Counts measurements; each finds other rates."""

    count = 0

    def __call__(self, native):
        Measured.count += 1
        return replace(BUILTIN_NATIVE if native else BUILTIN, row=BUILTIN.row * (1 + Measured.count))


def another_process():
    rates._rates.cache_clear()


def test_rates_are_measured_once_and_read_by_later_processes(file):
    found, before = rates.rates_of_machine(), Measured.count
    assert rates.rates_of_machine() is found
    another_process()
    assert rates.rates_of_machine() == found
    assert Measured.count == before
    content = json.loads(file.read_text())
    assert content["version"] == rates.VERSION
    assert content["rates"] == {str(torch.get_num_threads()): json.loads(json.dumps(asdict(found)))}


def test_rates_of_compiled_tiles_are_their_own(file):
    found = [rates.rates_of_machine(native) for native in (False, True)]
    assert [r.native for r in found] == [False, True]
    another_process()
    assert [rates.rates_of_machine(native) for native in (False, True)] == found


def test_other_numbers_of_threads_are_measured_apart(file, monkeypatch):
    one = rates.rates_of_machine()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    other = rates.rates_of_machine()
    assert one != other
    another_process()
    assert rates.rates_of_machine() == other
    assert len(json.loads(file.read_text())["rates"]) == 2


def spoil(content, flaw):
    some = next(iter(content["rates"].values()))
    match flaw:
        case "older":
            content["version"] -= 1
        case "foreign":
            content["machine"] = "another processor"
        case "rate missing":
            del some["piece"]
        case "rate of no sense":
            some["tile"][0] = -1.0
        case "not a number":
            some["row"] = float("nan")
        case "other tiles":
            some["sides"][0] = 7
        case "a list":
            return json.dumps([content])
        case "cut short":
            return json.dumps(content)[:-20]
        case "not text":
            return b"\xff\x00"
    return json.dumps(content)


@pytest.mark.parametrize(
    "flaw",
    [
        "older", "foreign", "rate missing", "rate of no sense", "not a number", "other tiles", "a list",
        "cut short", "not text",
    ],
)  # fmt: skip
def test_a_cache_that_is_not_ours_is_measured_anew(file, flaw):
    found = rates.rates_of_machine()
    spoiled = spoil(json.loads(file.read_text()), flaw)
    file.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    another_process()
    with pytest.warns(fi_compile.FlashinfWarning, match="measured anew"):
        anew = rates.rates_of_machine()
    assert anew != found
    another_process()
    assert rates.rates_of_machine() == anew


def test_a_cache_that_cannot_be_written_is_no_error(file, monkeypatch):
    file.parent.parent.write_text("a file where a folder should be")
    found = rates.rates_of_machine()
    assert rates.rates_of_machine() is found


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHINF_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.cache_file() == tmp_path / "flashinf" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert rates.cache_file() == tmp_path / "home" / ".cache" / "flashinf" / "costs.json"


def test_built_in_constants_touch_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path))
    assert rates.rates_of_machine() is BUILTIN
    assert rates.rates_of_machine(native=True) is BUILTIN_NATIVE
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_this_machine_can_be_measured():
    for native in (False, *[True] * (lanes() is not None)):
        found = rates.measure_rates(native)
        assert found.native == native
        assert len(found.tile) == len(found.block) == len(found.sides)
        assert all(0 < x < 1e-4 for x in (*found.tile, found.direct, found.row, found.piece))
        assert 0 < found.end < 1e-2
        assert 0 < 16 * found.load + found.column < 1e-5


@pytest.mark.parametrize("radix", [2, 4])
def test_seconds_are_counted_tile_by_tile(radix):
    schedule, channels = Schedule(32, 5000, 0, radix), 100
    expected = 0.0
    for tile in schedule:
        expected += min(BUILTIN.tile_seconds(tile.side, len(tile.blocks), channels).values())
        if radix > 2:
            keeping = BUILTIN.tile_seconds(tile.side, 2, channels)["fft"]
            keeping -= BUILTIN.tile_seconds(tile.side, 1, channels)["fft"]
            expected += keeping * len(tile.blocks) / radix
    ends = (BUILTIN.end + channels * 2 * BUILTIN.column) / 32
    expected = expected / 5000 + ends + channels * (2 * BUILTIN.load + 32 * BUILTIN.row)
    assert BUILTIN.seconds_per_token(schedule, channels, 32) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("capacity", [1, 100, 4096, 65536])
@pytest.mark.parametrize("channels", [4, 512, 2048])
def test_the_choice_is_the_cheapest_the_options_leave(capacity, channels):
    """A higher radix, whose spectra take more memory, has to be a tenth faster."""

    def weighed(tiling):
        return tiling.seconds * (1.1 if tiling.radix > 2 else 1)

    free = choose_tiling(BUILTIN, capacity, channels)
    for block in costs.BLOCKS:
        for radix in costs.RADICES:
            one = choose_tiling(BUILTIN, capacity, channels, block=block, radix=radix)
            assert (one.block, one.radix, one.deferred) == (block, radix, False)
            assert weighed(free) <= weighed(one)
    given = choose_tiling(BUILTIN, capacity, channels, block=7, latency="bounded")
    assert (given.block, given.deferred) == (8, True)


def test_costs_decide():
    """Dear products favour the dyadic tiling, dear transforms a high radix, dear ends a large base block."""
    dear = tuple(x * 20 for x in BUILTIN.tile)
    assert choose_tiling(replace(BUILTIN, block=dear), 65536, 2048).radix == 2
    assert choose_tiling(replace(BUILTIN, tile=dear), 65536, 2048).radix == 8
    assert choose_tiling(replace(BUILTIN, piece=1e-2), 65536, 16).block == 64
    assert choose_tiling(replace(BUILTIN, end=1e-2), 65536, 16).block == 64
    assert choose_tiling(replace(BUILTIN, column=1e-6), 65536, 2048).block == 64
    assert choose_tiling(replace(BUILTIN, row=1e-6), 65536, 2048).block == 16


@pytest.mark.parametrize(
    ("maps", "tiling"),
    [
        (None, (2, False)),
        (None, (8, False)),
        (None, (4, True)),
        ([0, 1, 1, 0], (4, False)),
        ([0, 0, 1], (4, True)),
    ],
)
@pytest.mark.parametrize("capacity", [700, 1024])
def test_predicted_bytes_are_those_of_a_whole_sequence(maps, tiling, capacity):
    source = None if maps is None else torch.tensor(maps)
    channels = 3 if maps is None else 2
    filters = torch.randn(channels if maps is None else len(maps), capacity)
    radix, deferred = tiling
    bank = FilterBank(filters, source, channels_in=channels, block=32, radix=radix, deferred=deferred)
    state = ConvState(bank, 2)
    for _ in range(capacity):
        state.advance()
    predicted = bank.predict_bytes(2)
    assert state.nbytes == predicted["state"] + predicted["spectra of inputs"]
    assert bank.nbytes == predicted["filters"] + predicted["spectra of filters"]


def test_the_report_says_what_was_chosen_and_predicted():
    model = language_model("fft_scale_on_filter", width=4)
    report = decoder(model, ids(2, 9), max_length=200).report
    builtin = BUILTIN if lanes() is None else BUILTIN_NATIVE
    tiling = choose_tiling(builtin, 200, 4, double=True)
    assert report.tiling == tiling
    assert report.schedule == tiling.schedule(200)
    assert f"chosen: {tiling}" in str(report)
    assert "bytes: " in str(report)
    assert f"{report.bytes_of_mixing['state']:,} state" in str(report)


@pytest.mark.skipif(lanes() is None, reason="needs a compiler")
def test_a_tile_is_measured_as_it_is_run(monkeypatch):
    """All threads share it; of its pieces the largest tiles' are too narrow for more than one."""
    monkeypatch.setattr(LaneTiles, "begin", None)
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    assert 0 < rates._time_tile(LaneTiles, torch.randn(3, 1 << 14), 64, 3) < 1e-5


def test_no_copy_in_double_precision_outlives_the_analysis():
    """Moved weights, the weights themselves and what they are on samples are made for the analysis alone."""
    model = language_model("fft_scale_on_filter", width=4).float()
    model.unused = torch.nn.Embedding(5003, 16)
    model.register_forward_hook(lambda model, args, logits: logits + model.unused.weight[:1, :1])

    def copies() -> int:
        gc.collect()
        alive = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.float64)
        return sum(o.numel() >= 5003 * 16 for o in alive)

    found = decoder(model, ids(2, 9), capacity=16)
    assert copies() == 0
    for token in ids(2, 20).T:  # beyond the capacity
        found.step(token)
    assert copies() == 0
    found.reorder([1, 0])
    assert copies() == 0
    with torch.no_grad():
        model.unused.weight.add_(1)
    found.reset()
    assert copies() == 0


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"block": "large"}, {"radix": 1}, {"radix": 2.0}, {"latency": "low"}, {"block": True}],
)
def test_options_of_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(fi_compile.InputError, match=f"option {name}="):
        decoder(language_model("fft_scale_on_filter"), ids(2, 9), **options)
