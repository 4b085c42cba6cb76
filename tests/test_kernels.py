import numpy as np
import pytest
import torch

from fi_compile.kernels import channels
from fi_compile.kernels.block import block_sum, block_sum_reference, block_table
from fi_compile.kernels.monarch import SPLITS, factors, split_for, tile_spectrum_gpu
from fi_compile.kernels.prefix import fast_length, prefix_cost, prefix_reference, write_prefix
from fi_compile.kernels.tile import (
    add_tile_direct,
    add_tile_fft,
    tile_cost,
    tile_reference,
    tile_spectrum,
)

# Error in units of eps · ‖inputs‖ · ‖filter‖, per channel.
TOLERANCE = 3.0
DTYPES = [torch.float32, torch.float64]
MAPS = {
    "identity": (None, None),
    "bank": ([0, 0, 2, 1, 2, 2], None),
    "shared": (None, [1, 0, 1]),
    "both": ([2, 0, 1, 1], [3, 0, 0, 2]),
}


@pytest.fixture(params=MAPS)
def channel_map(request):
    """(source, filter_index, Cin, F)."""
    source, index = MAPS[request.param]
    channels_in = 3
    filters = len(source or range(channels_in)) if index is None else max(index) + 1
    tensors = [None if rows is None else torch.tensor(rows) for rows in (source, index)]
    return *tensors, channels_in, filters


@pytest.fixture(params=[channels.QUANTUM, 40], ids=["one chunk", "many chunks"])
def quantum(request, monkeypatch):
    monkeypatch.setattr(channels, "QUANTUM", request.param)


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual, expected, inputs, filters, pending=0.0):
    """`pending`: the largest value that the result was added to."""
    assert actual.shape == expected.shape
    assert actual.dtype == inputs.dtype
    scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max() + pending
    error = (actual.double() - expected).abs().max()
    assert error <= TOLERANCE * torch.finfo(inputs.dtype).eps * scale


def test_tile_reference_is_part_of_a_convolution():
    inputs, filters = rand(1, 1, 5), rand(1, 9, seed=1)
    whole = np.convolve(inputs[0, 0].numpy(), filters[0].numpy())
    assert np.allclose(tile_reference(inputs, filters, 4)[0, 0], whole[5:9], atol=1e-14)
    with pytest.raises(ValueError, match="reads 9 lags; the filters have 8"):
        tile_reference(inputs, filters[:, :8], 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "length"), [(1, 1), (2, 2), (32, 32), (32, 5), (24, 24), (63, 1)])
@pytest.mark.usefixtures("quantum")
def test_tile_forms(side, length, dtype, channel_map):
    source, index, cin, f = channel_map
    inputs = rand(2, cin, side, dtype=dtype)
    # Exactly the lags a tile may read, so that one more is out of bounds.
    filters = rand(f, side + length, dtype=dtype, seed=1)
    expected = tile_reference(inputs.double(), filters.double(), length, source, index)
    before = rand(2, expected.shape[1], length + 2, dtype=dtype, seed=2)
    spectrum = tile_spectrum(filters, side)
    assert spectrum.shape == (f, side + 1)
    longer = torch.cat([filters, torch.full_like(filters[:, :1], torch.nan)], 1)
    for add, weights in ((add_tile_direct, longer), (add_tile_fft, spectrum)):
        pending = before.clone()
        add(pending[:, :, 1:-1], inputs, weights, source, index)
        assert torch.equal(pending[:, :, [0, -1]], before[:, :, [0, -1]])
        total = expected + before[:, :, 1:-1].double()
        assert_close(pending[:, :, 1:-1], total, inputs, filters, before.abs().max().item())


def test_tile_cost_sends_small_tiles_to_the_direct_form():
    cheaper = {u: min(tile_cost(u, u), key=tile_cost(u, u).__getitem__) for u in (1, 4096)}
    assert cheaper == {1: "direct", 4096: "fft"}
    cost = tile_cost(2048, 1)
    assert cost["direct"] < cost["fft"]


def test_prefix_reference_is_part_of_a_convolution():
    history, filters = rand(1, 1, 5), rand(1, 9, seed=1)
    whole = np.convolve(history[0, 0].numpy(), filters[0].numpy())
    assert np.allclose(prefix_reference(history, filters)[0, 0], whole[5:9], atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "capacity"), [(0, 7), (1, 1), (1, 2), (7, 8), (8, 8), (100, 243), (242, 243), (5, 500)]
)
@pytest.mark.usefixtures("quantum")
def test_prefix(length, capacity, dtype, channel_map):
    source, index, cin, f = channel_map
    history = rand(2, cin, length, dtype=dtype)
    filters = rand(f, capacity, dtype=dtype, seed=1)
    expected = prefix_reference(history.double(), filters.double(), source, index)
    pending = torch.full((2, expected.shape[1], capacity), torch.nan, dtype=dtype)
    write_prefix(pending[:, :, length:], history, filters, source, index)
    assert pending[:, :, :length].isnan().all()
    if length == 0:
        assert torch.equal(pending, torch.zeros_like(pending))
    elif length < capacity:
        assert_close(pending[:, :, length:], expected, history, filters)


