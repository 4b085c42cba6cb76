"""Random models as small printable descriptions: sound ones, and ones with exactly one flaw.

`architectures(broken=...)` is a hypothesis strategy; a description prints as the call that makes it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .models import FeatureModel, LanguageModel, Norm, Positions
from .others import OTHERS
from .spellings import SPELLINGS
from .traps import DATA_TRAPS, TRAPS
from .weights import scale_weights

Place = Literal["after", "beside", "instead"]

MIXERS = {**SPELLINGS, **OTHERS}
# A norm may cancel what a data trap does to all features alike: those go through `Flawed`.
FLAWED_MIXERS = tuple(name for name in TRAPS if not name.startswith("data_"))


class Flawed(nn.Module):
    """A mixer whose output ("after"), or a path beside it, passes a trap, each feature to another degree."""

    def __init__(self, mixer: nn.Module, trap: str, place: Place, width: int):
        super().__init__()
        self.mixer, self.place = mixer, place
        self.spoil, _ = DATA_TRAPS[trap]
        self.register_buffer("degree", torch.linspace(0.4, 1.3, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        clean = y if self.place == "after" else x
        return y + self.degree * (self.spoil(clean) - clean)


@dataclass(frozen=True)
class Flaw:
    """`trap` (a name in DATA_TRAPS, or in TRAPS for "instead") at block `block`."""

    trap: str
    block: int
    place: Place


@dataclass(frozen=True)
class Architecture:
    """A model: ids `[B, L]` -> logits; with vocab None, features `[B, L, width]` -> the same."""

    mixers: tuple[str, ...]
    width: int
    vocab: int | None = 17
    norm: Norm = "layer"
    mlp: bool = False
    positions: Positions = "none"
    gating: bool = False
    tied: bool = False
    seed: int = 0
    flaw: Flaw | None = None
    l_max: int = 128

    def build(self) -> nn.Module:
        """The model in float32, the same weights each time; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mixers = [self._mixer(i, name) for i, name in enumerate(self.mixers)]
            style = {
                "norm": self.norm,
                "mlp": self.mlp,
                "positions": self.positions,
                "gating": self.gating,
                "l_max": self.l_max,
            }
            if self.vocab is None:
                model = FeatureModel(mixers, self.width, **style)
            else:
                model = LanguageModel(mixers, self.width, self.vocab, tied=self.tied, **style)
            return scale_weights(model, self.seed)

    def example(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random ids `[B, L]` or features `[B, L, width]`, float64; of one batch size, all share a prefix."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocab is not None:
            ids = torch.randint(self.vocab, (batch, self.l_max), generator=generator)
            return ids[:, :length]
        x = torch.randn(batch, self.l_max, self.width, generator=generator, dtype=torch.float64)
        return x[:, :length]

    def _mixer(self, block: int, name: str) -> nn.Module:
        flaw = self.flaw
        if flaw is None or flaw.block != block:
            return MIXERS[name](self.width, self.l_max)
        if flaw.place == "instead":
            return TRAPS[flaw.trap][0](self.width, self.l_max)
        mixer = MIXERS[name](self.width, self.l_max)
        return Flawed(mixer, flaw.trap, flaw.place, self.width)


@st.composite
def architectures(
    draw: st.DrawFn,
    broken: bool = False,
    spellings: Sequence[str] = tuple(SPELLINGS),
    others: Sequence[str] = tuple(OTHERS),
) -> Architecture:
    """One to three mixers, at least one a long convolution; with `broken`, one flaw at a random place."""
    mixer = st.one_of(st.sampled_from(spellings), st.sampled_from(others))
    rest = draw(st.lists(mixer, max_size=2))
    at = draw(st.integers(0, len(rest)))
    mixers = (*rest[:at], draw(st.sampled_from(spellings)), *rest[at:])
    vocab = draw(st.sampled_from((17, 29, None)))
    sound = Architecture(
        mixers=mixers,
        width=draw(st.sampled_from((4, 6, 8, 10, 12))),
        vocab=vocab,
        norm=draw(st.sampled_from(("layer", "rms", "none"))),
        mlp=draw(st.booleans()),
        positions=draw(st.sampled_from(("none", "learned", "sinus"))),
        gating=draw(st.booleans()),
        tied=vocab is not None and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    if not broken:
        return sound
    place = draw(st.sampled_from(("after", "beside", "instead")))
    trap = draw(st.sampled_from(FLAWED_MIXERS if place == "instead" else tuple(DATA_TRAPS)))
    return replace(sound, flaw=Flaw(trap, draw(st.integers(0, len(rest))), place))
