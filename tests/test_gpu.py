"""What only a GPU can show: kernels at real sizes and in every dtype, capture in graphs, no waiting for the device.

Run them with `pytest -m gpu tests/test_gpu.py`; `python -m benchmarks.gpu` does so first.
"""

import copy

import pytest
import torch
from torch import Tensor

import fi_compile
from corpus import SPELLINGS
from decoding import features, gap, ids, lanes, language_model, module, rounding
from fi_compile.kernels.block import block_sum_reference, block_table
from fi_compile.kernels.gpu import capable
from fi_compile.kernels.long_conv import long_conv
from fi_compile.mixers.bank import TILES
from fi_compile.schedule import Tile
from guarded import assert_close, rand

DEVICE = torch.device("cuda")
CHANNELS = 768
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not capable(DEVICE), reason="needs a GPU of sm_80 or later, or AMD's"
    ),
]


def channels_last(values: Tensor) -> Tensor:
    return values.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(DEVICE)


def convolved(u: Tensor, k: Tensor) -> Tensor:
    """u [B, C, L] with k [C, M] in float64, all L + M - 1 outputs."""
    n = u.shape[-1] + k.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u.double(), n=n) * torch.fft.rfft(k.double(), n=n), n=n)[
        ..., : n - 1
    ]


def tile_problem(side, length, batch, dtype, maps):
    inputs = channels_last(rand(batch, CHANNELS, side, dtype=dtype))
    source = torch.randint(CHANNELS, (CHANNELS + 3,), device=DEVICE) if maps else None
    index = torch.randint(5, (CHANNELS + 3,), device=DEVICE) if maps else None
    filters = rand(5 if maps else CHANNELS, 2 * side, dtype=dtype, seed=1).to(DEVICE)
    read, rho = (inputs[:, source], filters[index]) if maps else (inputs, filters)
    before = rand(*read.shape[:2], length, dtype=dtype, seed=2)
    expected = (
        convolved(read, rho[:, : side + length])[..., side : side + length] + before.to(DEVICE).double()
    )
    scale = read.double().norm(dim=-1).max() * rho.double().norm(dim=-1).max() + before.abs().max()
    return inputs, filters, source, index, channels_last(before), expected, float(scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "length", "batch"), [(8, 8, 1), (32, 32, 8), (37, 20, 3), (256, 256, 2)])
