"""The increments that keep a ring of newest rows, by the name of their lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .chunked_attention import ChunkedAttention
from .convolution import Convolution
from .fading_sums import FadingSums
from .folds import Fold, RunningFold
from .linear_attention import LinearAttention
from .outer_sums import OuterSums
from .products import Product
from .recurrence import Recurrence
from .registered import Registered, RegisteredStep
from .relaxed import RelaxedProduct
from .sliding_attention import KeyRing, SlidingAttention
from .whole_numbers import WholeNumbers, WholeWindow
from .window import Scan, ShortConv

Mixer = Convolution | LinearAttention | SlidingAttention | Fold | Product | Registered | WholeNumbers


class Increment(Protocol):
    """What a step does for one mixer. Its state is one ring [R, B, …]: row ``p mod R`` belongs to position p.

    ``source``, int64 [P], the input channel of each pair of an output and an input channel, is among the weights
    where it is not the pair's own number; there are P / Cout pairs for each output channel in turn.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of its weights, without ``source``."""
        ...

    @property
    def reads(self) -> int:
        """How many earlier rows a step reads."""
        ...

    @property
    def rows(self) -> int:
        """R: what exceeds ``reads`` is how far back a rewind costs nothing."""
        ...

    def weights(self, found: Any, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a step reads of what the mixer derived, a filter or a decay, by the names in ``needs``."""
        ...

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The state of no positions: zeros."""
        ...

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, Cin] at ``position`` (int64 [1]); writes a row of the ring."""
        ...

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over what is kept of the inputs x [B, Cin, P] of positions 0 … P-1."""
        ...

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step, as a formula in the channels C."""
        ...


INCREMENTS: dict[str, Callable[[Convolution], Increment]] = {
    "window": lambda mixer: ShortConv(
        mixer.layout_in.count,
        len(mixer.at or range(mixer.support)),
        mixer.fan_in,
        at=mixer.at,
        moves=not mixer.depends_on,
    ),
    "running_sum": lambda mixer: Scan(mixer.layout_in.count, mixer.fan_in),
    "recurrence": lambda mixer: Recurrence(len(mixer.source), mixer.fan_in),
}


def _sums(mixer: LinearAttention) -> Increment:
    return FadingSums(mixer) if mixer.fades else OuterSums(mixer)


_OF_CLASS: dict[type, Callable[[Any], Increment]] = {
    LinearAttention: _sums,
    ChunkedAttention: OuterSums,
    SlidingAttention: KeyRing,
    Fold: RunningFold,
    Registered: RegisteredStep,
    WholeNumbers: WholeWindow,
}


def increment_of(mixer: Mixer, capacity: int) -> Increment | None:
    """The increment of a mixer for so many positions; None for what the stack of long convolutions serves."""
    if isinstance(mixer, Product):
        return RelaxedProduct(mixer.layout_out.count, capacity)
    own = _OF_CLASS.get(type(mixer))
    if own is not None:
        return own(mixer)
    assert isinstance(mixer, Convolution)
    make = INCREMENTS.get(mixer.lowering)
    return None if make is None else make(mixer)


def on_kernels(increment: Increment, kernels: str) -> Increment:
    """The increment with its step by ``kernels``, where it has one: ``torch`` or ``triton``."""
    return replace(increment, kernels=kernels) if isinstance(increment, (ShortConv, OuterSums)) else increment


def weights_of(increment: Increment, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of mixer ``name`` among tensors named ``weight:mixer``."""
    keys = (*increment.needs, "source")
    return {key: tensors[f"{key}:{name}"] for key in keys if f"{key}:{name}" in tensors}
