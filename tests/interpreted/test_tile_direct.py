import pytest
import torch

from fi_compile.kernels import tile_direct
from fi_compile.kernels.channels import Fan
from fi_compile.kernels.tile import tile_reference
from fi_compile.kernels.tile_direct import add_tile_direct_gpu, lag_table
from guarded import assert_close, channels_last, fenced, rand, untouched

MAPS = {
    "identity": (None, None, None),
    "bank": ([0, 0, 2, 1, 2, 2], None, None),
    "shared": (None, [1, 0, 1], None),
    "both": ([2, 0, 1, 1], [3, 0, 0, 2], None),
    "pairs": ([2, 0, 1, 1, 0, 2], None, [0, 0, 1, 2, 2, 2]),
    "pairs of shared filters": (None, [1, 0, 1], [0, 0, 1]),
}


@pytest.fixture(autouse=True)
def _few_channels(monkeypatch):
    """Programs of two channels: what lies beyond the last of them is masked, as in a large launch."""
    monkeypatch.setattr(tile_direct, "channels_for", lambda dtype, lanes: 2)


def problem(batch, side, length, maps, dtype):
    source, index, target = (None if m is None else torch.tensor(m) for m in MAPS[maps])
    channels_in = 3
    filters = channels_in if source is None else len(source)
    filters = filters if index is None else int(index.max()) + 1
    inputs = rand(batch, channels_in, side, dtype=dtype)
    rho = rand(filters, side + length, dtype=dtype, seed=1)
    expected = tile_reference(inputs.double(), rho.double(), length, source, index, target)
    before = rand(*expected.shape, dtype=dtype, seed=2)
    scale = float(inputs.double().norm(dim=-1).max() * rho.double().norm(dim=-1).max() + before.abs().max())
    return inputs, rho, (source, index, Fan.of(target)), expected + before.double(), before, scale


@pytest.mark.parametrize(
    ("batch", "side", "length", "maps", "dtype"),
    [
        (1, 1, 1, "identity", torch.float32),
        (1, 8, 8, "identity", torch.float64),
        (3, 8, 8, "shared", torch.float32),
        (1, 24, 24, "both", torch.float32),
        (1, 32, 5, "bank", torch.float32),
        (1, 13, 9, "both", torch.float64),
        (3, 7, 3, "identity", torch.float16),
        (1, 64, 64, "identity", torch.float32),
        (3, 11, 10, "pairs", torch.float32),
        (1, 5, 5, "pairs of shared filters", torch.float64),
    ],
)
def test_direct_tile(batch, side, length, maps, dtype):
    inputs, rho, how, expected, before, scale = problem(batch, side, length, maps, dtype)
    lags = lag_table(rho, side)
    assert lags.shape == (min(2 * side, rho.shape[1]), rho.shape[0])
    outputs, around = fenced(before)
    # Exactly the lags a tile may read; what lies around inputs and lags is NaN.
    inputs, _ = channels_last(inputs, gap=2)
    wide, _ = channels_last(lags.t()[None], gap=2)
    add_tile_direct_gpu(outputs, inputs, wide[0].t(), *how)
    assert_close(outputs, expected, scale, units=3)
    assert untouched(around, outputs)


def test_largest_side():
    inputs, rho, how, expected, before, scale = problem(1, 256, 4, "identity", torch.float32)
    outputs, around = fenced(before)
    add_tile_direct_gpu(outputs, channels_last(inputs)[0], lag_table(rho, 256), *how)
    assert_close(outputs, expected, scale, units=3)
    assert untouched(around, outputs)


def test_what_is_refused():
    inputs, rho, *_ = problem(1, 4, 4, "identity", torch.float32)
    outputs, _ = channels_last(torch.zeros(1, 3, 4))
    with pytest.raises(
        ValueError, match=r"channels of inputs must be contiguous; the strides are \(12, 4, 1\)"
    ):
        add_tile_direct_gpu(outputs, inputs, lag_table(rho, 4))
    with pytest.raises(ValueError, match="reads 8 lags, found 6"):
        add_tile_direct_gpu(outputs, channels_last(inputs)[0], lag_table(rho[:, :6], 4))