def test_fast_length():
    smooth = sorted(
        2**a * 3**b * 5**c
        for a in range(1, 14)
        for b in range(9)
        for c in range(6)
        if 2**a * 3**b * 5**c <= 8192
    )
    for n in range(1, 5001):
        assert fast_length(n) == next(m for m in smooth if m >= n)
    assert prefix_cost(4096) == 3 * 2.5 * 4096 * 12 + 3 * 4096


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "lags"), [(1, 5), (2, 2), (8, 20), (8, 3), (8, 1)])
def test_block_sum(block, lags, dtype, channel_map):
    source, index, cin, f = channel_map
    filters = rand(f, lags, dtype=dtype, seed=1)
    inputs = rand(block, 2, cin, dtype=dtype)
    table = block_table(filters, block, index)
    assert table.shape[0] == 2 * block
    for j in range(block):
        expected = block_sum_reference(inputs.double(), filters.double(), j, source, index)
        for position in (torch.tensor(j), torch.tensor([j])):
            actual = block_sum(inputs, table, position, source)
            assert_close(actual, expected, inputs.flatten(1).T, filters)
        # Rows from j on weigh exactly nothing, whatever is left in them.
        inputs_after = inputs.clone()
        inputs_after[j:] = 1e30
        assert torch.equal(block_sum(inputs_after, table, torch.tensor(j), source), actual)


def tf32(x):
    """Rounded to the ten bits of fraction that a matrix unit reads, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def dot_tf32x3(a, b):
    """The three products that keep float32 accuracy, as `tl.dot(input_precision="tf32x3")` does."""
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def fft_tile_by(dot, inputs, spectrum, length, h, n):
    """What the kernel does, in plain torch with a product of one's own."""
    first, twiddle, second = (torch.complex(*f) for f in factors(h, n, torch.device("cpu")))

    def product(a, b):
        if not a.is_complex():
            return torch.complex(dot(a, b.real), dot(a, b.imag))
        re = dot(a.real, b.real) - dot(a.imag, b.imag)
        return torch.complex(re, dot(a.real, b.imag) + dot(a.imag, b.real))

    x = torch.nn.functional.pad(inputs, (h * n - inputs.shape[-1], 0)).unflatten(-1, (h, n))
    middle = product(product(x.mT, first.T).mT * twiddle, second) * torch.complex(*spectrum.unbind(1))
    back = product(middle, second.conj()) * twiddle.conj()
    y = dot(back.real.mT, first.real) + dot(back.imag.mT, first.imag)
    return y.mT.flatten(-2)[..., :length]


@pytest.mark.parametrize("split", SPLITS.values(), ids=str)
def test_fft_tile_keeps_float32_accuracy_on_matrix_units(split):
    side = split.length // 2
    inputs = rand(2, 3, side, dtype=torch.float32)
    filters = rand(3, 2 * side, dtype=torch.float32, seed=1)
    expected = tile_reference(inputs.double(), filters.double(), side)
    spectrum = tile_spectrum_gpu(filters, side)
    found = fft_tile_by(dot_tf32x3, inputs, spectrum, side, split.h, split.n)
    assert_close(found, expected, inputs, filters)
    rough = fft_tile_by(lambda a, b: tf32(a) @ tf32(b), inputs, spectrum, side, split.h, split.n)
    scale = inputs.double().norm(dim=-1).max() * filters.double().norm(dim=-1).max()
    assert (rough - expected).abs().max() > 100 * torch.finfo(torch.float32).eps * scale


def test_spectra_in_the_kernels_order_are_half_of_the_odd_frequencies():
    filters = rand(2, 300)
    split = split_for(200)
    lags = torch.nn.functional.pad(filters, (0, split.length - 300))
    t = torch.arange(split.length, dtype=torch.float64)
    found = torch.complex(*tile_spectrum_gpu(filters, 200).double().unbind(1))
    for k1, k2 in ((0, 0), (3, 5), (split.h - 1, split.n - 1)):
        k = k1 + 2 * split.h * k2
        angle = -2 * torch.pi * t * (k + 0.5) / split.length
        expected = (lags * torch.polar(torch.ones_like(t), angle)).sum(-1)
        expected = expected * 2j * (-1) ** k1 / split.length
        assert torch.allclose(found[:, k1, k2], expected, atol=1e-7)


def test_channels_are_transformed_without_a_look_at_the_device():
    """On a GPU the host would wait for the number of distinct channels; a meta tensor has none to tell."""
    rows, source = torch.empty(2, 3, 8, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    assert channels.transform(rows, source, 16, 1, 5).shape == (2, 4, 9)
