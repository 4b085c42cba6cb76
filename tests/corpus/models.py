"""Whole models around the corpus's mixers: `LanguageModel` for ids, `FeatureModel` for features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from .others import GatedMLP, LearnedPositions, PointwiseGate, RMSNorm, SinusoidalPositions
from .weights import scale_weights

__all__ = ["FeatureModel", "LanguageModel", "Output", "logits_of", "scale_weights"]

Norm = Literal["layer", "rms", "none"]
Positions = Literal["none", "learned", "sinus"]


@dataclass
class Output:
    """What a model returns under `output="dataclass"`."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


def norm_of(kind: Norm, width: int) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "rms":
            return RMSNorm(width)
    return nn.Identity()


def positions_of(kind: Positions, width: int, l_max: int) -> nn.Module:
    match kind:
        case "learned":
            return LearnedPositions(width, l_max)
        case "sinus":
            return SinusoidalPositions(width, l_max)
    return nn.Identity()


class Block(nn.Module):
    """Residual around norm and mixer (times a gate from its input), then around norm and a gated MLP."""

    def __init__(self, mixer: nn.Module, width: int, norm: Norm, mlp: bool, gating: bool):
        super().__init__()
        self.norm, self.mixer = norm_of(norm, width), mixer
        self.gate = PointwiseGate(width, 0) if gating else None
        self.mlp = nn.Sequential(norm_of(norm, width), GatedMLP(width, 0)) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.mixer(h)
        x = x + (y if self.gate is None else y * self.gate(h))
        return x if self.mlp is None else x + self.mlp(x)


class FeatureModel(nn.Module):
    """Positions, then a block per mixer, then a norm: features `[B, L, D]` -> `[B, L, D]`."""

    def __init__(
        self,
        mixers: Sequence[nn.Module],
        width: int,
        *,
        norm: Norm = "layer",
        mlp: bool = True,
        positions: Positions = "none",
        gating: bool = False,
        l_max: int = 256,
    ):
        super().__init__()
        self.positions = positions_of(positions, width, l_max)
        self.blocks = nn.ModuleList(Block(m, width, norm, mlp, gating) for m in mixers)
        self.norm = norm_of(norm, width)

    def hidden(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input of every block, then the output: each `[B, L, D]`."""
        states = [self.positions(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return (*states[:-1], self.norm(states[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)[-1]


class LanguageModel(nn.Module):
    """An embedding, a FeatureModel, a head: ids `[B, L]` -> logits `[B, L, V]`.

    `output`: "tensor" logits; "tuple" (logits, None); "dict" {"logits", "last_hidden_state"};
    "dataclass" `Output`; "hidden" (logits, hidden states). `tied`: embedding and head share weights.
    """

    def __init__(
        self,
        mixers: Sequence[nn.Module],
        width: int,
        vocab: int,
        *,
        norm: Norm = "layer",
        mlp: bool = True,
        positions: Positions = "none",
        gating: bool = False,
        tied: bool = False,
        output: Literal["tensor", "tuple", "dict", "dataclass", "hidden"] = "tensor",
        l_max: int = 256,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.body = FeatureModel(
            mixers, width, norm=norm, mlp=mlp, positions=positions, gating=gating, l_max=l_max
        )
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.output = output

    def forward(self, ids: Tensor):
        states = self.body.hidden(self.embedding(ids))
        logits = self.head(states[-1])
        match self.output:
            case "tuple":
                return logits, None
            case "dict":
                return {"logits": logits, "last_hidden_state": states[-1]}
            case "dataclass":
                return Output(logits, states)
            case "hidden":
                return logits, states
        return logits


def logits_of(output: object) -> Tensor:
    """The logits of any of the output structures."""
    match output:
        case Output():
            return output.logits
        case dict():
            return output["logits"]
        case tuple():
            return output[0]
    assert isinstance(output, Tensor)
    return output


@cache
def register_output() -> None:
    """Make `Output` known to pytrees, once: export needs it, and torch warns of a second time."""
    torch.export.register_dataclass(Output)