@pytest.mark.parametrize("maps", [False, True])
def test_direct_tiles(side, length, batch, maps, dtype):
    from fi_compile.kernels.tile_direct import add_tile_direct_gpu, lag_table

    inputs, filters, source, index, outputs, expected, scale = tile_problem(side, length, batch, dtype, maps)
    add_tile_direct_gpu(outputs, inputs, lag_table(filters, side), source, index)
    assert_close(outputs, expected, scale, units=3)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_on_matrix_units(batch, maps):
    """Three passes of TF32 are as good as float32."""
    from fi_compile.kernels.monarch import SPLITS, largest_side, tile_spectrum_gpu
    from fi_compile.kernels.tile_fft import add_tile_fft_gpu

    sides = [n // 2 for n in SPLITS if n // 2 <= largest_side(DEVICE)]
    for side, length in [(s, s) for s in sides] + [(129, 100), (sides[-1] - 1, 7)]:
        problem = tile_problem(side, length, batch, torch.float32, maps)
        inputs, filters, source, index, outputs, expected, scale = problem
        add_tile_fft_gpu(outputs, inputs, tile_spectrum_gpu(filters, side), source, index)
        assert_close(outputs, expected, scale, units=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_of_a_tile(dtype):
    filters = rand(CHANNELS, 1 << 14, dtype=dtype).to(DEVICE)
    tiles = TILES["triton"](filters, None, None)
    history, before = (channels_last(rand(2, CHANNELS, 1 << 14, dtype=dtype, seed=s)) for s in (1, 2))
    for p in range(14):
        side = 1 << p
        tile, pending = Tile(range(side), range(side, 2 * side)), before.clone()
        assert tiles.form(tile) in tiles.offered(side)
        tiles.add(tile, history, pending)
        expected = before.double()
        y, k = history[..., :side], filters[:, : 2 * side]
        expected[..., side : 2 * side] += convolved(y, k)[..., side : 2 * side]
        scale = y.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() + before.abs().max()
        assert_close(pending, expected, float(scale), units=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_channels_that_meet(dtype):
    source = torch.randint(CHANNELS, (2 * CHANNELS,), device=DEVICE)
    target = torch.arange(CHANNELS, device=DEVICE).repeat_interleave(2)
    filters = rand(2 * CHANNELS, 1 << 14, dtype=dtype).to(DEVICE)
    tiles = TILES["triton"](filters, source, None, target)
    history, before = (channels_last(rand(2, CHANNELS, 1 << 14, dtype=dtype, seed=s)) for s in (1, 2))
    for side in (8, 256, 512, 2048, 4096, 8192):
        tile, pending = Tile(range(side), range(side, 2 * side)), before.clone()
        tiles.add(tile, history, pending)
        expected, y, k = before.double(), history[:, source, :side], filters[:, : 2 * side]
        sums = convolved(y, k)[..., side : 2 * side].unflatten(1, (CHANNELS, 2)).sum(2)
        expected[..., side : 2 * side] += sums
        scale = 2 * y.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() + before.abs().max()
        assert_close(pending, expected, float(scale), units=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 8])
def test_block_step(batch, dtype):
    from fi_compile.kernels.block_step import block_step

    rho = rand(CHANNELS, 40, dtype=dtype).to(DEVICE)
    inputs, pending = (rand(32, batch, CHANNELS, dtype=dtype, seed=s).to(DEVICE) for s in (1, 2))
    table = block_table(rho, 32)
    for j in (0, 1, 17, 31):
        found = block_step(pending, inputs, table, torch.tensor([j], device=DEVICE))
        expected = block_sum_reference(inputs.double(), rho.double(), j, None, None) + pending[j]
        assert_close(found, expected, 50 * float(rho.abs().max()), units=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lags", [40, 700, 2100])
@pytest.mark.parametrize("gates", [False, True])
def test_long_conv(gates, lags, dtype):
    u, pre, post = (channels_last(rand(2, CHANNELS, 2100, dtype=dtype, seed=s)) for s in range(3))
    k = rand(CHANNELS, lags, dtype=dtype, seed=3).to(DEVICE)
    x = u.double() * pre.double() if gates else u.double()
    expected = convolved(x, k)[..., : u.shape[-1]] * (post.double() if gates else 1)
    scale = x.norm(dim=-1).max() * k.double().norm(dim=-1).max() * (post.abs().max() if gates else 1)
    found = long_conv(u, k, *((pre, post) if gates else ()))
    assert_close(found, expected, float(scale), units=3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_lower_precisions(precision):
    """Errors as the interpreter predicts them: operands are rounded to the same bits."""
    from fi_compile.kernels.gpu import ROUNDING
    from fi_compile.kernels.monarch import tile_spectrum_gpu
    from fi_compile.kernels.tile_fft import add_tile_fft_gpu

    inputs, filters, _, _, outputs, expected, scale = tile_problem(512, 512, 2, torch.float32, False)
    add_tile_fft_gpu(outputs, inputs, tile_spectrum_gpu(filters, 512), precision=precision)
    error = float((outputs.double() - expected).abs().max()) / scale
    assert ROUNDING[precision] / 100 < error < ROUNDING[precision]
    u, k = channels_last(rand(2, 64, 1500, dtype=torch.float32)), filters[:64, :800]
    error = float((long_conv(u, k, precision=precision) - convolved(u, k)[..., :1500]).abs().max())
    scale = float(u.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    assert ROUNDING[precision] / 100 < error / scale < ROUNDING[precision]


def test_gradients_of_long_conv():
    u, pre, post = (channels_last(rand(2, 64, 1500, dtype=torch.float32, seed=s)) for s in range(3))
    operands = [u, rand(64, 800, dtype=torch.float32, seed=3).to(DEVICE), pre, post]
    operands = [t.requires_grad_() for t in operands]
    found = torch.autograd.grad(long_conv(*operands).sin().sum(), operands)
    double = [t.detach().double().requires_grad_() for t in operands]
    y = convolved(double[0] * double[2], double[1])[..., :1500] * double[3]
    for a, b in zip(found, torch.autograd.grad(y.sin().sum(), double), strict=True):
        # The sine's argument carries the rounding of a convolution into every gradient.
        assert_close(a, b, 100 * float(b.abs().max()), units=10)


@pytest.mark.parametrize("step", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["hyena_2", "filter_bank"])
def test_decoder_equals_the_model(name, step, without_gradients):
    model = module(SPELLINGS[name], 64, 1024).to(DEVICE)
    double = copy.deepcopy(model).double()
    sequence = features(2, 700, 64).float().to(DEVICE)
    options = {"kernels": "triton", "step": step}
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=700, options=options)
    assert dec.engine.kernels == "triton"
    assert rounding(dec, model, double, sequence, 20) < 3


def decoding(step: str):
    """A lane in the middle of a sequence, its step, the ids, and the model's outputs."""
    model = language_model("hyena_2", "attention_retention").float().to(DEVICE)
    sequence = ids(2, 160).to(DEVICE)
    options = {"kernels": "triton", "block": 8, "step": step, "growth": False}
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=160, options=options)
    # Every kernel and spectrum is made by a first pass.
    dec.prefill(sequence[:, :16])
    for t in range(16, 150):
        dec.step(sequence[:, t])
    dec.reset()
    dec.prefill(sequence[:, :16])
    (lane,) = lanes(dec)
    return lane, dec.engine.step(lane), sequence, model(sequence)


def value(outputs) -> Tensor:
    (tensor,) = (o for o in outputs if isinstance(o, Tensor))
    return tensor


@pytest.mark.parametrize("step", ["eager", "inductor"])
def test_steps_and_tiles_do_not_wait_for_the_device(step, without_gradients):
    lane, run, sequence, _ = decoding(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(16, 150):
            lane.step(sequence[:, t : t + 1], run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(lane.conv.tiles_run.values()) == 16


@pytest.mark.parametrize("step", ["eager", "inductor"])
def test_a_step_is_captured_and_replayed_at_every_position(step, without_gradients):
    lane, run, sequence, expected = decoding(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay():
        graph.replay()
        return outputs

    for t in range(16, 150):
        found = value(lane.step(sequence[:, t : t + 1], replay))
        assert gap(found.reshape(2, -1), expected[:, t]) < 1e-4, t


def test_tiles_are_captured(without_gradients):
    filters = rand(CHANNELS, 1 << 13, dtype=torch.float32).to(DEVICE)
    tiles = TILES["triton"](filters, None, None)
    history = channels_last(rand(1, CHANNELS, 1 << 13, dtype=torch.float32, seed=1))
    for side in (32, 256, 2048, 4096):
        tile = Tile(range(side), range(side, 2 * side))
        once, twice = tiles.new_state(1, CHANNELS), tiles.new_state(1, CHANNELS)
        tiles.add(tile, history, once)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tiles.add(tile, history, twice)
        twice.zero_()
        graph.replay()
        graph.replay()
        torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_streamed_tiles(batch):
    from fi_compile.kernels.monarch import STREAMS, stream_for, tile_spectrum_stream
    from fi_compile.kernels.tile_stream import add_tile_stream_gpu

    for side in (s for s in STREAMS if stream_for(s, DEVICE)):
        for length in (side, side - 5):
            problem = tile_problem(side, length, batch, torch.float32, False)
            inputs, filters, source, index, outputs, expected, scale = problem
            add_tile_stream_gpu(outputs, inputs, tile_spectrum_stream(filters, side), source, index)
            assert_close(outputs, expected, scale, units=3)


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_of_several_blocks(batch):
    """Kept spectra of three blocks, in a ring, at every side."""
    from fi_compile.kernels.monarch import STREAMS, largest_side, stream_for
    from fi_compile.kernels.tile_kept import add_kept_gpu, distant_spectra, keep_spectra_gpu

    small = [("matrix", 1 << p) for p in range(8, 12) if 1 << p <= largest_side(DEVICE)]
    for form, side in small + [("stream", s) for s in STREAMS if stream_for(s, DEVICE)]:
        inputs = channels_last(rand(batch, 64, 3 * side, dtype=torch.float32))
        filters = rand(64, 4 * side, dtype=torch.float32, seed=1).to(DEVICE)
        spectra = distant_spectra(form, filters, side, range(1, 4))
        ring = filters.new_full((4, batch, 64, *spectra.shape[2:]), torch.nan)
        for i in range(3):
            keep_spectra_gpu(ring[(2 + i) % 4], inputs[..., i * side : (i + 1) * side])
        outputs = channels_last(torch.zeros(batch, 64, side))
        add_kept_gpu(outputs, ring, 2, 3, spectra)
        expected = convolved(inputs, filters)[..., 3 * side : 4 * side]
        scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max()
        assert_close(outputs, expected, float(scale), units=3)


@pytest.mark.parametrize("given", [{"radix": 4, "keep_history": False}, {"latency": "bounded"}])
def test_decoder_under_every_tiling(given, without_gradients):
    model = module(SPELLINGS["filter_bank"], 64, 1024).to(DEVICE)
    double = copy.deepcopy(model).double()
    sequence = features(2, 700, 64).float().to(DEVICE)
    options = {"kernels": "triton", "step": "eager", "block": 16, **given}
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=700, options=options)
    assert rounding(dec, model, double, sequence, 20) < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("taps", "maps"), [(3, False), (128, True)])
def test_short_conv_step(taps, maps, dtype):
    from fi_compile.kernels.short_conv import short_conv_step_reference
    from fi_compile.kernels.short_conv_step import short_conv_step

    source = torch.randint(CHANNELS, (CHANNELS + 5,), device=DEVICE) if maps else None
    kernel = rand(taps, CHANNELS + 5 if maps else CHANNELS, dtype=dtype, seed=1).to(DEVICE)
    ring = rand(taps + 64, 3, CHANNELS, dtype=dtype).to(DEVICE)
    for position in (0, taps, 1000):
        x = rand(3, CHANNELS, dtype=dtype, seed=position + 2).to(DEVICE)
        expected, ring_after = short_conv_step_reference(
            ring.double(), position, x.double(), kernel.double(), source
        )
        found = short_conv_step(ring, torch.tensor([position], device=DEVICE), x, kernel, source)
        assert_close(found, expected, 20.0 * taps, units=3)
        assert torch.equal(ring.double(), ring_after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (128, 128), (80, 50)])
def test_linear_attention_step(d, e, dtype):
    from fi_compile.kernels.linear_attention import Contraction, attention_step
    from fi_compile.kernels.linear_attention_step import linear_attention_step

    how = Contraction(("ab",), ("ab", "ac"), "ac", "a", {"a": 12, "b": d, "c": e})
    ring = torch.zeros(4, 3, 12, d, e, dtype=dtype, device=DEVICE)
    state = torch.zeros(3, 12, d, e, dtype=torch.float64, device=DEVICE)
    now, past, decay = (rand(12, 1, 1, seed=s).sigmoid().to(DEVICE) for s in (1, 2, 3))
    for t in range(6):
        q, k = (rand(3, 12, d, dtype=dtype, seed=10 * t + s).to(DEVICE) for s in (4, 5))
        v = rand(3, 12, e, dtype=dtype, seed=10 * t + 6).to(DEVICE)
        at = torch.tensor([t], device=DEVICE)
        found = linear_attention_step(ring, at, [q], [k, v], now.to(dtype), past.to(dtype), decay, how)
        expected, state = attention_step(state, [q.double()], [k.double(), v.double()], now, past, decay, how)
        assert_close(found, expected, 20.0 * d, units=3)
        assert_close(ring[t % 4], state, 40.0, units=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gates", [False, True])
def test_long_conv_without_frequencies(gates, dtype):
    from fi_compile.kernels.long_conv_sparse import (
        long_conv_sparse,
        long_conv_sparse_reference,
        sparsify_blocks,
    )

    length, width = 4500, 16
    u, pre, post = (channels_last(rand(2, width, length, dtype=dtype, seed=s)) for s in range(3))
    k = rand(width, length, dtype=torch.float32, seed=3) * torch.exp(-torch.arange(length) / 1500)
    spectra = sparsify_blocks(k, length, device=DEVICE)
    x = u.double() * pre.double() if gates else u.double()
    expected = long_conv_sparse_reference(x.cpu(), k, spectra.columns.cpu(), spectra.split).to(DEVICE)
    expected = expected * post.double() if gates else expected
    scale = x.norm(dim=-1).max() * k.double().norm(dim=-1).max().to(DEVICE)
    scale = scale * (post.double().abs().max() if gates else 1)
    found = long_conv_sparse(u, spectra, *((pre, post) if gates else ()))
    assert_close(found, expected, float(scale), units=4)
