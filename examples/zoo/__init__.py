"""Published architectures at small sizes, each written the way its authors write it: `python -m examples.zoo`.

Nothing here knows about decoding: only `forward` over a whole sequence exists.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .backbone import awaken
from .everything import everything
from .hyena import HyenaDNA, hyena, multi_head_hyena
from .linear_attention import based, hedgehog, retnet
from .mega import Mega
from .package import striped_hyena_package
from .rwkv import RWKV
from .ssm import S4DModel, diagonal_ssm, h3, rtf
from .striped_hyena import StripedHyena
from .stu import stu, stu_t
from .tnn import tnn
from .transformers import GPT, CapacityRouter, Llama, MixtureOfExperts, MoeTransformer, alibi

__all__ = ["ZOO", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One architecture: how to build it, and what it reads.

    ``features``: 0 for ids [B, L], else the width of the features [B, L, D] it takes. ``vocab``: ids are below it.
    ``double``: whether all of it computes in float64 when asked to.
    """

    build: Callable[[], nn.Module] = field(repr=False)
    features: int = 0
    vocab: int = 23
    double: bool = True

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model in eval mode, always with the same weights, under which every mixer matters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        model = awaken(model, seed).eval()
        return model.double() if dtype == torch.float64 else model  # .to() would cut complex buffers to real

    def sequence(self, batch: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Random input; a longer one begins with the shorter."""
        generator = torch.Generator().manual_seed(seed)
        if not self.features:
            return torch.randint(self.vocab, (length, batch), generator=generator).T.contiguous()
        x = torch.randn(length, batch, self.features, generator=generator, dtype=torch.float64)
        return x.transpose(0, 1).contiguous().to(dtype)


ZOO: dict[str, Entry] = {
    "Hyena, order 2": Entry(partial(hyena, 2)),
    "Hyena, order 3": Entry(partial(hyena, 3)),
    "HyenaDNA": Entry(HyenaDNA, vocab=12),
    "Multi-head Hyena": Entry(multi_head_hyena),
    "StripedHyena": Entry(partial(StripedHyena, ("modal", "modal"))),
    "StripedHyena with attention": Entry(partial(StripedHyena, ("modal", "attention", "modal"))),
    "StripedHyena, the package": Entry(striped_hyena_package, double=False),
    "StripedHyena 2": Entry(partial(StripedHyena, ("short", "medium", "modal", "attention"))),
    "H3": Entry(h3),
    "H3, heads": Entry(partial(h3, head_dim=3)),
    "S4D": Entry(S4DModel, features=5),
    "Diagonal SSM": Entry(diagonal_ssm),
    "RTF, fixed grid": Entry(partial(rtf, 1024)),
    "RTF, grid of the length": Entry(rtf),
    "Spectral transform unit": Entry(stu),
    "Spectral transform unit, tensordot": Entry(stu_t),
    "Mega": Entry(Mega),
    "Mega, Laplace attention": Entry(partial(Mega, laplace=True)),
    "Toeplitz network": Entry(tnn),
    "Hedgehog": Entry(hedgehog),
    "Based": Entry(based),
    "RetNet": Entry(retnet),
    "RWKV": Entry(RWKV),
    "GPT": Entry(GPT),
    "Llama": Entry(Llama),
    "Llama, sliding window": Entry(partial(Llama, window=16)),
    "ALiBi": Entry(alibi),
    "Mixture of experts": Entry(partial(MoeTransformer, MixtureOfExperts)),
    "Mixture of experts, capacity": Entry(partial(MoeTransformer, CapacityRouter)),
    "Everything": Entry(everything),
}
