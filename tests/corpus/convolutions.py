"""Ways to write `y[t] = Σ k[t-i] u[i]`: functions (u `[B, C, L]`, k `[C, L_k]`) -> `[B, C, L]`, L_k <= L."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import fft, ifft, irfft, rfft

Convolve = Callable[[Tensor, Tensor], Tensor]


def direct(u: Tensor, k: Tensor) -> Tensor:
    """The definition, one output position at a time; not for tracing."""
    rows = []
    for t in range(u.shape[-1]):
        taps = k[:, : t + 1].flip(-1)
        rows.append((u[..., t + 1 - taps.shape[-1] : t + 1] * taps).sum(-1))
    return torch.stack(rows, -1)


# Where the factor 1/n sits.


def scale_on_filter(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    k_f = rfft(k, n=n) / n
    u_f = rfft(u.to(dtype=k.dtype), n=n)
    return irfft(u_f * k_f, n=n, norm="forward")[..., : u.shape[-1]]


def scale_on_input(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft((rfft(u, n=n) / n) * rfft(k, n=n), n=n, norm="forward")[..., : u.shape[-1]]


def scale_on_output(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n, norm="forward")[..., : u.shape[-1]] / n


def scale_by_norm_forward(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    product = rfft(u, n=n) * rfft(k, n=n, norm="forward")
    return irfft(product, n=n, norm="forward")[..., : u.shape[-1]]


def scale_by_norm_ortho(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    product = rfft(u, n=n, norm="ortho") * rfft(k, n=n)
    return irfft(product, n=n, norm="ortho")[..., : u.shape[-1]]


# The transform length.


def by_length(n_of: Callable[[int, int], int]) -> Convolve:
    """The plain spelling with n = n_of(L, L_k)."""

    def convolve(u: Tensor, k: Tensor) -> Tensor:
        n = n_of(u.shape[-1], k.shape[-1])
        return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]

    return convolve


def next_power_of_two(m: int) -> int:
    """The least power of two >= m, in arithmetic that a tracer can follow (m < 2^24)."""
    return 1 + sum(2**i * torch.sym_min(1, (m - 1) // 2**i) for i in range(24))


# The kind of transform.


def half_of_complex_fft(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    u_f = fft(u, n=n)[..., : n // 2 + 1]
    return irfft(u_f * rfft(k, n=n), n=n)[..., : u.shape[-1]]


def complex_throughout(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return ifft(fft(u, n=n) * fft(k, n=n), n=n).real[..., : u.shape[-1]]


def rfftn_one_axis(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    product = torch.fft.rfftn(u, s=(n,), dim=(-1,)) * torch.fft.rfftn(k, s=(n,), dim=(-1,))
    return torch.fft.irfftn(product, s=(n,), dim=(-1,))[..., : u.shape[-1]]


def channel_last_dim_1(u: Tensor, k: Tensor) -> Tensor:
    x, h, length = u.transpose(1, 2), k.transpose(0, 1), u.shape[-1]
    product = rfft(x, n=2 * length, dim=1) * rfft(h, n=2 * length, dim=0)
    return irfft(product, n=2 * length, dim=1)[:, :length].transpose(1, 2)


def channel_last_dim_minus_2(u: Tensor, k: Tensor) -> Tensor:
    x, h, length = u.mT, k.mT, u.shape[-1]
    product = torch.einsum("bfc,fc->bfc", rfft(x, 2 * length, -2), rfft(h, 2 * length, -2))
    return irfft(product, 2 * length, -2).narrow(-2, 0, length).mT


def padded_by_hand(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    product = rfft(F.pad(u, (0, length))) * rfft(F.pad(k, (0, 2 * length - k.shape[-1])))
    return irfft(product, n=2 * length)[..., :length]


def padded_by_cat(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    u2 = torch.cat([u, torch.zeros_like(u)], -1)
    return irfft(rfft(u2) * rfft(k, n=2 * length), n=2 * length).split(length, -1)[0]


def real_arithmetic(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    a, b = torch.view_as_real(rfft(u, n=n)), torch.view_as_real(rfft(k, n=n))
    re = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    im = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return irfft(torch.complex(re, im), n=n)[..., : u.shape[-1]]


def joined_transform(u: Tensor, k: Tensor) -> Tensor:
    n, batch = 2 * u.shape[-1], u.shape[0]
    spectra = rfft(torch.cat([u, k.unsqueeze(0)], 0), n=n)
    u_f, k_f = spectra.split([batch, 1], 0)
    return irfft(u_f * k_f, n=n)[..., : u.shape[-1]]


def conj_of_reversed(u: Tensor, k: Tensor) -> Tensor:
    """Correlate with the reversed filter; the result is early by L_k - 1: roll it back."""
    n, late = 2 * u.shape[-1], k.shape[-1] - 1
    y = irfft(rfft(u, n=n) * rfft(k.flip(-1), n=n).conj(), n=n)
    return y.roll(late, -1)[..., : u.shape[-1]]


def shifted_window(u: Tensor, k: Tensor) -> Tensor:
    """The filter starts L taps late; so does the window."""
    length = u.shape[-1]
    product = rfft(u, n=3 * length) * rfft(F.pad(k, (length, 0)), n=3 * length)
    return irfft(product, n=3 * length)[..., length : 2 * length]


# conv1d is a cross-correlation: its weight is the reversed filter.


def conv1d_pad_flip(u: Tensor, k: Tensor) -> Tensor:
    padded = F.pad(u, (k.shape[-1] - 1, 0))
    return F.conv1d(padded, k.flip(-1).unsqueeze(1), groups=u.shape[1])


def conv1d_padding_slice(u: Tensor, k: Tensor) -> Tensor:
    w = torch.flip(k, [-1])[:, None]
    y = F.conv1d(u, w, padding=k.shape[-1] - 1, groups=u.shape[1])
    return y[..., : u.shape[-1]]


def conv_transpose(u: Tensor, k: Tensor) -> Tensor:
    return F.conv_transpose1d(u, k.unsqueeze(1), groups=u.shape[1])[..., : u.shape[-1]]


def conv2d_height_one(u: Tensor, k: Tensor) -> Tensor:
    padded = F.pad(u, (k.shape[-1] - 1, 0)).unsqueeze(2)
    return F.conv2d(padded, k.flip(-1)[:, None, None], groups=u.shape[1]).squeeze(2)


# A lower-triangular Toeplitz matrix, `[C, L, L]`; these want L_k = L.


def toeplitz_gather(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    i = torch.arange(length, device=u.device)
    lag = i[:, None] - i[None, :]
    index = lag.clamp(min=0).reshape(1, -1).expand(k.shape[0], -1)
    matrix = k.gather(1, index).view(-1, length, length)
    return (matrix.tril() @ u.unsqueeze(-1)).squeeze(-1)


def toeplitz_where(u: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(u.shape[-1], device=u.device)
    lag = i[:, None] - i
    matrix = torch.where(lag >= 0, k[:, lag], 0.0)
    return torch.matmul(matrix, u[..., None])[..., 0]


def toeplitz_einsum(u: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(u.shape[-1], device=u.device)
    lag = i.view(-1, 1) - i.view(1, -1)
    matrix = k[:, lag.abs()].masked_fill(lag < 0, 0)
    return torch.einsum("bcj,cij->bci", u, matrix)


def toeplitz_index_select(u: Tensor, k: Tensor) -> Tensor:
    """The matrix holds row j -> column i, so the input multiplies from the left."""
    length = u.shape[-1]
    i = torch.arange(length, device=u.device)
    lag = (i[None, :] - i[:, None]).flatten()
    padded = torch.cat([k, k.new_zeros(k.shape[0], 1)], -1)
    picked = padded.index_select(1, torch.where(lag < 0, length, lag))
    return (u.unsqueeze(-2) @ picked.view(-1, length, length)).squeeze(-2)


def windows_by_unfold(u: Tensor, k: Tensor) -> Tensor:
    windows = F.pad(u, (k.shape[-1] - 1, 0)).unfold(-1, k.shape[-1], 1)
    return (windows * k.flip(-1)[:, None]).sum(-1)


FFT: dict[str, Convolve] = {
    "scale_on_filter": scale_on_filter,
    "scale_on_input": scale_on_input,
    "scale_on_output": scale_on_output,
    "scale_by_norm_forward": scale_by_norm_forward,
    "scale_by_norm_ortho": scale_by_norm_ortho,
    "n_2L": by_length(lambda length, taps: 2 * length),
    "n_taps_plus_length": by_length(lambda length, taps: taps + length),
    "n_taps_plus_length_minus_1": by_length(lambda length, taps: taps + length - 1),
    "n_even_or_odd": by_length(lambda length, taps: 2 * length - length % 2),
    "n_power_of_two": by_length(lambda length, taps: next_power_of_two(2 * length)),
    "n_multiple_of_64": by_length(lambda length, taps: (2 * length + 63) // 64 * 64),
    "n_4L_plus_3": by_length(lambda length, taps: 4 * length + 3),
    "half_of_complex_fft": half_of_complex_fft,
    "complex_throughout": complex_throughout,
    "rfftn_one_axis": rfftn_one_axis,
    "channel_last_dim_1": channel_last_dim_1,
    "channel_last_dim_minus_2": channel_last_dim_minus_2,
    "padded_by_hand": padded_by_hand,
    "padded_by_cat": padded_by_cat,
    "real_arithmetic": real_arithmetic,
    "joined_transform": joined_transform,
    "conj_of_reversed": conj_of_reversed,
    "shifted_window": shifted_window,
}
DIRECT: dict[str, Convolve] = {
    "conv1d_pad_flip": conv1d_pad_flip,
    "conv1d_padding_slice": conv1d_padding_slice,
    "conv_transpose": conv_transpose,
    "conv2d_height_one": conv2d_height_one,
    "toeplitz_gather": toeplitz_gather,
    "toeplitz_where": toeplitz_where,
    "toeplitz_einsum": toeplitz_einsum,
    "toeplitz_index_select": toeplitz_index_select,
}
