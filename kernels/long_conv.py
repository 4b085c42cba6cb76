"""The causal convolution of a whole sequence, with the gates around it: prefill and training.

`y[t] = post[t] · sum over d < M of k[d] · (pre · u)[t - d]`, gates optional. Source: FlashFFTConv (arXiv 2311.05908),
which fuses the gates and skips the blocks of filters that end early ("partial convolution").

In all forms: u, pre, post [B, C, L], k [C, M], of one floating dtype; lags from L on have nothing to meet. Float16
and bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

from math import log2
from typing import Any

import torch
from torch import Tensor

from fi_compile.kernels.channels import chunks
from fi_compile.kernels.prefix import fast_length

# Overlapping blocks of so many times the filter's length: a quarter of each transform is spent on the overlap.
_BLOCK = 4
_SHORTEST_BLOCK = 256


def long_conv_reference(
    u: Tensor, k: Tensor, pre: Tensor | None = None, post: Tensor | None = None
) -> Tensor:
    """The definition, a lag at a time."""
    x = u if pre is None else u * pre
    y = torch.zeros_like(x)
    for d in range(min(k.shape[-1], x.shape[-1])):
        y[..., d:] += k[:, d, None] * x[..., : x.shape[-1] - d]
    return y if post is None else y * post


def long_conv(
    u: Tensor,
    k: Tensor,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    precision: str = "float32",
) -> Tensor:
    """`post ⊙ (k ∗ (pre ⊙ u))`, [B, C, L], differentiable in all four; one operator under torch.compile.

    A filter that is zero from lag M on is given as `k[:, :M]`: what is skipped is never looked at. precision: of
    products on matrix units, see `gpu.PRECISIONS`; lower ones are for GPUs, and not for float64. Raises ValueError for
    shapes, dtypes or devices that do not fit together.
    """
    _check(u, k, pre, post)
    return torch.ops.flashinf.long_conv(u, k, pre, post, False, precision)


def _check(u: Tensor, k: Tensor, pre: Tensor | None, post: Tensor | None) -> None:
    if u.ndim != 3 or k.ndim != 2 or u.shape[1] != k.shape[0] or k.shape[1] < 1:
        raise ValueError(f"expected u [B, C, L] and k [C, M >= 1], found {list(u.shape)} and {list(k.shape)}")
    for name, other in (("k", k), ("pre", pre), ("post", post)):
        if other is not None and other.dtype != u.dtype:
            raise ValueError(f"{name} is {other.dtype}, u is {u.dtype}")
        if other is not None and other is not k and other.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {list(u.shape)}, found {list(other.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"expected a floating dtype, found {u.dtype}")


def conv_fft(
    u: Tensor, k: Tensor, pre: Tensor | None = None, post: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """The same by torch's FFT; with `reverse` the sum is over `(pre · u)[t + d]`.

    A filter much shorter than the sequence takes overlapping blocks (overlap-save): O(L log M).
    """
    work = torch.promote_types(u.dtype, torch.float32)
    batch, channels, length = u.shape
    lags = min(k.shape[-1], length)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    block = max(_BLOCK * lags, _SHORTEST_BLOCK)
    n = fast_length(min(block, length + lags - 1))
    step = n - lags + 1
    blocks = -(-length // step)
    for start, stop in chunks(channels, n * blocks * batch):
        x = u[:, start:stop] if pre is None else u[:, start:stop] * pre[:, start:stop]
        x = x.to(work).flip(-1) if reverse else x.to(work)
        spectrum = torch.fft.rfft(k[start:stop, :lags].to(work), n=n)
        padded = torch.nn.functional.pad(x, (lags - 1, blocks * step - length))
        product = torch.fft.rfft(padded.unfold(-1, n, step), n=n)
        product *= spectrum[:, None]
        y = torch.fft.irfft(product, n=n)[..., lags - 1 : lags - 1 + step].flatten(-2)[..., :length]
        y = y.flip(-1) if reverse else y
        out[:, start:stop] = y if post is None else y * post[:, start:stop].to(work)
    return out


def filter_gradient(grad: Tensor, x: Tensor, lags: int) -> Tensor:
    """`sum over rows b and t of grad[b, t] · x[b, t - d]` for d < lags: [C, lags]."""
    work = torch.promote_types(x.dtype, torch.float32)
    batch, channels, length = x.shape
    n = fast_length(length + min(lags, length) - 1)
    out = x.new_zeros(channels, lags)
    for start, stop in chunks(channels, n * batch):
        spectrum = torch.fft.rfft(grad[:, start:stop].to(work), n=n)
        # Not `conj()`: compiled graphs call operators where its lazy mark is not looked at.
        spectrum *= torch.fft.rfft(x[:, start:stop].to(work), n=n).conj_physical()
        out[start:stop, :length] = torch.fft.irfft(spectrum.sum(0), n=n)[:, : min(lags, length)]
    return out


def long_conv_cost(length: int, lags: int) -> float:
    """Floating-point operations of `conv_fft` for one channel of one row."""
    n = fast_length(min(max(_BLOCK * lags, _SHORTEST_BLOCK), length + lags - 1))
    blocks = -(-length // (n - lags + 1))
    return (2 * blocks + 1) * 2.5 * n * log2(n) + 3 * n * blocks


_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define(
    "long_conv(Tensor u, Tensor k, Tensor? pre, Tensor? post, bool reverse, str precision='float32') -> Tensor"
)
_library.define(
    "long_conv_filter_gradient(Tensor grad, Tensor x, int lags, str precision='float32') -> Tensor"
)


def _on_cpu(
    u: Tensor,
    k: Tensor,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    reverse: bool = False,
    precision: str = "float32",
) -> Tensor:
    _check_precision(precision, u)
    return conv_fft(u, k, pre, post, reverse)


def _on_gpu(
    u: Tensor,
    k: Tensor,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    reverse: bool = False,
    precision: str = "float32",
) -> Tensor:
    from fi_compile.kernels.long_conv_fft import conv_gpu, offered

    _check_precision(precision, u)
    return (
        conv_gpu(u, k, pre, post, reverse, precision) if offered(u, k) else conv_fft(u, k, pre, post, reverse)
    )


def _gradient_on_cpu(grad: Tensor, x: Tensor, lags: int, precision: str = "float32") -> Tensor:
    _check_precision(precision, x)
    return filter_gradient(grad, x, lags)


def _gradient_on_gpu(grad: Tensor, x: Tensor, lags: int, precision: str = "float32") -> Tensor:
    from fi_compile.kernels.long_conv_gradient import filter_gradient_gpu, offered

    _check_precision(precision, x)
    return (
        filter_gradient_gpu(grad, x, lags, precision) if offered(x, lags) else filter_gradient(grad, x, lags)
    )


def _check_precision(precision: str, u: Tensor) -> None:
    """Nothing would be computed in a lower precision: whoever asks for it must not believe it was."""
    if precision != "float32" and (u.device.type == "cpu" or u.dtype == torch.float64):
        found = "on a CPU" if u.device.type == "cpu" else "of float64"
        raise ValueError(
            f"precision {precision!r} is of a GPU's matrix units; tensors are {found}: use 'float32'"
        )


_library.impl("long_conv", _on_cpu, "CPU")
_library.impl("long_conv", _on_gpu, "CUDA")
_library.impl("long_conv_filter_gradient", _gradient_on_cpu, "CPU")
_library.impl("long_conv_filter_gradient", _gradient_on_gpu, "CUDA")


@torch.library.register_fake("flashinf::long_conv", lib=_library)
def _like_u(
    u: Tensor,
    k: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    reverse: bool,
    precision: str = "float32",
) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake("flashinf::long_conv_filter_gradient", lib=_library)
def _like_k(grad: Tensor, x: Tensor, lags: int, precision: str = "float32") -> Tensor:
    return x.new_empty(x.shape[1], lags)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    u, k, pre, post, ctx.reverse, ctx.precision = inputs
    ctx.save_for_backward(u, k, pre, post)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    """The transposed convolution runs the other way; what `post` multiplied is computed anew, not kept."""
    u, k, pre, post = ctx.saved_tensors
    conv = torch.ops.flashinf.long_conv
    needs = ctx.needs_input_grad
    inner = grad if post is None else grad * post
    found: list[Tensor | None] = [None] * 4
    if needs[0] or needs[2]:
        v = conv(inner, k, None, None, not ctx.reverse, ctx.precision)
        found[0] = v if pre is None else v * pre
        found[2] = None if pre is None else v * u
    if needs[1]:
        x = u if pre is None else u * pre
        pair = (x, inner) if ctx.reverse else (inner, x)
        found[1] = torch.ops.flashinf.long_conv_filter_gradient(*pair, k.shape[-1], ctx.precision)
    if needs[3] and post is not None:
        found[3] = grad * conv(u, k, pre, None, ctx.reverse, ctx.precision)
    return *found, None, None


def _save_pair(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, x, _, ctx.precision = inputs
    ctx.save_for_backward(grad, x)


def _pair_backward(ctx: Any, of_k: Tensor) -> tuple:
    grad, x = ctx.saved_tensors
    conv = torch.ops.flashinf.long_conv
    of_grad = conv(x, of_k, None, None, False, ctx.precision)
    return of_grad, conv(grad, of_k, None, None, True, ctx.precision), None, None


torch.library.register_autograd("flashinf::long_conv", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "flashinf::long_conv_filter_gradient", _pair_backward, setup_context=_save_pair, lib=_library
)
