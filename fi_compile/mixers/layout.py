"""Channel-major views: any value with one sequence axis as real [B, C, n] and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

STATE_TYPE = "state-type"  # among an increment's weights: an empty tensor of the type its state is kept in


@dataclass(frozen=True)
class Layout:
    """Where a value keeps its sequence axis and its batch axis, and the sizes of the others.

    ``axis`` and ``batch`` are dimensions (``batch`` None: the value has none); ``channels`` are the sizes of the
    remaining dimensions in order. A ``complex`` value has two channels for each, its real and its imaginary part.
    """

    axis: int
    batch: int | None
    channels: tuple[int, ...]
    complex: bool = field(default=False, repr=False)  # the value's dtype, which graphs show, says it

    @property
    def count(self) -> int:
        """Number of real channels C."""
        return math.prod(self.channels) * (2 if self.complex else 1)

    def flatten(self, value: Tensor) -> Tensor:
        """The value as real [B, C, n] (B = 1 where it has no batch axis)."""
        n = value.shape[self.axis]
        if self.batch is None:
            value = value.movedim(self.axis, -1).unsqueeze(0)
        else:
            value = value.movedim((self.batch, self.axis), (0, -1))
        if self.complex:
            value = torch.view_as_real(value.resolve_conj()).movedim(-1, -2)
        return value.reshape(value.shape[0], self.count, n)

    def unflatten(self, value: Tensor) -> Tensor:
        """Real [B, C, n] as a value of this layout."""
        batch, _, n = value.shape
        if self.complex:
            value = torch.view_as_complex(value.reshape(batch, -1, 2, n).transpose(2, 3).contiguous())
        if self.batch is None:
            return value.reshape(*self.channels, n).movedim(-1, self.axis)
        value = value.reshape(batch, *self.channels, n)
        return value.movedim((0, -1), (self.batch, self.axis))

    def zeros(self, batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zero value of this layout, its parts of ``dtype``."""
        return self.unflatten(torch.zeros(batch, self.count, n, dtype=dtype, device=device))

    def as_value(self, value: Tensor, like: torch.dtype) -> Tensor:
        """Real [B, C, n] as a value of this layout, in the precision of ``like``."""
        real = like.to_real()
        return self.unflatten(value).to(real.to_complex() if self.complex else real)
