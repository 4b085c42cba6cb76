"""An architecture nobody has seen, decoded without a change: `python examples/custom_architecture.py`.

The mixer is spelled its own way: channel-last, full complex FFTs, one filter a head made of damped
waves, a running mean as the gate. Only `forward` exists; flashinf derives the rest.
"""

import argparse

import torch
import torch.nn.functional as F
from check import assert_same
from torch import Tensor, nn

import fi_compile


class WaveMixer(nn.Module):
    """Causal mixing of x [B, L, D]: a long convolution per head, gated by the mean so far."""

    def __init__(self, width: int, heads: int, waves: int = 6):
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 2 * width)
        self.outward = nn.Linear(width, width)
        self.amplitude = nn.Parameter(torch.randn(heads, waves) / 2)
        self.decay = nn.Parameter(torch.logspace(-2.5, -0.3, waves).repeat(heads, 1))
        self.frequency = nn.Parameter(torch.rand(heads, waves) * 1.5)

    def filters(self, length: int) -> Tensor:
        """One filter a head: a sum of damped waves at positions 0 .. length - 1, [L, H]."""
        t = torch.arange(length, device=self.decay.device)[:, None, None]
        waves = torch.exp(-self.decay.abs() * t) * torch.cos(self.frequency * t)
        return (self.amplitude * waves).sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        v, g = self.inward(x).chunk(2, dim=-1)
        v = v.view(batch, length, self.heads, width // self.heads)
        spectrum = torch.fft.fft(v, n=2 * length, dim=1)
        response = torch.fft.fft(self.filters(length), n=2 * length, dim=0)
        mixed = torch.fft.ifft(spectrum * response[None, :, :, None], dim=1).real[:, :length]
        count = torch.arange(1, length + 1, device=x.device)[:, None]
        mean = torch.cumsum(g, dim=1) / count
        return self.outward(mixed.reshape(batch, length, width) * torch.sigmoid(4 * mean))


class GatedMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class WaveLM(nn.Module):
    """ids [B, L] -> logits [B, L, vocab]."""

    def __init__(self, vocab: int = 61, width: int = 48, heads: int = 4, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mixers = nn.ModuleList(WaveMixer(width, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(GatedMLP(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


def decode(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """The logits [B, L - prompt + 1, V] after a prompt, one position at a time."""
    decoder = fi_compile.decoder(model, ids, max_length=ids.shape[1])
    logits = [decoder.prefill(ids[:, :prompt])]
    logits += [decoder.step(token) for token in ids[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Decode an architecture of one's own.")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--prompt", type=int, default=37)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = WaveLM().eval()
    ids = torch.randint(0, model.embed.num_embeddings, (2, args.prompt + args.tokens))
    print(fi_compile.explain(model, ids))
    ratio = assert_same(model, ids, decode(model, ids, args.prompt))
    print(f"{args.tokens} steps after a prompt of {args.prompt}, 2 rows: the model's own logits")
    print(f"(error {ratio:.2f} times that of the plain forward)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
