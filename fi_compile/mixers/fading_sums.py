"""Increment of linear attention whose weights fade with the data: `Σ_{j≤t} exp(a[t] + b[j])·⟨q[t], k[j] ⊗ …⟩`.

No exponential of a or b alone is taken: running sums of gates leave the range of any number. With
`m[t] = max(m[t-1], b[t])` the state is `S[t] = exp(m[t-1] - m[t])·S[t-1] + exp(b[t] - m[t])·k[t] ⊗ …`, both factors at
most 1, and the result `exp(a[t] + m[t])·⟨q[t], S[t]⟩`. Where `a = -b` only grows less this is the recurrence
`S[t] = exp(a[t] - a[t-1])·S[t-1] + k[t] ⊗ …`. What is read has a scale of its own, in which a product counts what it
does now and later: a key not yet seen may be larger than any number. Source of the scaling: Beck et al., xLSTM
(arXiv 2405.04517), its stabilised states; of the recurrences: Yang et al., Gated Linear Attention (arXiv 2312.06635),
and Dao and Gu, Mamba-2 (arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from fi_compile.kernels.linear_attention import Contraction, contracted, final_state, outer

from .groups import Operand
from .linear_attention import Decay, LinearAttention
from .outer_sums import ROWS, fill_states


@dataclass(frozen=True)
class FadingSums:
    """The states [B, …state] after the newest positions and their scales m, side by side: [R, B, states + scales]."""

    mixer: LinearAttention

    needs = ("now", "past", "log_now", "log_past")
    reads = 1
    rows = ROWS

    @cached_property
    def queries(self) -> tuple[Operand, ...]:
        """What is read at the newest position."""
        return tuple(o for o in self.mixer.operands if o.newest)

    @cached_property
    def keys(self) -> tuple[Operand, ...]:
        """What is read at all positions so far."""
        return tuple(o for o in self.mixer.operands if not o.newest)

    @cached_property
    def scale(self) -> str:
        """The letters of m: of b, as far as the state has them."""
        fades = _letters(self.keys)
        return "".join(x for x in self.mixer.how.state if x in fades)

    @cached_property
    def how(self) -> Contraction:
        """The products with all exponentials as one factor of the newest position, and one of every key."""
        plain = [tuple(o.letters for o in of if not o.sign) for of in (self.queries, self.keys)]
        grows = "".join(dict.fromkeys(_letters(self.queries) + self.scale))
        return replace(self.mixer.how, queries=(*plain[0], grows), keys=(*plain[1], _letters(self.keys)))

    def weights(self, found: Decay, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a product counts now and later, beside the exponentials: [(1 or size) …state], exponents apart."""
        others = [i for i, x in enumerate(self.mixer.how.state) if x not in self.scale]
        weights = {}
        for name, counts in (("now", found.now), ("past", found.past)):
            most = counts.abs().amax(others, keepdim=True) if others else counts.abs()
            weights[name] = torch.where(most == 0, 0.0, counts / most).to(dtype).contiguous()
            weights["log_" + name] = most.squeeze(others).log().contiguous()
        return weights

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """States of no positions: [R, B, states + scales]; what they hold is never read."""
        how = self.mixer.how
        return weights["now"].new_zeros(self.rows, batch, how.count(how.state) + how.count(self.scale))

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, C], queries and keys; writes the new state into the ring."""
        size, how = ring.shape[0], self.how
        queries, keys = self.mixer.split(x.to(ring.dtype))
        a, b = self.exponent(self.queries, queries), self.exponent(self.keys, keys)
        state, last = self.unpacked(ring.index_select(0, (position - 1) % size)[0], position == 0)
        scale = torch.maximum(last, self.largest(b).to(last.dtype))
        before = _times(last.double(), weights["log_past"])
        now = _times(b, self.spread(weights["log_now"].unsqueeze(0), self.scale, _letters(self.keys)))
        shown = torch.maximum(before, self.largest(now))
        plain = self.plain(self.keys, keys)
        read = weights["past"] * self.faded(state, before, shown) + weights["now"] * outer(
            [*plain, self.weight(now, shown, ring.dtype)], how
        )
        grown = self.spread(a, _letters(self.queries), how.queries[-1]) + self.spread(
            shown, self.scale, how.queries[-1]
        )
        out = contracted([*self.plain(self.queries, queries), grown.exp().to(ring.dtype)], read, how)
        new = self.faded(state, last, scale) + outer([*plain, self.weight(b, scale, ring.dtype)], how)
        ring.index_copy_(0, position % size, self.packed(new, scale).unsqueeze(0))
        return out.reshape(x.shape[0], -1)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the states after x [B, C, P]: the first as one product, the newest step by step."""

        def after(first: Tensor) -> Tensor:
            _, keys = self.mixer.split(first)
            b = self.exponent(self.keys, keys)
            scale = self.largest(b).amax(-1).to(ring.dtype)
            faded = [*self.plain(self.keys, keys), self.weight(b, scale.unsqueeze(-1), ring.dtype)]
            moving = "".join(x for x in self.how.state if x in self.how.coefficients)
            return self.packed(final_state(faded, scale.new_ones(self.how.shape(moving)), self.how), scale)

        fill_states(ring, x, after, partial(self.step, weights=weights))

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return f"{5 * self.how.count(self.how.state):,} multiply-adds"

    def plain(self, operands: Sequence[Operand], values: Sequence[Tensor]) -> list[Tensor]:
        """The values that are no exponents."""
        return [v for o, v in zip(operands, values, strict=True) if not o.sign]

    def exponent(self, operands: Sequence[Operand], values: Sequence[Tensor]) -> Tensor:
        """The sum of the values that are: [B, …letters(, n)] in double precision."""
        letters, first = _letters(operands), values[0]
        shape = [first.shape[0], *[1] * len(letters), *first.shape[1 + len(operands[0].letters) :]]
        total = first.new_zeros(shape, dtype=torch.float64)
        for operand, value in zip(operands, values, strict=True):
            if operand.sign:
                total = total + self.spread(value.double(), operand.letters, letters)
        return total

    def largest(self, b: Tensor) -> Tensor:
        """The largest exponent for each entry of m: [B, …scale(, n)]."""
        letters = _letters(self.keys)
        others = [1 + i for i, x in enumerate(letters) if x not in self.scale]
        b = b.amax(others) if others else b
        return self.spread(b, "".join(x for x in letters if x in self.scale), self.scale)

    def weight(self, b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """What keys are multiplied by, for states of this scale."""
        return _share(b, self.spread(scale, self.scale, _letters(self.keys))).to(dtype)

    def faded(self, state: Tensor, scale: Tensor, into: Tensor) -> Tensor:
        """A state of one scale in another, no smaller one."""
        return state * self.spread(_share(scale, into), self.scale, self.mixer.how.state).to(state.dtype)

    def spread(self, value: Tensor, letters: str, into: str) -> Tensor:
        """[B, …letters(, n)] as [B, …into(, n)], of size 1 along the letters it lacks."""
        order = [x for x in into if x in letters]
        rest = range(1 + len(order), value.dim())
        value = value.permute(0, *(1 + letters.index(x) for x in order), *rest)
        sizes = iter(value.shape[1 : 1 + len(order)])
        shape = [next(sizes) if x in letters else 1 for x in into]
        return value.reshape(value.shape[0], *shape, *(value.shape[i] for i in rest))

    def packed(self, state: Tensor, scale: Tensor) -> Tensor:
        """A row of the ring."""
        return torch.cat([part.reshape(len(part), -1) for part in (state, scale)], 1)

    def unpacked(self, row: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """State and scale of a row of the ring, of no positions where it is ``empty``."""
        sizes = self.how.shape(self.how.state), self.how.shape(self.scale)
        state, scale = row.split([self.how.count(self.how.state), self.how.count(self.scale)], 1)
        state, scale = torch.where(empty, 0, state), torch.where(empty, -torch.inf, scale)
        return state.reshape(-1, *sizes[0]), scale.reshape(-1, *sizes[1])


def _letters(operands: Sequence[Operand]) -> str:
    """The letters of the exponents among some operands."""
    return "".join(dict.fromkeys("".join(o.letters for o in operands if o.sign)))


def _times(exponent: Tensor, log: Tensor) -> Tensor:
    """The exponent of a product, of nothing where the other factor is 0."""
    return torch.where(log.isinf(), -torch.inf, exponent + log)


def _share(exponent: Tensor, scale: Tensor) -> Tensor:
    """``exp(exponent - scale)``: nothing where all that the scale is the largest of is nothing."""
    return torch.where(scale == -torch.inf, 0.0, (exponent - scale).exp())
