"""The convolution of whole sequences: forms, gradients, operator."""

import pytest
import torch

from fi_compile.kernels import channels
from fi_compile.kernels import long_conv as module
from fi_compile.kernels.long_conv import conv_fft, long_conv, long_conv_cost, long_conv_reference
from fi_compile.kernels.sparse_filter import low_frequencies, sparsify
from guarded import assert_close, rand

SHAPES = [(1, 1, 1, 1), (2, 3, 63, 63), (1, 2, 500, 500), (3, 2, 7, 20), (1, 2, 1000, 3), (2, 1, 777, 60)]


@pytest.fixture(params=[channels.QUANTUM, 40], ids=["one chunk", "many chunks"])
def quantum(request, monkeypatch):
    monkeypatch.setattr(channels, "QUANTUM", request.param)


def problem(batch, width, length, lags, dtype=torch.float64):
    u, pre, post = (rand(batch, width, length, dtype=dtype, seed=s) for s in range(3))
    return u, rand(width, lags, dtype=dtype, seed=3), pre, post


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("quantum")
def test_fft_form(shape, dtype):
    u, k, pre, post = problem(*shape, dtype=dtype)
    scale = float((u * pre).double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    for gates in ((None, None), (pre, None), (None, post), (pre, post)):
        exact = (None if g is None else g.double() for g in gates)
        expected = long_conv_reference(u.double(), k.double(), *exact)
        found = long_conv(u, k, *gates)
        assert found.dtype == dtype
        assert_close(found, expected, max(scale, 1) * float(post.abs().max().clamp_min(1)), units=3)


def test_reverse_is_the_transpose():
    u, k, pre, _ = problem(2, 3, 50, 20)
    there = (conv_fft(u, k) * pre).sum()
    back = (u * conv_fft(pre, k, reverse=True)).sum()
    assert torch.allclose(there, back)


@pytest.mark.parametrize("shape", [(2, 2, 9, 9), (1, 2, 5, 11), (2, 1, 12, 3), (1, 1, 1, 1)])
def test_gradients(shape):
    u, k, pre, post = (t.requires_grad_() for t in problem(*shape))
    assert torch.autograd.gradcheck(long_conv, (u, k, pre, post))
    assert torch.autograd.gradcheck(long_conv, (u, k))
    assert torch.autograd.gradgradcheck(long_conv, (u, k, pre, post))


def test_gradients_of_some():
    u, k, pre, post = problem(2, 2, 9, 9)
    for wanted in (u, k, pre, post):
        wanted.requires_grad_()
        (found,) = torch.autograd.grad(long_conv(u, k, pre, post).square().sum(), wanted)
        (expected,) = torch.autograd.grad(long_conv_reference(u, k, pre, post).square().sum(), wanted)
        assert torch.allclose(found, expected)
        wanted.requires_grad_(False)


@pytest.mark.parametrize("gates", [False, True])
def test_operator(gates):
    u, k, pre, post = (t.requires_grad_() for t in problem(2, 2, 10, 10, torch.float32))
    extra = (pre, post) if gates else (None, None)
    torch.library.opcheck(torch.ops.flashinf.long_conv.default, (u, k, *extra, False))
    torch.library.opcheck(torch.ops.flashinf.long_conv_filter_gradient.default, (u, pre, 4))


def test_short_filters_take_blocks():
    """A partial filter's cost does not grow with the logarithm of the sequence."""
    assert long_conv_cost(1 << 16, 64) < 0.5 * long_conv_cost(1 << 16, 1 << 16)
    u, k, *_ = problem(1, 1, 5000, 30)
    sizes = []
    rfft = torch.fft.rfft
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fft, "rfft", lambda x, n: sizes.append(n) or rfft(x, n=n))
        found = conv_fft(u, k)
    assert max(sizes) <= 256
    assert torch.allclose(found, long_conv_reference(u, k))


def test_what_is_refused():
    u, k, pre, _ = problem(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"found \[2, 3, 8\] and \[2, 8\]"):
        long_conv(u, k[:2])
    with pytest.raises(ValueError, match="pre must have the shape of u"):
        long_conv(u, k, pre[..., 1:])
    with pytest.raises(ValueError, match=r"k is torch.float32, u is torch.float64"):
        long_conv(u, k.float())
    with pytest.raises(ValueError, match="floating"):
        long_conv(u.long(), k.long())


def test_compiled_with_gradients():
    u, k, pre, post = (t.requires_grad_() for t in problem(2, 2, 30, 30, torch.float32))
    torch._dynamo.reset()
    fast = torch.compile(lambda *a: long_conv(*a).tanh(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(fast(u, k, pre, post).sum(), (u, k, pre, post))
    expected = torch.autograd.grad(long_conv_reference(u, k, pre, post).tanh().sum(), (u, k, pre, post))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gpu_form_is_asked_only_where_it_is_offered():
    u, k, pre, post = problem(1, 2, 20, 20)
    assert torch.equal(module._on_gpu(u, k, pre, post), conv_fft(u, k, pre, post))


def test_sparse_filters_stay_causal_and_say_what_they_lost():
    length = 200
    k = rand(3, length) * torch.exp(-torch.arange(length) / 40)
    k[2] = 0
    found = sparsify(k, low_frequencies(0.25, length + 1))
    assert found.kernel.shape == k.shape
    assert found.kept == pytest.approx(50 / 201)
    # What is there of the cyclic filter, frequency by frequency.
    spectrum = torch.fft.fft(k, n=2 * length)
    order = torch.fft.fftfreq(2 * length).abs() * 2 * length < 49.5
    cyclic = torch.fft.ifft(spectrum * order).real
    assert torch.allclose(found.kernel, cyclic[:, :length], atol=1e-12)
    energy = k.square().sum(-1)
    for row in range(2):
        assert float(found.removed[row]) == pytest.approx(float(1 - cyclic[row].square().sum() / energy[row]))
        future = cyclic[row, length:].square().sum() / cyclic[row].square().sum()
        assert float(found.projected[row]) == pytest.approx(float(future))
        assert 0 < found.projected[row] < 0.2
        assert float(found.changed[row]) == pytest.approx(
            float((found.kernel[row] - k[row]).square().sum() / energy[row])
        )
    assert float(found.changed[2]) == 0
    assert "24.9% of the frequencies kept" in str(found)
    # A convolution with it sees no future.
    u = rand(1, 3, length)
    later = u.clone()
    later[..., 100:] = 7.0
    a, b = long_conv(u, found.kernel), long_conv(later, found.kernel)
    assert torch.allclose(a[..., :100], b[..., :100], atol=1e-12)


def test_keeping_all_frequencies_changes_nothing():
    k = rand(2, 50, dtype=torch.float32)
    found = sparsify(k, low_frequencies(1.0, 51))
    torch.testing.assert_close(found.kernel, k)
    assert float(found.changed.max()) < 1e-12
    with pytest.raises(ValueError, match=r"expected bool \[51\]"):
        sparsify(k, low_frequencies(1.0, 50))
    with pytest.raises(ValueError, match=r"lies in \(0, 1\], found 0"):
        low_frequencies(0, 5)
