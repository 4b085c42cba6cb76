"""The decoder with `kernels="triton"`, end to end, and the stack beneath it."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from host_reads import NoHostReads
from test_pairs import MODELS, WIDTH

import fi_compile
from corpus import SPELLINGS
from decoding import EAGER, features, gap, ids, lanes, language_model, module, rounding
from fi_compile.kernels import block_step, tile_direct, tile_fft, tile_forms, tile_kept
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.mixers.triton_tiles import TritonTiles
from guarded import rand

SOURCE, INDEX = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 2, 0])
TRITON = {**EAGER, "kernels": "triton"}


@pytest.fixture
def launches(monkeypatch) -> Counter:
    """How often each kernel is launched."""
    count = Counter()

    def counted(module, name):
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid):
                count[name.removesuffix("_kernel")] += 1
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())

    counted(tile_direct, "tile_direct_kernel")
    counted(tile_fft, "tile_fft_kernel")
    counted(tile_kept, "meet_kernel")
    counted(block_step, "block_step_kernel")
    return count


def decode(state: ConvState, inputs: torch.Tensor, stop: int) -> torch.Tensor:
    bank, outputs = state.bank, []
    while state.position < stop:
        j = torch.tensor([state.local])
        u = inputs[:, :, state.position]
        now = u if bank.source is None else u[:, bank.source]
        z = block_step.block_step(state.block_pending, state.block_inputs, bank.block_table, j, bank.source)
        state.block_inputs.index_copy_(0, j, u[None])
        state.advance()
        outputs.append(z + bank.skip * now)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 150), (torch.float64, 70)])
def test_stack_equals_the_direct_sum(dtype, length, launches, monkeypatch):
    monkeypatch.setattr(tile_forms, "LARGEST", 16)
    # For so small tiles torch's transforms would be chosen.
    monkeypatch.setattr(tile_forms, "torch_traffic", lambda *_: {"reads": math.inf, "writes": 0, "flops": 0})
    inputs, filters = rand(2, 3, length, dtype=dtype), rand(3, length, dtype=dtype, seed=1) / 10
    bank = FilterBank(filters, SOURCE, INDEX, channels_in=3, block=8, kernels="triton")
    state = ConvState(bank, 2)
    assert state.history.stride(1) == state.pending.stride(1) == 1
    found = decode(state, inputs, length // 2)
    # A copy keeps the layout, and goes on from a prefix by FFT.
    state = state.select_rows(torch.tensor([1, 0, 1]))
    assert state.history.stride(1) == state.pending.stride(1) == 1
    inputs = inputs[[1, 0, 1]]
    state.restart(state.position)
    found = torch.cat([found[[1, 0, 1]], decode(state, inputs, length)], -1)
    rows = inputs.double().numpy()
    expected = [
        [
            np.convolve(row[i], filters[f].double().numpy())[:length]
            for i, f in zip(SOURCE, INDEX, strict=True)
        ]
        for row in rows
    ]
    error = (found.double() - torch.from_numpy(np.array(expected))).abs().max()
    scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max()
    assert error <= 3 * torch.finfo(dtype).eps * scale
    if dtype == torch.float32:
        assert launches == {"block_step": length, "tile_direct": 14, "tile_fft": 4}
    else:
        assert launches["tile_direct"]
        assert not launches["tile_fft"]


def test_forms_by_predicted_time():
    def form(dtype, side, length=None):
        tiles = TritonTiles(torch.zeros(1, 1, dtype=dtype), None, None)
        return tiles.form(fi_compile.schedule.Tile(range(side), range(side, side + (length or side))))

    found = [form(torch.float32, 1 << p) for p in range(18)]
    assert found == ["direct"] * 8 + ["matrix"] * 4 + ["stream"] * 5 + ["fft"]
    assert [form(torch.float64, 1 << p) for p in range(10)] == ["direct"] * 9 + ["fft"]
    assert form(torch.float32, 256, 8) == "direct"


@pytest.mark.parametrize("name", ["hyena_2", "filter_bank"])
def test_decoder_equals_the_model(name, launches, without_gradients):
    model = module(SPELLINGS[name], 6, 256)
    double = copy.deepcopy(model).double()
    sequence = features(2, 70, 6).float()
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=70, options={**TRITON, "block": 8})
    assert rounding(dec, model, double, sequence, 20) < 3
    plain = fi_compile.decoder(model, sequence[:, :9], max_length=70, options={**EAGER, "block": 8})
    assert gap(dec.prefill(sequence[:, :50]), plain.prefill(sequence[:, :50])) < 1e-5
    dec.rewind(17)
    plain.rewind(17)
    for t in range(17, 30):
        assert gap(dec.step(sequence[:, t]), plain.step(sequence[:, t])) < 1e-5
    assert launches["tile_direct"] == 7
    assert launches["block_step"] == 50 + 13


@pytest.mark.parametrize("name", ["triangular", "in_series"])
def test_channels_that_meet(name, launches, monkeypatch, without_gradients):
    monkeypatch.setattr(tile_forms, "LARGEST", 16)
    monkeypatch.setattr(tile_forms, "torch_traffic", lambda *_: {"reads": math.inf, "writes": 0, "flops": 0})
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    double, x = copy.deepcopy(model).double(), features(3, 70, WIDTH).float()
    dec = fi_compile.decoder(model, x[:, :9], max_length=70, options={**TRITON, "block": 8, "radix": 2})
    assert rounding(dec, model, double, x, 7) <= 3
    assert launches == {"block_step": 63, "tile_direct": 6, "meet": 1}


def test_steps_and_tiles_read_no_value_on_the_host(launches, without_gradients):
    model = language_model("fft_scale_on_filter").float()
    sequence = ids(2, 80)
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=80, options={**TRITON, "block": 8})
    dec.prefill(sequence[:, :10])
    (lane,) = lanes(dec)
    run = dec.engine.step(lane)
    launches.clear()
    with NoHostReads():
        for t in range(10, 60):
            lane.step(sequence[:, t : t + 1], run)
    assert launches["tile_direct"] == 6
    with NoHostReads(), pytest.raises(AssertionError, match="on the host"):
        sequence[0, 0].item()
    with NoHostReads(), pytest.raises(AssertionError, match="on the host"):
        sequence.nonzero()
