"""A byte-level Hyena language model (Poli et al. 2023, arXiv 2302.10866), written the ordinary way.

Nothing in this file knows about decoding: only `forward` over a whole sequence exists.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "hyena_kjv.safetensors"


@dataclass(frozen=True)
class HyenaConfig:
    """Sizes of the model; the defaults are those of the trained weights."""

    vocab: int = 256
    width: int = 128
    layers: int = 4
    l_max: int = 16384
    filter_width: int = 48
    filter_bands: int = 12
    longest_memory: float = 256.0  # decay time of the slowest channel, in positions


def fft_conv(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    """Causal convolution of u [B, D, L] with k [D, L], plus skip [D] times u."""
    length = u.shape[-1]
    n = 2 * length
    k_f = torch.fft.rfft(k, n=n) / n
    u_f = torch.fft.rfft(u.to(k.dtype), n=n)
    y = torch.fft.irfft(u_f * k_f, n=n, norm="forward")[..., :length]
    return y + u * skip.unsqueeze(-1)


class Sin(nn.Module):
    """sin(freq * x) with a learned frequency per feature."""

    def __init__(self, width: int):
        super().__init__()
        self.freq = nn.Parameter(torch.full((width,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class HyenaFilter(nn.Module):
    """Implicit filters: an MLP on sinusoids of the position, under an exponential decay."""

    z: Tensor
    decay: Tensor
    t: Tensor

    def __init__(self, cfg: HyenaConfig):
        super().__init__()
        h, channels = cfg.filter_width, cfg.width
        t = torch.arange(cfg.l_max, dtype=torch.float32)[None, :, None]
        wavelength = torch.logspace(math.log10(3.0), math.log10(4.0 * 1024), cfg.filter_bands)
        angle = 2 * math.pi * t / wavelength
        memory = torch.logspace(math.log10(2.0), math.log10(cfg.longest_memory), channels)
        self.register_buffer("z", torch.cat([angle.cos(), angle.sin()], -1), persistent=False)
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("decay", 1 / memory, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * cfg.filter_bands, h), Sin(h), nn.Linear(h, h), Sin(h),
            nn.Linear(h, channels, bias=False),
        )  # fmt: skip
        self.gain = nn.Parameter(2 * memory.rsqrt())
        self.skip = nn.Parameter(torch.randn(channels))

    def forward(self, length: int) -> Tensor:
        """The filter of every channel at positions 0 .. length - 1: [D, length]."""
        h = self.mlp(self.z[:, :length])
        h = h * torch.exp(-self.decay * self.t[:, :length]) * self.gain
        return h[0].transpose(0, 1)


class HyenaOperator(nn.Module):
    """The operator of order 2 over u [B, L, D]: gate, long convolution, gate."""

    def __init__(self, cfg: HyenaConfig):
        super().__init__()
        d = cfg.width
        self.in_proj = nn.Linear(d, 3 * d)
        self.short = nn.Conv1d(3 * d, 3 * d, 3, padding=2, groups=3 * d)
        self.filter = HyenaFilter(cfg)
        self.out_proj = nn.Linear(d, d)

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[1]
        u = self.short(self.in_proj(u).transpose(1, 2))[..., :length]
        x0, x1, v = u.chunk(3, dim=1)
        v = fft_conv(v * x1, self.filter(length), self.filter.skip)
        return self.out_proj((v * x0).transpose(1, 2))


class Block(nn.Module):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, cfg: HyenaConfig):
        super().__init__()
        d = cfg.width
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.mixer = HyenaOperator(cfg)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HyenaLM(nn.Module):
    """ids [B, L] -> logits [B, L, vocab], L <= l_max; the embedding is tied to the head."""

    def __init__(self, cfg: HyenaConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or HyenaConfig()
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.embed.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


def encode(text: str) -> Tensor:
    """UTF-8 bytes as ids [1, P]."""
    return torch.tensor([list(text.encode())], dtype=torch.int64)


def decode(ids: Tensor) -> str:
    """Text of a row of byte ids [P]."""
    return bytes(ids.tolist()).decode(errors="replace")


def save(model: HyenaLM, path: Path = WEIGHTS) -> None:
    """Write the weights as float16 safetensors, the configuration as metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, {"config": json.dumps(asdict(model.cfg))})


def load(path: Path = WEIGHTS) -> HyenaLM:
    """The trained model in float32, in eval mode."""
    with safe_open(path, "pt") as file:
        model = HyenaLM(HyenaConfig(**json.loads(file.metadata()["config"])))
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()
