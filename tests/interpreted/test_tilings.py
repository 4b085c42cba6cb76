"""Every tiling and option with `kernels="triton"`: the state of a stack, its memory, and the decoder end to end."""

import math

import pytest
import torch
from host_reads import NoHostReads

import fi_compile
from decoding import EAGER, gap, ids, language_model
from fi_compile import costs as machine_costs
from fi_compile.costs import RADICES, choose_tiling
from fi_compile.gpu_costs import GpuCosts
from fi_compile.kernels import tile_forms
from fi_compile.kernels.block import block_sum
from fi_compile.kernels.channels import gathered
from fi_compile.mixers import tiles, triton_tiles
from fi_compile.mixers.reference import convolve
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.schedule import Tile
from guarded import rand

SOURCE, INDEX = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 2, 0])
CPU = torch.device("cpu")


@pytest.fixture
def matrices(monkeypatch):
    """Tiles on matrix units at every side, for which so small ones would not be chosen."""
    monkeypatch.setattr(tile_forms, "LARGEST", 0)
    monkeypatch.setattr(tile_forms, "torch_traffic", lambda *_: {"reads": math.inf, "writes": 0, "flops": 0})


def decode(state, inputs, stop, start=0):
    """The step in plain torch from the state's position on."""
    bank, outputs = state.bank, []
    while (t := state.position + state.dropped) < stop:
        j, u = torch.tensor([state.local]), inputs[:, :, t - start]
        now = u if bank.source is None else u[:, bank.source]
        terms = bank.skip * now + block_sum(state.block_inputs, bank.block_table, j, bank.source)
        sums, _ = gathered(terms, bank.target, 0, terms.shape[1])
        outputs.append(state.block_pending.index_select(0, j)[0] + sums)
        state.block_inputs.index_copy_(0, j, u[None])
        state.advance()
    return torch.stack(outputs, -1)


def assert_exact(found, inputs, filters, source=None, index=None, fan_in=1):
    filters = filters if index is None else filters[index]
    expected = convolve(inputs.double(), filters.double(), source, fan_in)
    scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max()
    error = (found.double() - expected).abs().max()
    assert error <= 3 * torch.finfo(torch.float32).eps * scale, float(error)


