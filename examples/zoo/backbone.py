"""What the papers on mixers put around their mixer: embedding, pre-norm residual blocks, head."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mixer = Callable[[], nn.Module]


class Mlp(nn.Module):
    def __init__(self, d_model: int, expand: int = 2):
        super().__init__()
        self.fc1 = nn.Linear(d_model, expand * d_model)
        self.fc2 = nn.Linear(expand * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(d_model), mixer
        self.norm2, self.mlp = nn.LayerNorm(d_model), Mlp(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """ids [B, L] -> logits [B, L, vocab] through one block per mixer."""

    def __init__(self, mixers: Iterable[nn.Module], d_model: int, vocab: int = 23):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList(Block(mixer, d_model) for mixer in mixers)
        self.ln_f = nn.LayerNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


@torch.no_grad()
def awaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw weights so that every mixer matters: the papers' own initialisation is nearly inert.

    Matrices, convolutions and embeddings get outputs of unit variance; gains and biases move by a fifth. What a
    model declares itself (poles, decays, filters) stays as its constructor made it.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

    for module in model.modules():
        norm = "Norm" in type(module).__name__
        if not (norm or isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))):
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2:
                p.copy_((1.0 if norm and name != "bias" else 0.0) + 0.2 * noise(p))
            elif isinstance(module, nn.Embedding):
                p.copy_(noise(p))
            else:
                p.copy_(noise(p) / p[0].numel() ** 0.5)
    return model
