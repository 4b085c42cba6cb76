import pytest
import torch

from fi_compile.kernels import tile_fft
from fi_compile.kernels.monarch import SPLITS, split_for, tile_spectrum_gpu
from fi_compile.kernels.tile import tile_reference
from fi_compile.kernels.tile_fft import add_tile_fft_gpu
from guarded import assert_close, channels_last, fenced, rand, untouched

MAPS = {
    "identity": (None, None),
    "shared": (None, [1, 0, 1, 1, 0]),
    "both": ([2, 0, 1, 1, 0, 2], [3, 0, 0, 2, 1, 3]),
}


@pytest.mark.parametrize(
    ("batch", "side", "length", "maps", "lags"),
    [
        (1, 256, 256, "identity", 512),
        (3, 256, 255, "shared", 512),
        (1, 256, 1, "both", 300),
        (2, 129, 100, "both", 1000),
        (1, 1, 1, "identity", 2),
        (1, 512, 512, "shared", 5000),
        (3, 384, 383, "both", 768),
        *((1, length // 2, length // 2 - 7, "identity", length) for length in SPLITS if length > 1024),
    ],
)
def test_fft_tile(batch, side, length, maps, lags):
    source, index = (None if m is None else torch.tensor(m) for m in MAPS[maps])
    channels_in = 5
    filters = channels_in if index is None else int(index.max()) + 1
    inputs = rand(batch, channels_in, side, dtype=torch.float32)
    # Lags beyond those a tile reads must not matter; those beyond the capacity count as zero.
    rho = rand(filters, lags, dtype=torch.float32, seed=1)
    padded = torch.nn.functional.pad(rho.double(), (0, max(0, side + length - lags)))
    expected = tile_reference(inputs.double(), padded, length, source, index)
    before = rand(*expected.shape, dtype=torch.float32, seed=2)
    outputs, around = fenced(before)
    wide, _ = channels_last(inputs, gap=2)
    spectrum = tile_spectrum_gpu(rho, side)
    beside = torch.full((filters + 2, *spectrum.shape[1:]), torch.nan)
    beside[1:-1] = spectrum
    add_tile_fft_gpu(outputs, wide, beside[1:-1], source, index)
    scale = inputs.double().norm(dim=-1).max() * rho.double().norm(dim=-1).max() + before.abs().max()
    assert_close(outputs, expected + before.double(), float(scale), units=3)
    assert untouched(around, outputs)


def test_half_precision_storage():
    inputs, rho = rand(1, 3, 256, dtype=torch.float16), rand(3, 512, dtype=torch.float32, seed=1)
    expected = tile_reference(inputs.double(), rho.double(), 256)
    outputs, around = fenced(torch.zeros(1, 3, 256, dtype=torch.float16))
    add_tile_fft_gpu(outputs, channels_last(inputs)[0], tile_spectrum_gpu(rho, 256))
    assert_close(outputs, expected, float(expected.abs().max()), units=1)
    assert untouched(around, outputs)


def test_what_is_refused():
    inputs, rho = rand(1, 3, 256, dtype=torch.float32), rand(3, 512, dtype=torch.float32)
    outputs, spectrum = channels_last(torch.zeros(1, 3, 256))[0], tile_spectrum_gpu(rho, 256)
    with pytest.raises(ValueError, match=r"channels of inputs must be contiguous"):
        add_tile_fft_gpu(outputs, inputs, spectrum)
    with pytest.raises(ValueError, match="does not serve tiles of 512"):
        add_tile_fft_gpu(outputs, channels_last(rand(1, 3, 512, dtype=torch.float32))[0], spectrum)
    with pytest.raises(ValueError, match="at most as many outputs, found 256"):
        add_tile_fft_gpu(outputs, channels_last(inputs[..., 1:])[0], spectrum)
    assert split_for(max(SPLITS)) is None
    with pytest.raises(ValueError, match="no split serves"):
        tile_spectrum_gpu(rho, max(SPLITS))


def test_dots_take_part(monkeypatch):
    """The kernel reads its factors: wrong ones must show."""
    inputs, rho = rand(1, 3, 256, dtype=torch.float32), rand(3, 512, dtype=torch.float32)
    expected = tile_reference(inputs.double(), rho.double(), 256)
    right = tile_fft.factors
    for place in range(3):
        wrong = [f.clone() for f in right(16, 16, torch.device("cpu"))]
        wrong[place][0, 3, 5] += 0.5
        monkeypatch.setattr(tile_fft, "factors", lambda *_, wrong=wrong: wrong)
        outputs, _ = channels_last(torch.zeros(1, 3, 256))
        add_tile_fft_gpu(outputs, channels_last(inputs)[0], tile_spectrum_gpu(rho, 256))
        assert (outputs - expected).abs().max() > 0.01
