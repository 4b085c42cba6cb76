import pytest
import torch

from fi_compile.kernels import tile_stream
from fi_compile.kernels.monarch import STREAMS, Stream, tile_spectrum_stream
from fi_compile.kernels.tile import add_tile_fft, tile_reference, tile_spectrum
from fi_compile.kernels.tile_stream import add_tile_stream_gpu
from guarded import assert_close, channels_last, fenced, rand, untouched

SMALL = Stream(16, 16, 16)


def problem(batch, side, length, lags, maps):
    source = torch.tensor([2, 0, 1, 1, 0, 2, 1, 0, 2]) if maps else None
    index = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0]) if maps else None
    filters = 2 if maps else 3
    inputs = rand(batch, 3, side, dtype=torch.float32)
    rho = rand(filters, lags, dtype=torch.float32, seed=1)
    return inputs, rho, source, index


@pytest.mark.parametrize(
    ("batch", "side", "length", "lags", "maps"),
    [(1, 4096, 4096, 8192, False), (2, 2049, 2000, 5000, False), (1, 3000, 1, 3500, True)],
)
def test_stream_tile(batch, side, length, lags, maps, monkeypatch):
    # Room for one group of eight channels: with maps, nine channels take two rounds.
    monkeypatch.setattr(tile_stream, "SCRATCH", 1)
    inputs, rho, source, index = problem(batch, side, length, lags, maps)
    padded = torch.nn.functional.pad(rho.double(), (0, max(0, side + length - lags)))
    expected = torch.zeros(batch, 9 if maps else 3, length, dtype=torch.float64)
    add_tile_fft(expected, inputs.double(), tile_spectrum(padded, side), source, index)
    # What the quick form says is what the definition says.
    few = tile_reference(inputs.double(), padded, 2, source, index)
    assert_close(expected[..., :2], few, float(few.abs().max()), units=100) if length > 1 else None
    before = rand(*expected.shape, dtype=torch.float32, seed=2)
    outputs, around = fenced(before)
    wide, _ = channels_last(inputs, gap=2)
    spectrum = tile_spectrum_stream(rho, side)
    beside = torch.full((len(rho) + 2, *spectrum.shape[1:]), torch.nan)
    beside[1:-1] = spectrum
    add_tile_stream_gpu(outputs, wide, beside[1:-1], source, index)
    scale = inputs.double().norm(dim=-1).max() * rho.double().norm(dim=-1).max() + before.abs().max()
    assert_close(outputs, expected + before.double(), float(scale), units=3)
    assert untouched(around, outputs)


# The largest sides take minutes to interpret: here are their factors, each with a small one.
FACTORS = [Stream(32, 16, 16), Stream(64, 16, 16, outer=8), Stream(16, 32, 16), Stream(16, 32, 32, inner=8)]


def test_factors_are_those_that_are_offered():
    for part in (lambda s: (s.h, s.outer), lambda s: (s.a, s.b, s.inner)):
        assert {part(s) for s in (SMALL, *FACTORS)} == {part(s) for s in STREAMS.values()}


@pytest.mark.parametrize("stream", FACTORS, ids=str)
def test_every_factor_is_used_right(stream):
    """One channel at the full length."""
    side = stream.side
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STREAMS, side, stream)
        inputs, rho, *_ = problem(1, side, side, 2 * side, False)
        inputs, rho = inputs[:, :1], rho[:1]
        expected = torch.zeros(1, 1, side, dtype=torch.float64)
        add_tile_fft(expected, inputs.double(), tile_spectrum(rho.double(), side))
        outputs, around = fenced(torch.zeros(1, 1, side))
        add_tile_stream_gpu(outputs, channels_last(inputs)[0], tile_spectrum_stream(rho, side))
    scale = float(inputs.double().norm() * rho.double().norm())
    assert_close(outputs, expected, scale, units=3)
    assert untouched(around, outputs)


def test_what_is_refused():
    inputs, rho, *_ = problem(1, 4096, 4096, 8192, False)
    spectrum, outputs = tile_spectrum_stream(rho, 4096), channels_last(torch.zeros(1, 3, 4096))[0]
    with pytest.raises(ValueError, match="channels of inputs must be contiguous"):
        add_tile_stream_gpu(outputs, inputs, spectrum)
    with pytest.raises(ValueError, match="does not serve tiles of 2048"):
        add_tile_stream_gpu(outputs, channels_last(inputs[..., :2048])[0], spectrum)
    with pytest.raises(ValueError, match="at most as many outputs, found 4096"):
        add_tile_stream_gpu(outputs, channels_last(inputs[..., 1:])[0], spectrum)
    with pytest.raises(ValueError, match="nothing serves tiles of 2048"):
        tile_spectrum_stream(rho, 2048)
