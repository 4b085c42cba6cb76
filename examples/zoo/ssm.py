"""State-space models as convolutions: S4D, a diagonal SSM by Vandermonde product, H3, and RTF."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .backbone import LanguageModel


class S4DKernel(nn.Module):
    """The kernel of a diagonal SSM, zero-order hold (Gu et al. 2022, arXiv 2206.11893)."""

    def __init__(self, d_model: int, N: int = 8, dt_min: float = 0.02, dt_max: float = 0.3):
        super().__init__()
        log_dt = torch.rand(d_model) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        C = torch.randn(d_model, N // 2, dtype=torch.cfloat)
        self.C = nn.Parameter(torch.view_as_real(C))
        self.log_dt = nn.Parameter(log_dt)
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(d_model, N // 2)))
        self.A_imag = nn.Parameter(math.pi * repeat(torch.arange(N // 2), "n -> h n", h=d_model).float())

    def forward(self, L: int) -> Tensor:
        dt = torch.exp(self.log_dt)
        C = torch.view_as_complex(self.C)
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * dt.unsqueeze(-1)
        K = dtA.unsqueeze(-1) * torch.arange(L, device=A.device)
        C = C * (torch.exp(dtA) - 1.0) / A
        return 2 * torch.einsum("hn, hnl -> hl", C, torch.exp(K)).real


class S4D(nn.Module):
    """u [B, H, L] -> [B, H, L], channels first as its authors keep them."""

    def __init__(self, d_model: int):
        super().__init__()
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model)
        self.activation, self.dropout = nn.GELU(), nn.Identity()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, kernel_size=1), nn.GLU(dim=-2))

    def forward(self, u: Tensor) -> Tensor:
        L = u.size(-1)
        k = self.kernel(L=L)
        k_f = torch.fft.rfft(k, n=2 * L)
        u_f = torch.fft.rfft(u, n=2 * L)
        y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
        y = y + u * self.D.unsqueeze(-1)
        return self.output_linear(self.dropout(self.activation(y)))


class S4DModel(nn.Module):
    """Features [B, L, d_input] -> [B, L, d_output]."""

    def __init__(self, d_input: int = 5, d_output: int = 7, d_model: int = 12, n_layers: int = 3):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d_input, d_model), nn.Linear(d_model, d_output)
        self.s4_layers = nn.ModuleList(S4D(d_model) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x).transpose(-1, -2)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            x = layer(x) + x
            x = norm(x.transpose(-1, -2)).transpose(-1, -2)
        return self.decoder(x.transpose(-1, -2))


class DiagonalSSM(nn.Module):
    """DSS in the form of its appendix: a real Vandermonde matrix times the weights, applied as a Toeplitz sum.

    x [B, L, D]; `exp(dt·A·arange(L))` for D channels of N real modes.
    """

    def __init__(self, d_model: int, d_state: int = 6):
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.linspace(0.5, 4.0, d_state)).repeat(d_model, 1))
        self.inv_dt = nn.Parameter(torch.randn(d_model) - 2.5)
        self.W = nn.Parameter(torch.randn(d_model, d_state))
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        L = x.size(1)
        dtA = -F.softplus(self.inv_dt)[:, None] * self.A_log.exp()
        vandermonde = torch.exp(dtA[:, :, None] * torch.arange(L, device=x.device))
        K = (self.W[:, None] @ vandermonde).squeeze(1)
        y = F.conv1d(F.pad(x.mT, (L - 1, 0)), K.flip(-1)[:, None], groups=K.shape[0])
        return self.out(F.silu(y.mT))


class ShiftSSM(nn.Module):
    """A state that shifts: a short filter of d_state learned taps, run through the FFT as H3 does."""

    def __init__(self, d_model: int, d_state: int = 8):
        super().__init__()
        self.C = nn.Parameter(torch.randn(d_model, d_state) / 2)
        self.D = nn.Parameter(torch.randn(d_model))

    def forward(self, k: Tensor, L: int) -> Tensor:
        fft_size = 2 * L + self.C.shape[-1]
        ssm_kernel = F.pad(self.C, (0, fft_size - self.C.shape[-1]))
        k_f = torch.fft.rfft(k, n=fft_size)
        out = torch.fft.irfft(torch.fft.rfft(ssm_kernel) * k_f, n=fft_size)[..., :L]
        return out + k * self.D[:, None]


class H3(nn.Module):
    """q · SSM(shift(k) · v), with heads (Fu et al. 2023, arXiv 2212.14052)."""

    def __init__(self, d_model: int, head_dim: int = 1):
        super().__init__()
        self.head_dim, self.H = head_dim, d_model // head_dim
        self.q_proj, self.k_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.v_proj, self.output_linear = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.shift, self.kernel = ShiftSSM(d_model), S4DKernel(self.H)
        self.D = nn.Parameter(torch.randn(self.H))

    def forward(self, u: Tensor) -> Tensor:
        L_og = u.size(-2)
        if L_og % 2 != 0:
            u = F.pad(u, (0, 0, 0, 1))
        L = u.size(-2)
        u = rearrange(u, "b l h -> (b l) h")
        weights = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(u @ proj.weight.T + proj.bias, "(b l) h -> b h l", l=L) for proj in weights)
        k = self.shift(k, L)
        k, v = (rearrange(x, "b (h d) l -> b h d l", d=self.head_dim) for x in (k, v))
        kv = k.unsqueeze(3) * v.unsqueeze(2)  # b h d1 d2 l
        kv_f = torch.fft.rfft(kv, n=2 * L)
        ssm_kernel_f = torch.fft.rfft(self.kernel(L), n=2 * L)
        y = torch.fft.irfft(kv_f * ssm_kernel_f[:, None, None], n=2 * L)[..., :L]
        y = y + kv * self.D[:, None, None, None]
        q = rearrange(q, "b (h d) l -> b h d l", d=self.head_dim)
        y = torch.einsum("bhdl, bhdel -> bhel", q, y)
        y = rearrange(y, "b h d l -> b l (h d)")
        return self.output_linear(y)[:, :L_og, :]


class RTF(nn.Module):
    """A rational transfer function b(z) / (1 + a(z)) at roots of unity (Parnichkun et al. 2024, arXiv 2405.06147).

    `fixed`: on a grid of that many points whatever the length; otherwise on a grid that follows the length.
    """

    def __init__(self, d_model: int, order: int = 4, fixed: int | None = None):
        super().__init__()
        self.fixed = fixed
        self.a = nn.Parameter(self.stable(d_model, order))
        self.b = nn.Parameter(torch.randn(d_model, order + 1) / 16)
        self.h0 = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    @staticmethod
    def stable(d_model: int, order: int) -> Tensor:
        """Denominators whose roots lie inside the unit circle: products of (1 - r z) with r below 0.93."""
        a = torch.ones(d_model, 1)
        for r in 0.93 * torch.rand(order, d_model, 1) ** 0.3:
            a = F.pad(a, (0, 1)) - r * F.pad(a, (1, 0))
        return a[:, 1:]

    def get_k(self, n: int) -> Tensor:
        a = F.pad(self.a, (1, 0), value=1.0)
        K = torch.fft.rfft(self.b, n=n) / torch.fft.rfft(a, n=n)
        return torch.fft.irfft(K, n=n)

    def forward(self, u: Tensor) -> Tensor:
        l = u.shape[1]  # noqa: E741
        x = u.transpose(1, 2)
        k = self.get_k(self.fixed or 2 * l)[..., :l]
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * l) * torch.fft.rfft(k, n=2 * l), n=2 * l)[..., :l]
        y = y + self.h0[:, None] * x
        return self.out_proj(y.transpose(1, 2))


def h3(d_model: int = 12, head_dim: int = 1) -> nn.Module:
    return LanguageModel((H3(d_model, head_dim) for _ in range(2)), d_model)


def diagonal_ssm(d_model: int = 12) -> nn.Module:
    return LanguageModel((DiagonalSSM(d_model) for _ in range(2)), d_model)


def rtf(fixed: int | None = None, d_model: int = 12) -> nn.Module:
    return LanguageModel((RTF(d_model, fixed=fixed) for _ in range(2)), d_model)
