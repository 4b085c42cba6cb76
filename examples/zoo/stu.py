"""A spectral transform unit (Agarwal et al. 2023, arXiv 2312.06837): fixed filters from a Hankel matrix."""

import torch
from torch import Tensor, nn

from .backbone import LanguageModel


def get_hankel(seq_len: int) -> Tensor:
    entries = torch.arange(1, seq_len + 1, dtype=torch.float64)
    i_plus_j = entries[:, None] + entries[None, :]
    return 2.0 / (i_plus_j**3 - i_plus_j)


def get_spectral_filters(seq_len: int, K: int) -> Tensor:
    sigma, phi = torch.linalg.eigh(get_hankel(seq_len))
    return (phi[:, -K:] * sigma[-K:] ** 0.25).float()


class STU(nn.Module):
    """Every channel through all K filters, with and without alternating signs."""

    def __init__(self, d_model: int, K: int = 5, seq_len: int = 256):
        super().__init__()
        self.K = K
        self.register_buffer("phi", get_spectral_filters(seq_len, K))
        self.M_phi_plus = nn.Parameter(torch.randn(K, d_model, d_model) / (K * d_model) ** 0.5)
        self.M_phi_minus = nn.Parameter(torch.randn(K, d_model, d_model) / (K * d_model) ** 0.5)

    def convolve(self, u: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        bsz, seq_len, d_in = u.shape
        _, K = v.shape
        sgn = torch.full((1, seq_len, 1), 1, device=u.device, dtype=u.dtype)
        sgn[:, 1::2] *= -1
        v = torch.fft.rfft(v.view(1, -1, K, 1), n=n, dim=1)
        U = torch.stack([u, u * sgn], dim=-1).view(bsz, seq_len, 1, d_in, 2)
        U = torch.fft.rfft(U, n=n, dim=1)
        U_conv = torch.fft.irfft(v.unsqueeze(-1) * U, n=n, dim=1)[:, :seq_len]
        U_plus, U_minus = torch.unbind(U_conv, dim=-1)
        return U_plus, U_minus * sgn.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        U_plus, U_minus = self.convolve(x, self.phi[: x.shape[1]], n)
        spectral_plus = torch.tensordot(U_plus, self.M_phi_plus, dims=([2, 3], [0, 1]))
        spectral_minus = torch.tensordot(U_minus, self.M_phi_minus, dims=([2, 3], [0, 1]))
        return spectral_plus + spectral_minus


def stu(d_model: int = 12) -> nn.Module:
    return LanguageModel((STU(d_model) for _ in range(2)), d_model)


class STUT(nn.Module):
    """The tensordot approximation: inputs are projected first, one filter a channel is left."""

    def __init__(self, d_model: int, K: int = 5, seq_len: int = 256):
        super().__init__()
        self.register_buffer("stu_filters", get_spectral_filters(seq_len, K))
        self.M_inputs = nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5)
        self.M_filters = nn.Parameter(torch.randn(K, d_model))

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        x_proj = x @ self.M_inputs
        phi_proj = self.stu_filters @ self.M_filters
        signs = (-1.0) ** torch.arange(L, device=x.device, dtype=x.dtype).view(1, -1, 1)
        h = torch.fft.rfft(phi_proj[:L], n=2 * L, dim=0)
        plus = torch.fft.irfft(torch.fft.rfft(x_proj, n=2 * L, dim=1) * h, n=2 * L, dim=1)[:, :L]
        minus = torch.fft.irfft(torch.fft.rfft(x_proj * signs, n=2 * L, dim=1) * h, n=2 * L, dim=1)[:, :L]
        return plus + minus * signs


def stu_t(d_model: int = 12) -> nn.Module:
    return LanguageModel((STUT(d_model) for _ in range(2)), d_model)
