"""Weights under which every mixer matters.

Every module of the corpus is stable for any real parameter value (poles go through a sigmoid, decays
through an exponential), so parameters may be redrawn freely: by these helpers, or by a compiler that
tests itself.
"""

import math

import torch
from torch import Tensor, nn


def param(*shape: int) -> nn.Parameter:
    """A normal parameter, of unit norm over all but its first dimension; a vector has unit variance."""
    return nn.Parameter(draw(torch.empty(*shape)))


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    fan_in = math.prod(p.shape[1:])
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return (noise / math.sqrt(fan_in)).to(p.dtype)


@torch.no_grad()
def scale_weights(model: nn.Module, seed: int) -> nn.Module:
    """Redraw all parameters of `model` in place: activations O(1), every mixer and filter matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm_like = "Norm" in type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
            elif norm_like or name == "bias":
                centre = 1.0 if norm_like and name == "weight" else 0.0
                p.copy_(centre + 0.2 * draw(p, generator))
            else:
                p.copy_(draw(p, generator))
    return model


@torch.no_grad()
def break_filters(model: nn.Module, seed: int = 7) -> int:
    """Redraw what holds filter values (its name says "filter"), leave the rest; how many were redrawn."""
    generator = torch.Generator().manual_seed(seed)
    filters = [p for name, p in model.named_parameters() if "filter" in name]
    filters += [b for name, b in model.named_buffers() if "filter" in name.rpartition(".")[2]]
    for t in filters:
        t.copy_(draw(t.real, generator) if t.is_complex() else draw(t, generator))
    return len(filters)
