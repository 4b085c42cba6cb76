"""Convolutions that skip: blocks beyond a filter's end, columns of a sparse spectrum."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from fi_compile.kernels import long_conv_fft, long_conv_sparse
from fi_compile.kernels.long_conv import long_conv_reference
from fi_compile.kernels.long_conv_fft import conv_gpu
from fi_compile.kernels.long_conv_sparse import (
    _by_torch,
    _on_gpu,
    long_conv_sparse_reference,
    sparsify_blocks,
)
from fi_compile.kernels.monarch import Split
from guarded import assert_close, rand


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 512 positions, of 256 for dense filters: as where there is no room."""
    monkeypatch.setattr(long_conv_sparse, "has_room", lambda _: False)
    monkeypatch.setattr(long_conv_fft, "has_room", lambda _: False)


def fading(channels: int, lags: int, wavelength: float = 0.0) -> torch.Tensor:
    """Filters that fade; with a wavelength they swing, else they are noise."""
    t = torch.arange(lags, dtype=torch.float64)
    swing = torch.cos(2 * torch.pi * t / wavelength) if wavelength else rand(channels, lags)
    return (swing * torch.exp(-t / 300) * torch.ones(channels, 1)).float()


def loads_from(monkeypatch, watched: torch.Tensor) -> list[set[int]]:
    """The places of a tensor that a launch reads: filled, one set of element numbers a load, as the kernel runs."""
    start, size, seen = watched.data_ptr(), watched.nbytes, []
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def noted(self, ptrs, mask, *rest):
        at = np.asarray(ptrs.data)[np.asarray(mask.data)].astype(np.int64) - start
        inside = at[(at >= 0) & (at < size)]
        if inside.size:
            seen.append(set((inside // watched.element_size()).tolist()))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", noted)
    return seen


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize(("length", "lags"), [(1300, 1300), (1537, 700), (1000, 5), (5, 3)])
def test_equals_the_definition(length, lags, gates):
    u, pre, post = (rand(2, 3, length, dtype=torch.float32, seed=s) for s in range(3))
    k = fading(3, lags)
    found = sparsify_blocks(k, length)
    x = u * pre if gates else u
    expected = long_conv_sparse_reference(x, k, found.columns, found.split)
    expected = expected * post.double() if gates else expected
    scale = float(x.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * (
        float(post.abs().max()) if gates else 1.0
    )
    extra = (pre, post) if gates else (None, None)
    for form in (_by_torch, _on_gpu):
        assert_close(form(u, found, *extra, found.reach), expected, scale, units=4)


def test_what_is_dropped_is_bounded_and_said():
    """The bound holds for any input, and is not idle: noise loses much, a slow swing little."""
    u = rand(1, 3, 1536, dtype=torch.float32)
    lost = {}
    for name, k in (("noise", fading(3, 1536)), ("swing", fading(3, 1536, 40.0))):
        found = sparsify_blocks(k, 1536)
        y = _by_torch(u, found, None, None, found.reach).double()
        exact = long_conv_reference(u.double(), k.double())
        error = (y - exact).norm(dim=-1)[0] / u.double().norm(dim=-1)[0]
        assert bool((error <= found.bound + 1e-5 * k.double().norm(dim=-1)).all())
        lost[name] = float(found.dropped.max())
        assert bool((error > 0.01 * found.bound).all())
    assert lost["noise"] > 0.3
    assert lost["swing"] < 0.05
    assert "50% of the frequencies kept beyond 512 lags" in str(found)


def test_sees_no_future():
    k, u = fading(2, 1200), rand(1, 2, 1200, dtype=torch.float32)
    found = sparsify_blocks(k, 1200)
    for cut in (3, 511, 512, 700, 1100):
        later = u.clone()
        later[..., cut:] = 9.0
        a, b = (_by_torch(x, found, None, None, found.reach)[..., :cut] for x in (u, later))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_columns_that_are_dropped_are_not_touched(monkeypatch):
    length, k = 1300, fading(2, 1300)
    found = sparsify_blocks(k, length)
    assert found.columns.numel() == 16
    assert found.split == Split(16, 32, 4, 8)
    u = rand(1, 2, length, dtype=torch.float32)
    seen = loads_from(monkeypatch, found.far)
    _on_gpu(u, found, None, None, found.reach)
    touched = sum(len(s) for s in seen)
    # Three blocks: the second meets one before it, the third two; two channels, two parts, H × kept values.
    assert touched == (1 + 2) * 2 * (2 * 16 * 16)
    read, whole = found.values_read(length)
    assert read == 1024 * 3 + 512 * 3
    assert whole == 1024 * 6
    # Half of what all columns would take: they are not there to be read.
    assert found.far.numel() == 2 * 2 * (2 * 16 * 16)


@pytest.mark.parametrize(("lags", "reach"), [(1, 1), (200, 2), (257, 2), (258, 3), (1280, 5)])
def test_blocks_beyond_a_filters_end_are_not_touched(lags, reach, monkeypatch):
    u, k = rand(1, 2, 1280, dtype=torch.float32), rand(2, lags, dtype=torch.float32, seed=1)
    seen = loads_from(monkeypatch, u)
    conv_gpu(u, k)
    blocks = 5
    # A block of inputs is read once for every block of outputs that meets it.
    met = sum(min(j + 1, reach) for j in range(blocks))
    assert sum(len(s) for s in seen) == met * 2 * 256


def test_what_is_refused():
    k, u = fading(2, 600), rand(1, 2, 600, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected 16, or twice that and so on up to 16; found 8"):
        sparsify_blocks(k, 600, kept=8)
    found = sparsify_blocks(k, 600)
    with pytest.raises(ValueError, match=r"expected u \[B, 2, L <= 600\]"):
        long_conv_sparse.long_conv_sparse(u[:, :1], found)
    with pytest.raises(ValueError, match=r"L <= 600\], found \[1, 2, 1200\]"):
        long_conv_sparse.long_conv_sparse(torch.cat([u, u], -1), found)
    with pytest.raises(ValueError, match="has no gradients"):
        long_conv_sparse.long_conv_sparse(u.requires_grad_(), found)
    with pytest.raises(ValueError, match="pre must have the shape and dtype of u"):
        long_conv_sparse.long_conv_sparse(u.detach(), found, u.detach().double())
