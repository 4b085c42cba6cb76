"""Tiles of several blocks whose spectra are kept."""

import pytest
import torch

from fi_compile.kernels import tile_stream
from fi_compile.kernels.channels import Fan
from fi_compile.kernels.tile import tile_reference
from fi_compile.kernels.tile_kept import add_kept_gpu, distant_spectra, keep_spectra_gpu
from guarded import assert_close, channels_last, fenced, rand, untouched

MAPS = {
    "identity": (None, None, None),
    "shared": (None, [1, 0, 1], None),
    "both": ([2, 0, 1, 1, 0, 2, 1, 2, 0], [1, 0, 0, 1, 1, 0, 1, 1, 0], None),
    "pairs": ([2, 0, 1, 1, 0, 2, 2], [1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 2, 2, 2, 3]),
    "pairs of ten": ([0, 1, *[0] * 9], [1, 0, *[1, 0, 0] * 3], [0, 0, *range(1, 10)]),
}


def kept_ring(inputs: torch.Tensor, side: int, spectra: torch.Tensor, oldest: int):
    """The spectra of all blocks of inputs in a ring of one row more, and the memory around it; other rows are NaN."""
    blocks = inputs.shape[-1] // side
    around = torch.full((blocks + 3, *inputs.shape[:2], *spectra.shape[2:]), torch.nan)
    around[[0, -1]] = 7.0
    ring = around[1:-1]
    for i in range(blocks):
        block = channels_last(inputs[..., i * side : (i + 1) * side], gap=2)[0]
        keep_spectra_gpu(ring[(oldest + i) % len(ring)], block)
    return ring, around


def check(form, batch, side, length, blocks, maps, nearest=1, channels=3, dtype=torch.float32):
    source, index, target = (None if m is None else torch.tensor(m) for m in MAPS[maps])
    gap = (nearest - 1) * side
    inputs = rand(batch, channels, blocks * side, dtype=dtype)
    # Lags beyond those a tile reads must not matter; those beyond the filters' end count as zero.
    rho = rand(channels if index is None else 2, (blocks + nearest) * side - 3, dtype=torch.float32, seed=1)
    padded = torch.nn.functional.pad(rho.double(), (0, 3))
    expected = tile_reference(inputs.double(), padded, length, source, index, target, gap=gap)
    before = rand(*expected.shape, dtype=dtype, seed=2)
    outputs, around = fenced(before)
    spectra = distant_spectra(form, rho, side, range(nearest, nearest + blocks))
    # The blocks lie across the ring's end, where there are more than one.
    oldest = 2
    ring, beside = kept_ring(inputs, side, spectra, oldest % (blocks + 1))
    wide = torch.full((len(rho), blocks + 1, *spectra.shape[2:]), torch.nan)
    wide[:, :blocks] = spectra
    add_kept_gpu(outputs, ring, oldest % (blocks + 1), blocks, wide, source, index, Fan.of(target))
    scale = inputs.double().norm(dim=-1).max() * rho.double().norm(dim=-1).max() + before.abs().max()
    assert_close(outputs, expected + before.double(), float(scale), units=3)
    assert untouched(around, outputs)
    assert bool((beside[[0, -1]] == 7).all())


@pytest.mark.parametrize(
    ("batch", "side", "length", "blocks", "maps", "nearest"),
    [
        (1, 256, 256, 1, "identity", 1),
        (3, 200, 199, 3, "both", 1),
        (2, 37, 30, 7, "shared", 2),
        (1, 512, 511, 2, "shared", 3),
        (3, 100, 99, 2, "pairs", 2),
    ],
)
def test_matrix(batch, side, length, blocks, maps, nearest):
    check("matrix", batch, side, length, blocks, maps, nearest)


@pytest.mark.parametrize("side", [1024, 2048])
def test_large_splits(side):
    check("matrix", 1, side, 5, 2, "identity", channels=1)


def test_half_precision_storage():
    check("matrix", 1, 100, 64, 2, "identity", dtype=torch.float16)


@pytest.mark.parametrize(
    ("side", "length", "maps"),
    [
        (4096, 2, "identity"),
        (2100, 2, "pairs of ten"),
        pytest.param(2100, 3, "both", marks=pytest.mark.slow),
    ],
)
def test_stream(side, length, maps, monkeypatch):
    # Room for one group of eight channels: with maps, nine channels take two rounds.
    monkeypatch.setattr(tile_stream, "SCRATCH", 1)
    check("stream", 1, side, length, 2, maps, channels={"identity": 1, "both": 3}.get(maps, 2))


def test_every_block_takes_part():
    """Each row of the ring is read, for its own channel: a wrong one must show there."""
    inputs, rho = rand(1, 2, 300, dtype=torch.float32), rand(2, 400, dtype=torch.float32, seed=1)
    spectra = distant_spectra("matrix", rho, 100, range(1, 4))
    ring, _ = kept_ring(inputs, 100, spectra, 0)
    expected = tile_reference(inputs.double(), rho.double(), 100)
    for place in range(3):
        wrong = ring.clone()
        wrong[place, 0, 0, 0, 3, 5] += 100
        found = fenced(torch.zeros(1, 2, 100))[0]
        add_kept_gpu(found, wrong, 0, 3, spectra)
        assert (found - expected)[:, 0].abs().max() > 0.01
        assert (found - expected)[:, 1].abs().max() < 1e-3


def test_what_is_refused():
    rho = rand(3, 600, dtype=torch.float32)
    spectra = distant_spectra("matrix", rho, 200, range(1, 3))
    ring = torch.zeros(2, 1, 3, *spectra.shape[2:])
    outputs = channels_last(torch.zeros(1, 3, 200))[0]
    with pytest.raises(ValueError, match="channels of outputs must be contiguous"):
        add_kept_gpu(outputs.contiguous(), ring, 0, 2, spectra)
    for count, wrong in ((3, ring), (0, ring), (2, ring[:1]), (2, torch.zeros(2, 1, 3, 2, 32, 16))):
        with pytest.raises(ValueError, match=r"blocks of spectra .* do not fit filters of spectra"):
            add_kept_gpu(outputs, wrong, 0, count, spectra)
    with pytest.raises(ValueError, match=r"do not fit inputs of shape \[1, 3, 257\]"):
        keep_spectra_gpu(ring[0], channels_last(torch.zeros(1, 3, 257))[0])
    with pytest.raises(ValueError, match=r"do not fit inputs of shape \[1, 2, 200\]"):
        keep_spectra_gpu(ring[0], outputs[:, :2])
    with pytest.raises(ValueError, match="channels of spectra must follow one another"):
        keep_spectra_gpu(torch.zeros(1, 3, *ring.shape[3:-2], 16, 32)[..., ::2], outputs)
    with pytest.raises(ValueError, match="no split serves"):
        distant_spectra("matrix", rho, 5000, range(1, 2))