@pytest.mark.parametrize(
    ("radix", "deferred", "maps"),
    [
        (4, False, True),
        (8, False, False),
        (4, True, False),
        (2, False, "pairs"),
        (4, True, "pairs"),
        pytest.param(2, True, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("matrices")
def test_every_tiling_equals_the_direct_sum(radix, deferred, maps, monkeypatch):
    """Blocks whose spectra are kept, in pieces of four channels; a copy, which keeps none, goes on."""
    monkeypatch.setattr(triton_tiles, "_QUANTUM", 4)
    monkeypatch.setattr(machine_costs, "_SMALLEST_PIECE", 1)
    monkeypatch.setattr(machine_costs, "PIECE_OPERATIONS", 1 << 40)
    length, tiling = 45, {"radix": radix, "deferred": deferred}
    source, index = (SOURCE, INDEX) if maps else (None, None)
    target, fan_in, channels = None, 1, 3 if maps else 5
    if maps == "pairs":
        # Six outputs of two inputs each: pieces of four begin in the middle of the pairs.
        source, index, fan_in = SOURCE.repeat(3)[:12], INDEX.repeat(3)[:12], 2
        target = torch.arange(6).repeat_interleave(2)
    inputs = rand(2, channels, length, dtype=torch.float32)
    filters = rand(channels, length, dtype=torch.float32, seed=1)
    maps = source, index, target
    bank = FilterBank(filters, *maps, channels_in=channels, block=8, kernels="triton", **tiling)
    state = ConvState(bank, 2)
    found = decode(state, inputs, 30)
    copy = state.select_rows(torch.tensor([1, 0]))
    found = torch.cat([found, decode(copy, inputs[[1, 0]], length)[[1, 0]]], -1)
    assert_exact(found, inputs, filters, source, index, fan_in)
    predicted, forms = bank.predict_bytes(2), {bank.tiles.form(tile) for tile in bank.schedule(0)}
    assert forms == {"matrix"}
    with NoHostReads():
        while state.position < length - 1:
            state.advance()
    assert state.tiles_run == bank.schedule(0).count_tiles()
    assert state.nbytes == predicted["state"] + predicted["spectra of inputs"]
    assert bank.nbytes == predicted["filters"] + predicted["spectra of filters"]


def test_channels_that_meet_by_transforms_read_no_value_on_the_host(monkeypatch):
    """In float64 large tiles take torch's transforms, and sum pairs by their outputs."""
    monkeypatch.setattr(tile_forms, "LARGEST", 0)
    source, target = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    filters = rand(4, 64, dtype=torch.float64, seed=1)
    bank = FilterBank(filters, source, None, target, channels_in=2, block=8, kernels="triton", radix=4)
    inputs, state = rand(1, 2, 64, dtype=torch.float64), ConvState(bank, 1)
    assert {bank.tiles.form(tile) for tile in bank.schedule(0)} == {"fft"}
    # Names of channels that repeat are asked for on a CPU alone.
    monkeypatch.setattr(tiles, "transform", lambda x, s, n, a, b: torch.fft.rfft(x[:, s[a:b]], n=n))
    bank.tiles.prepare(bank.schedule(0))
    outputs = []
    while state.position < 64:
        t = state.position
        terms = bank.skip * inputs[:, source, t]
        terms += block_sum(state.block_inputs, bank.block_table, torch.tensor([state.local]), source)
        outputs.append(state.block_pending[state.local] + terms.unflatten(1, (2, 2)).sum(-1))
        state.block_inputs[state.local] = inputs[:, :, t]
        with NoHostReads():
            state.advance()
    assert_exact(torch.stack(outputs, -1), inputs, filters, source, None, 2)


@pytest.mark.parametrize(("radix", "deferred"), [(4, False), (2, True)])
def test_direct_tiles_of_several_blocks(radix, deferred):
    inputs, filters = rand(1, 2, 40, dtype=torch.float64), rand(2, 40, dtype=torch.float64, seed=1)
    bank = FilterBank(filters, channels_in=2, block=8, kernels="triton", radix=radix, deferred=deferred)
    assert {bank.tiles.form(tile) for tile in bank.schedule(0)} == {"direct"}
    state = ConvState(bank, 1)
    assert (decode(state, inputs, 40) - convolve(inputs, filters, None, 1)).abs().max() < 1e-12
    predicted = bank.predict_bytes(1)
    assert bank.nbytes == predicted["filters"] + predicted["spectra of filters"]


@pytest.mark.parametrize("prompt", [0, 30, 50])
@pytest.mark.usefixtures("matrices")
def test_half_of_the_state(prompt):
    """Inputs are given up half way, in their own memory."""
    inputs, filters = rand(2, 3, 64, dtype=torch.float32), rand(3, 64, dtype=torch.float32, seed=1)
    bank = FilterBank(filters, channels_in=3, block=8, kernels="triton", radix=4, keep_history=False)
    state = ConvState(bank, 2)
    assert bank.capacity == 32
    assert state.history is state.pending
    assert state.history.stride(1) == 1
    expected = convolve(inputs.double(), filters.double(), None, 1)
    if prompt:
        state.fill(inputs[:, :, :prompt])
    found = decode(state, inputs, 64)
    scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max()
    assert (found - expected[:, :, prompt:]).abs().max() <= 3 * torch.finfo(torch.float32).eps * scale
    assert state.dropped == max(32, prompt)


@pytest.mark.parametrize(
    "options",
    [{"radix": 4, "keep_history": False}, {"latency": "bounded"}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.usefixtures("matrices")
def test_a_decoder_under_every_option(options, without_gradients):
    """A prompt, steps, a way back and a fork, beside the model."""
    model = language_model("fft_scale_on_filter").float()
    sequence = ids(2, 44)
    expected = model(sequence)
    dec = fi_compile.decoder(
        model, sequence[:, :9], max_length=64, options={**EAGER, "kernels": "triton", "block": 8, **options}
    )
    assert gap(dec.prefill(sequence[:, :5]), expected[:, 4]) < 1e-4
    found = [dec.step(sequence[:, t]) for t in range(5, 36)]
    dec.rewind(22)
    other = dec.fork()
    found += [dec.step(sequence[:, t]) for t in range(22, 24)]
    assert gap(torch.stack(found, 1), torch.cat([expected[:, 5:36], expected[:, 22:24]], 1)) < 1e-4
    assert gap(other.step(sequence[:, 22]), expected[:, 22]) < 1e-4
    bank = dec.engine.derived(2).bank
    assert {bank.tiles.form(tile) for tile in bank.schedule(0)} == {"matrix"}
    assert (bank.radix, bank.deferred, bank.halved) == (4, "latency" in options, "radix" in options)
    channels = bank.channels_out
    costs = GpuCosts(torch.float32, CPU)
    given = {"radix": 4, "block": 8, "latency": options.get("latency", "throughput")}
    assert dec.report.tiling == choose_tiling(costs, 64, channels, **given)


def test_tilings_are_chosen_by_predicted_time():
    """Tiles on matrix units are bound by memory: products cost what a transform does, until torch takes over."""
    one, double = (GpuCosts(dtype, CPU) for dtype in (torch.float32, torch.float64))
    assert choose_tiling(one, 1 << 15, 768).radix == 2
    assert choose_tiling(one, 1 << 20, 18 * 768).radix > 2
    assert choose_tiling(double, 1 << 17, 18 * 768).radix > 2
    for radix in RADICES:
        tiling = choose_tiling(one, 1 << 15, 768, block=32, radix=radix)
        assert tiling.seconds == one.seconds_per_token(tiling.schedule(1 << 15), 768, 32)


def test_all_tiles_of_a_side_take_one_form():
    """A spectrum that one tile kept is of use to the next, be it the last one, cut short at the capacity."""
    tiles = triton_tiles.TritonTiles(torch.zeros(1, 1), None, None)
    for side in (128, 256, 1024, 4096):
        forms = set()
        for n in (1, 2, 3):
            outputs = range(4 * side, 4 * side + (side if n < 3 else 8))
            forms.add(tiles.form(Tile(range((4 - n) * side, 4 * side), outputs, side, n < 3)))
        assert len(forms) == 1
