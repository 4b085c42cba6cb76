"""Increment of linear attention: the decayed sum of products of keys, whatever the length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fi_compile.kernels.linear_attention import attention_step, final_state

from .linear_attention import Decay, LinearAttention

ROWS = 8  # going back by fewer positions is free


def fill_states(
    ring: Tensor,
    x: Tensor,
    after: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, Tensor, Tensor], object],
) -> None:
    """Take over the states after x [B, C, P]: the first of those that are kept is ``after(x so far)``, then steps."""
    size, length = ring.shape[0], x.shape[-1]
    ring.zero_()
    first = max(0, length - size + 1)
    if first:
        ring[(first - 1) % size] = after(x[..., :first].to(ring.dtype))
    for t in range(first, length):
        step(ring, torch.tensor([t], device=ring.device), x[:, :, t])


@dataclass(frozen=True)
class OuterSums:
    """The states [B, …state] after the newest positions; see :class:`~.kernels.linear_attention.Contraction`.

    ``kernels``: what runs a step, ``torch``, or ``triton`` where its kernel serves the contraction.
    """

    mixer: LinearAttention
    kernels: str = "torch"

    needs = ("now", "past", "decay")
    reads = 1
    rows = ROWS

    def weights(self, found: Decay, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a product counts now, one position later and, in float64, from one to the next: [(1 or size) …]."""
        parts = {"now": found.now.to(dtype), "past": found.past.to(dtype), "decay": found.decay.double()}
        return {name: part.contiguous() for name, part in parts.items()}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """States of no positions: zeros [R, B, …state]."""
        how = self.mixer.how
        return weights["now"].new_zeros(self.rows, batch, *how.shape(how.state))

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, C], queries and keys; writes the new state into the ring."""
        queries, keys = self.mixer.split(x.to(ring.dtype))
        now, past, decay = (weights[name] for name in self.needs)
        if self.kernels == "triton":
            from fi_compile.kernels import linear_attention_step as triton_form

            if triton_form.sizes(self.mixer.how):
                how = self.mixer.how
                out = triton_form.linear_attention_step(ring, position, queries, keys, now, past, decay, how)
                return out.reshape(x.shape[0], -1)
        size = ring.shape[0]
        state = ring.index_select(0, (position - 1) % size)[0]
        out, new = attention_step(state, queries, keys, now, past, decay, self.mixer.how)
        ring.index_copy_(0, position % size, new.unsqueeze(0))
        return out.reshape(x.shape[0], -1)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the states after x [B, C, P]: the first as one product, the newest step by step."""

        def after(first: Tensor) -> Tensor:
            _, keys = self.mixer.split(first)
            return final_state(keys, weights["decay"], self.mixer.how)

        fill_states(ring, x, after, partial(self.step, weights=weights))

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        how = self.mixer.how
        return f"{4 * how.count(how.state):,} multiply-adds"
