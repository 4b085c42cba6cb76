"""Channel-major views: any value with one sequence axis as [B, C, n] and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where a value keeps its sequence axis and its batch axis, and the sizes of the others.

    ``axis`` and ``batch`` are dimensions (``batch`` None: the value has none); ``channels`` are the sizes of the
    remaining dimensions in order.
    """

    axis: int
    batch: int | None
    channels: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of channels C."""
        return math.prod(self.channels)

    def flatten(self, value: Tensor) -> Tensor:
        """The value as [B, C, n] (B = 1 where it has no batch axis)."""
        if self.batch is None:
            return value.movedim(self.axis, -1).reshape(1, self.count, value.shape[self.axis])
        value = value.movedim((self.batch, self.axis), (0, -1))
        return value.reshape(value.shape[0], self.count, value.shape[-1])

    def unflatten(self, value: Tensor) -> Tensor:
        """[B, C, n] as a value of this layout."""
        batch, _, n = value.shape
        if self.batch is None:
            return value.reshape(*self.channels, n).movedim(-1, self.axis)
        value = value.reshape(batch, *self.channels, n)
        return value.movedim((0, -1), (self.batch, self.axis))

    def zeros(self, batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zero value of this layout."""
        count = self.count
        return self.unflatten(torch.zeros(batch, count, n, dtype=dtype, device=device))
