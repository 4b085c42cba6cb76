import warnings

import pytest
import torch

from fi_compile.kernels import long_conv_fft
from fi_compile.kernels.long_conv import (
    _gradient_on_gpu,
    _on_gpu,
    conv_fft,
    filter_gradient,
    long_conv_reference,
)
from fi_compile.kernels.long_conv_fft import blocks_met, conv_gpu, offered
from fi_compile.kernels.long_conv_gradient import filter_gradient_gpu
from fi_compile.kernels.long_conv_gradient import offered as gradient_offered
from guarded import assert_close, channels_last, rand


def problem(batch, width, length, lags, dtype=torch.float32):
    u, pre, post = (rand(batch, width, length, dtype=dtype, seed=s) for s in range(3))
    return u, rand(width, lags, dtype=dtype, seed=3), pre, post


@pytest.mark.parametrize("gates", ["none", "pre", "post", "both"])
@pytest.mark.parametrize("layout", ["positions", "channels"])
def test_gates_and_layouts(gates, layout):
    u, k, pre, post = problem(2, 5, 700, 700)
    if layout == "channels":
        u, pre, post = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, pre, post))
    pre = pre if gates in ("pre", "both") else None
    post = post if gates in ("post", "both") else None
    exact = (None if g is None else g.double() for g in (pre, post))
    expected = long_conv_reference(u.double(), k.double(), *exact)
    found = conv_gpu(u, k, pre, post)
    x = u if pre is None else u * pre
    scale = float(x.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    assert_close(found, expected, scale * (1 if post is None else float(post.abs().max())), units=3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "lags"), [(1, 1), (511, 600), (512, 512), (513, 513), (1700, 40), (1700, 1), (1600, 513)]
)
def test_lengths(length, lags, reverse):
    u, k, *_ = problem(1, 3, length, lags)
    expected = long_conv_reference(u.double().flip(-1) if reverse else u.double(), k.double())
    found = conv_gpu(u, k, reverse=reverse)
    scale = float(u.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    assert_close(found, expected.flip(-1) if reverse else expected, scale, units=3)
    assert torch.allclose(found, conv_fft(u, k, reverse=reverse), atol=1e-5 * scale)


@pytest.mark.parametrize("reverse", [False, True])
def test_memory_around_operands_does_not_matter(reverse):
    """Channels, rows and positions beside those of the operands are NaN."""
    u, k, pre, post = problem(3, 5, 600, 300)
    turned = [t.double().flip(-1) if reverse else t.double() for t in (u, pre, post)]
    expected = long_conv_reference(turned[0], k.double(), *turned[1:])
    inside = [channels_last(t, gap=2)[0] for t in (u, k[None], pre, post)]
    found = conv_gpu(inside[0], inside[1][0], *inside[2:], reverse=reverse)
    scale = float((u * pre).double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * post.abs().max())
    assert_close(found, expected.flip(-1) if reverse else expected, scale, units=3)


def test_small_blocks(monkeypatch):
    monkeypatch.setattr(long_conv_fft, "has_room", lambda _: False)
    u, k, pre, post = problem(1, 5, 600, 300)
    expected = long_conv_reference(u.double(), k.double(), pre.double(), post.double())
    scale = float((u * pre).double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * post.abs().max())
    assert_close(conv_gpu(u, k, pre, post), expected, scale, units=3)


def test_blocks_that_are_skipped():
    assert blocks_met(5000, 5000, 512) == 10
    assert blocks_met(5000, 1, 512) == 1
    assert blocks_met(5000, 513, 512) == 2
    assert blocks_met(5000, 514, 512) == 3
    assert blocks_met(100, 5000, 512) == 1
    u, k, *_ = problem(1, 3, 5000, 600)
    assert offered(u, k)
    assert not offered(u, torch.zeros(3, 5000))
    assert not offered(u.double(), k.double())


def test_half_precision_and_the_operators_choice():
    u, k, pre, post = problem(1, 3, 600, 600, torch.float16)
    expected = long_conv_reference(u.double(), k.double(), pre.double(), post.double())
    found = _on_gpu(u, k, pre, post)
    assert torch.equal(found, conv_gpu(u, k, pre, post))
    assert_close(found, expected, float(expected.abs().max()), units=1)


@pytest.mark.parametrize("layout", ["positions", "channels"])
@pytest.mark.parametrize(
    ("batch", "width", "length", "lags"),
    [(1, 3, 256, 256), (3, 5, 600, 300), (1, 2, 1, 1), (2, 3, 257, 257), (3, 1, 255, 1), (1, 5, 700, 900)],
)
def test_the_filters_gradient(batch, width, length, lags, layout):
    """Channels, rows and positions beside those of the operands are NaN; lags without an input are zero."""
    x, grad = (rand(batch, width, length, dtype=torch.float32, seed=s) for s in range(2))
    expected = filter_gradient(grad.double(), x.double(), lags)
    inside = [channels_last(t, gap=2)[0] if layout == "channels" else t for t in (grad, x)]
    scale = x.double().norm(dim=(0, 2)).max() * grad.double().norm(dim=(0, 2)).max()
    assert_close(filter_gradient_gpu(*inside, lags), expected, float(scale), units=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_filters_gradient_in_half_precision(dtype):
    x, grad = (rand(2, 3, 300, dtype=dtype, seed=s) for s in range(2))
    expected = filter_gradient(grad.double(), x.double(), 300)
    found = _gradient_on_gpu(grad, x, 300)
    assert torch.equal(found, filter_gradient_gpu(grad, x, 300))
    assert found.dtype == dtype
    assert_close(found, expected, float(expected.abs().max()), units=1)


def test_where_the_filters_gradient_is_a_launch():
    x = torch.zeros(1, 3, 5000)
    assert gradient_offered(x, 2048)
    assert not gradient_offered(x, 2049)
    assert gradient_offered(x[..., :2048], 5000)
    assert not gradient_offered(x.double(), 10)


def test_gradients_through_the_kernel(monkeypatch):
    """The gradients of the operator, where its convolutions and its filter's gradient are launches."""
    library, launches, gradients = torch.library.Library("flashinf", "IMPL"), [], []

    def counted(*args):
        gradients.append(1)
        return filter_gradient_gpu(*args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the form that this hides
        library.impl("long_conv", conv_gpu, "CPU", allow_override=True)
        library.impl("long_conv_filter_gradient", counted, "CPU", allow_override=True)
    operands = [t.requires_grad_() for t in problem(2, 3, 600, 600)]
    spectra = long_conv_fft.spectra_of
    monkeypatch.setattr(long_conv_fft, "spectra_of", lambda *a: launches.append(1) or spectra(*a))
    try:
        y = torch.ops.flashinf.long_conv(*operands, False)
        found = torch.autograd.grad(y.sin().sum(), operands)
    finally:
        library._destroy()
    expected = torch.autograd.grad(long_conv_reference(*operands).sin().sum(), operands)
    assert len(launches) == 3
    assert len(gradients) == 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.double(), 30 * float(b.abs().max()), units=10)
