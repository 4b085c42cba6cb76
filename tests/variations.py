"""Models nobody prepared for: ordinary PyTorch in spellings that no rule was written after."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH = 12
L_MAX = 256


class Residual(nn.Module):
    """Two copies of a mixer in pre-norm residual blocks: features [B, L, 12] -> the same."""

    def __init__(self, mixer: Callable[[], nn.Module]):
        super().__init__()
        self.mixers = nn.ModuleList(mixer() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


class EinopsHyena(nn.Module):
    """A long convolution per group, every reshape by einops, the filter repeated over the group."""

    def __init__(self, groups: int = 3):
        super().__init__()
        self.groups = groups
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_decay = nn.Parameter(torch.linspace(-3, 0, groups))
        self.gain = nn.Parameter(torch.randn(groups))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = rearrange(self.qkv(x), "b n (three g d) -> three b g d n", three=3, g=self.groups)
        t = torch.arange(n, device=x.device, dtype=x.dtype)
        h = repeat(self.gain, "g -> g 1") * torch.exp(-einsum(self.log_decay.exp(), t, "g, n -> g n"))
        spectrum = einsum(
            torch.fft.rfft(k * v, n=2 * n), torch.fft.rfft(h, n=2 * n), "b g d f, g f -> b g d f"
        )
        y = torch.fft.irfft(spectrum, n=2 * n)[..., :n]
        pooled = reduce(y, "b g d n -> b g 1 n", "mean")
        return self.out(rearrange(q * (y + pooled), "b g d n -> b n (g d)"))


class ModuleAttention(nn.Module):
    """`nn.MultiheadAttention` with the mask its documentation suggests."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return y


class EncoderStack(nn.Module):
    """`nn.TransformerEncoder`, causal: features [B, L, 12] -> the same."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.encoder(x, mask=mask, is_causal=True)


class PackedSlopes(nn.Module):
    """Packed qkv unbound from one projection, scores by baddbmm, a learned temperature at every position."""

    def __init__(self, heads: int = 3):
        super().__init__()
        self.heads, self.in_proj = heads, nn.Linear(WIDTH, 3 * WIDTH)
        self.temperature = nn.Parameter(torch.rand(L_MAX) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.in_proj(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()
        bias = torch.full((L, L), -1e9, dtype=x.dtype, device=x.device).triu(1).expand(B * self.heads, L, L)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=1 / math.sqrt(D // self.heads))
        scores = scores / self.temperature[:L, None]
        y = torch.bmm(F.softmax(scores, -1), v)
        return y.view(B, self.heads, L, -1).transpose(1, 2).reshape(B, L, D)


class Parametrized(nn.Module):
    """Weight-normed causal convolutions, dilated, around a spectrally normed projection."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, dilation=d, groups=4)) for d in (1, 3, 9)
        )
        self.mix = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        for conv in self.convs:
            pad = (conv.kernel_size[0] - 1) * conv.dilation[0]
            y = y + F.relu(conv(F.pad(y, (pad, 0))))
        return self.mix(y.transpose(1, 2))


