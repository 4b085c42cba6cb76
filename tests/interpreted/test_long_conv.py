import warnings

import pytest
import torch

from fi_compile.kernels import long_conv_fft
from fi_compile.kernels.long_conv import _on_gpu, conv_fft, long_conv_reference
from fi_compile.kernels.long_conv_fft import blocks_met, conv_gpu, offered
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


def test_gradients_through_the_kernel(monkeypatch):
    """The gradients of the operator, where its convolutions are launches."""
    library = torch.library.Library("flashinf", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the form that this hides
        library.impl("long_conv", conv_gpu, "CPU", allow_override=True)
    operands = [t.requires_grad_() for t in problem(2, 3, 600, 600)]
    launches = []
    spectra = long_conv_fft.spectra_of
    monkeypatch.setattr(long_conv_fft, "spectra_of", lambda *a: launches.append(1) or spectra(*a))
    try:
        y = torch.ops.flashinf.long_conv(*operands, False)
        found = torch.autograd.grad(y.sin().sum(), operands)
    finally:
        library._destroy()
    expected = torch.autograd.grad(long_conv_reference(*operands).sin().sum(), operands)
    assert len(launches) == 3
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.double(), 30 * float(b.abs().max()), units=10)