class CachedFilter(nn.Module):
    """Builds its decay table at the first call, longer ones when needed, and keeps it on the module."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-4, -1, WIDTH))
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        if self.table is None or self.table.shape[0] < L:
            self.table = torch.arange(max(L, 8), device=x.device, dtype=x.dtype)
        k = torch.exp(-self.rate.exp()[:, None] * self.table[:L])
        u = x.mT
        return torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(k, n=2 * L), n=2 * L)[..., :L].mT


class InPlace(nn.Module):
    """The filter scaled, signed and normalised in place; the output accumulated in place."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.randn(WIDTH, L_MAX) / 4)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        k = self.k.clone()
        k.mul_(torch.exp(-0.05 * torch.arange(L_MAX, device=x.device, dtype=x.dtype)))
        k[:, 0] += 1.0
        k.div_(k.abs().sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        y += torch.fft.irfft(torch.fft.rfft(x, 2 * L, 1) * torch.fft.rfft(k[:, :L].mT, 2 * L, 0), 2 * L, 1)[
            :, :L
        ]
        y[..., : WIDTH // 2] *= 2.0
        return self.proj(y.add_(x))


class RunningMax(nn.Module):
    """Causal pooling: the running maximum and the running mean, gated."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        highest, _ = torch.cummax(x, dim=1)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
        return torch.sigmoid(self.gate(x)) * highest + torch.cumsum(x, 1) / count


class MaxPool(nn.Module):
    """A maximum over the last eight positions, by padding and max_pool1d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool1d(F.pad(x.mT, (7, 0), value=float("-inf")), 8, stride=1).mT


class LearnedState(nn.Module):
    """A diagonal recurrence in closed form that starts from a learned state: h[t] = a^t h0 + (a^t * x)[t]."""

    def __init__(self):
        super().__init__()
        self.h0, self.logit = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.linspace(0, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        t = torch.arange(L, device=x.device)
        powers = torch.sigmoid(self.logit)[:, None] ** t
        y = F.conv1d(F.pad(x.mT, (L - 1, 0)), powers.flip(-1)[:, None], groups=WIDTH)
        return (y + powers * torch.sigmoid(self.logit)[:, None] * self.h0[:, None]).mT


class Interpolated(nn.Module):
    """A filter of few knots, interpolated to a fixed length once and cut: scales as in SGConv."""

    def __init__(self, knots: int = 16, scales: int = 5):
        super().__init__()
        self.knots = nn.ParameterList(nn.Parameter(torch.randn(1, WIDTH, knots) / 4) for _ in range(scales))

    def forward(self, x: Tensor) -> Tensor:
        L = x.size(1)
        pieces = [
            F.interpolate(k, scale_factor=2 ** max(0, i - 1), mode="linear", align_corners=False) * 0.5**i
            for i, k in enumerate(self.knots)
        ]
        k = torch.cat(pieces, dim=-1)
        k = k / k.norm(dim=-1, keepdim=True)
        k = k[..., :L]
        u_f = torch.fft.rfft(x.transpose(-1, -2), n=2 * L)
        return torch.fft.irfft(u_f * torch.fft.rfft(k, n=2 * L), n=2 * L)[..., :L].transpose(-1, -2)


class ChunkedLinear(nn.Module):
    """Linear attention by chunks of eight: the input is padded to whole chunks first."""

    def __init__(self, chunk: int = 8):
        super().__init__()
        self.chunk, self.qkv = chunk, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        pad = (self.chunk - L % self.chunk) % self.chunk
        q, k, v = F.pad(self.qkv(x), (0, 0, 0, pad)).view(B, -1, self.chunk, 3, D).unbind(3)
        kv = torch.einsum("bncd,bnce->bnde", k, v)
        kv = kv.cumsum(1) - kv
        inter = torch.einsum("bncd,bnde->bnce", q, kv)
        intra = (q @ k.mT).tril() @ v
        return (inter + intra).reshape(B, -1, D)[:, :L] / D


class ChunkedBranch(ChunkedLinear):
    """The same behind the branch people write: pad only if there is something to pad."""

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        if L % self.chunk != 0:
            x = F.pad(x, (0, 0, 0, self.chunk - L % self.chunk))
        return super().forward(x)[:, :L]


class DeltaRule(nn.Module):
    """DeltaNet by the inverse of a unit lower triangular matrix."""

    def __init__(self):
        super().__init__()
        self.qkv, self.beta = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        k, beta = F.normalize(k, dim=-1), torch.sigmoid(self.beta(x))
        A = torch.tril(beta * (k @ k.mT), diagonal=-1)
        T = torch.linalg.solve_triangular(
            A + torch.eye(L, dtype=x.dtype, device=x.device), beta * v, upper=False
        )
        return torch.tril(q @ k.mT) @ T


class ComplexLRU(nn.Module):
    """A linear recurrent unit: complex input and output matrices around a complex long convolution."""

    def __init__(self, states: int = 10):
        super().__init__()
        self.nu, self.theta = (
            nn.Parameter(torch.linspace(-4, -1, states)),
            nn.Parameter(torch.rand(states) * 3),
        )
        self.B = nn.Parameter(torch.randn(WIDTH, states, 2) / 4)
        self.C = nn.Parameter(torch.randn(states, WIDTH, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        lam = torch.exp(torch.complex(-self.nu.exp(), self.theta))
        k = lam[:, None] ** torch.arange(L, device=x.device)
        B, C = torch.view_as_complex(self.B), torch.view_as_complex(self.C)
        u = (x.to(B.dtype) @ B).transpose(1, 2)
        h = torch.fft.ifft(torch.fft.fft(u, n=2 * L) * torch.fft.fft(k, n=2 * L), n=2 * L)[..., :L]
        return (h.transpose(1, 2) @ C).real


class MinGRU(nn.Module):
    """minGRU in log space: a parallel scan by logcumsumexp (Feng et al. 2024, arXiv 2410.01201)."""

    def __init__(self):
        super().__init__()
        self.to_hidden_and_gate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        log_coeffs = -F.softplus(gate)
        log_z = -F.softplus(-gate)
        log_g = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        log_values = log_z + log_g
        a_star = log_coeffs.cumsum(dim=1)
        log_h0_plus_b_star = (log_values - a_star).logcumsumexp(dim=1)
        return (a_star + log_h0_plus_b_star).exp()


class GatedLinearAttention(nn.Module):
    """Data-dependent decay: differences of cumulative sums of log gates, exponentiated under a mask."""

    def __init__(self, heads: int = 2):
        super().__init__()
        self.heads, self.qkv, self.g = heads, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        g = F.logsigmoid(rearrange(self.g(x), "b l h -> b h l")).cumsum(-1)
        decay = g[..., :, None] - g[..., None, :]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        decay = decay.masked_fill(~mask, float("-inf")).exp()
        return rearrange((q @ k.mT * decay) @ v, "b h l d -> b l (h d)")


class SelectiveSSM(nn.Module):
    """Mamba-2's dual form: the segment sum of log decays as a matrix (Dao and Gu 2024, arXiv 2405.21060)."""

    def __init__(self, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(WIDTH, WIDTH + 8 + heads)
        self.A_log, self.D = nn.Parameter(torch.randn(heads) / 2), nn.Parameter(torch.randn(heads))
        self.conv1d = nn.Conv1d(WIDTH + 8, WIDTH + 8, 4, groups=WIDTH + 8, padding=3)

    def segsum(self, x: Tensor) -> Tensor:
        T = x.size(-1)
        x = repeat(x, "... d -> ... d e", e=T)
        mask = torch.tril(torch.ones(T, T, device=x.device, dtype=torch.bool), diagonal=-1)
        x = x.masked_fill(~mask, 0)
        x_segsum = torch.cumsum(x, dim=-2)
        mask = torch.tril(torch.ones(T, T, device=x.device, dtype=torch.bool), diagonal=0)
        return x_segsum.masked_fill(~mask, -torch.inf)

    def forward(self, u: Tensor) -> Tensor:
        L = u.shape[1]
        xBC, dt = torch.split(self.in_proj(u), [WIDTH + 8, self.heads], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2)).transpose(1, 2)[:, :L])
        x, B, C = torch.split(xBC, [WIDTH, 4, 4], dim=-1)
        x, dt = rearrange(x, "b l (h p) -> b l h p", h=self.heads), F.softplus(dt)
        A = rearrange(-self.A_log.exp() * dt, "b l h -> b h l")
        decay = torch.exp(self.segsum(A))
        y = torch.einsum("bln,bsn,bhls,bshp->blhp", C, B, decay, x * dt.unsqueeze(-1))
        return rearrange(y + self.D[:, None] * x, "b l h p -> b l (h p)")


class Autocast(nn.Module):
    """A region of lower precision inside the forward."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.gelu(self.up(x))
        return self.down(h.to(x.dtype)).cumsum(1) / 8


class Float32Islands(nn.Module):
    """Norm and convolution in float32 whatever the model's type is."""

    def __init__(self):
        super().__init__()
        self.norm, self.k = nn.RMSNorm(WIDTH), nn.Parameter(torch.randn(WIDTH, 40) / 6)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        L, dtype = x.shape[1], x.dtype
        u = self.norm(x).float().mT
        n = L + self.k.shape[-1]
        y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(self.k.float(), n=n), n=n)[..., :L]
        return self.proj(y.mT.to(dtype))


class GLUs(nn.Module):
    """Gated units in all their variants, with dropout, around a gated short convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, 2 * WIDTH, 5, padding=4)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(4))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.conv(x.transpose(-1, -2))[..., :-4], dim=1).transpose(-1, -2)
        for gate, layer in zip((F.gelu, F.silu, F.relu, torch.tanh), self.inner, strict=True):
            a, b = layer(self.drop(x)).chunk(2, -1)
            x = x + gate(a) * b
        return x


class TokenShifts(nn.Module):
    """Shifts by cat, by roll and zeros, by narrow, by a cut from the end."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        two = torch.roll(x, 2, dims=1)
        two[:, :2] = 0
        three = F.pad(x, (0, 0, 3, 0)).narrow(1, 0, x.shape[1])
        four = F.pad(x, (0, 0, 4, 0))[:, :-4]
        return self.mix(torch.cat([one, two, three, four], -1))


class RolledMask(nn.Module):
    """A shift by roll, what came around multiplied away."""

    def forward(self, x: Tensor) -> Tensor:
        kept = (torch.arange(x.shape[1], device=x.device) >= 2).to(x.dtype)
        return torch.roll(x, 2, dims=1) * kept[:, None]


class FlashStyleMask(nn.Module):
    """Attention under an additive mask of -10000, as several libraries write it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.triu(torch.full((L, L), -10000.0, device=x.device), 1)
        return torch.softmax(q @ k.mT / WIDTH**0.5 + mask.to(x.dtype), -1) @ v


class RelativeBias(nn.Module):
    """T5's buckets: a learned bias by the logarithm of the distance, looked up in an embedding."""

    def __init__(self, buckets: int = 16, heads: int = 2):
        super().__init__()
        self.buckets, self.heads = buckets, heads
        self.bias, self.qkv = nn.Embedding(buckets, heads), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        position = torch.arange(L, device=x.device)
        distance = -torch.min(position[None, :] - position[:, None], torch.zeros(L, L, dtype=torch.long))
        exact = self.buckets // 2
        large = (
            exact
            + (torch.log(distance.float() / exact) / math.log(64 / exact) * (self.buckets - exact)).long()
        )
        bucket = torch.where(distance < exact, distance, large.clamp(max=self.buckets - 1))
        bias = self.bias(bucket).permute(2, 0, 1)
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.mT + bias).masked_fill(~causal, torch.finfo(x.dtype).min)
        return rearrange(scores.softmax(-1) @ v, "b h l d -> b l (h d)")


class StridedMemory(nn.Module):
    """Cross attention of every position to fixed learned memories, and a causal mean of what it found."""

    def __init__(self, memories: int = 7):
        super().__init__()
        self.memory, self.q = nn.Parameter(torch.randn(memories, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.memory.T, -1)
        y = weights @ self.memory
        return y.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)


VARIATIONS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: (lambda cls=cls: Residual(cls))
    for cls in (
        EinopsHyena, ModuleAttention, PackedSlopes, Parametrized, CachedFilter, InPlace, RunningMax, MaxPool,
        LearnedState, Interpolated, ChunkedLinear, ChunkedBranch, DeltaRule, ComplexLRU, MinGRU,
        GatedLinearAttention, SelectiveSSM, Autocast, Float32Islands, GLUs, TokenShifts, RolledMask, FlashStyleMask,
        RelativeBias, StridedMemory,
    )
}  # fmt: skip
VARIATIONS["EncoderStack"] = EncoderStack
