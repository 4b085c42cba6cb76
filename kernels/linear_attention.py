"""Linear attention as a recurrence: one step, and the states a whole prompt leaves.

`y[t] = Σ_{j≤t} d[t-j]·⟨q[t], k[j] ⊗ v[j]⟩` with `d[0] = now` and `d[l] = past·ρ^(l-1)` needs of the past only
`S[t] = ρ·S[t-1] + k[t] ⊗ v[t]`. Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236), section 3.4;
the decay of Sun et al., Retentive Network (arXiv 2307.08621), equation 6. What is multiplied with what is a
:class:`Contraction`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BATCH, _POSITION = "Y", "Z"


@dataclass(frozen=True)
class Contraction:
    """Which dimensions of the factors meet: einsum letters, without batch and position.

    ``queries`` are the factors of the newest position, ``keys`` those of every position so far, ``out`` what is left.
    ``coefficients``: the letters along which now, past and ρ differ. ``sizes``: of each letter.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    out: str
    coefficients: str
    sizes: Mapping[str, int]

    @property
    def state(self) -> str:
        """The letters of the state: of all keys, as far as queries, result or coefficients still tell them apart."""
        kept = set("".join(self.queries) + self.out + self.coefficients)
        found = "".join(self.keys) + self.coefficients
        return "".join(x for x in dict.fromkeys(found) if x in kept)

    @property
    def summed(self) -> int:
        """How many products are added up in one entry of the result, of one position."""
        letters = set("".join((*self.queries, *self.keys))) - set(self.out)
        return self.count("".join(letters))

    def shape(self, letters: str) -> tuple[int, ...]:
        """The sizes of some letters."""
        return tuple(self.sizes[x] for x in letters)

    def count(self, letters: str) -> int:
        """The product of the sizes of some letters."""
        total = 1
        for x in letters:
            total *= self.sizes[x]
        return total


def attention_reference(
    queries: Sequence[Tensor], keys: Sequence[Tensor], d: Tensor, how: Contraction
) -> Tensor:
    """The definition: queries and keys [B, …letters, n], d [lags ≥ n, …coefficients]. Returns [B, …out, n]."""
    n = queries[0].shape[-1]
    rows = []
    for t in range(n):
        lags = torch.arange(t, -1, -1, device=d.device)
        now = [q[..., t] for q in queries]
        terms = [_BATCH + x for x in how.queries] + [_BATCH + x + _POSITION for x in how.keys]
        equation = ",".join([*terms, _POSITION + how.coefficients]) + "->" + _BATCH + how.out
        rows.append(torch.einsum(equation, *now, *(k[..., : t + 1] for k in keys), d[lags]))
    return torch.stack(rows, -1)


def attention_step(
    state: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    now: Tensor,
    past: Tensor,
    decay: Tensor,
    how: Contraction,
) -> tuple[Tensor, Tensor]:
    """The output [B, …out] at a new position, and the state after it.

    ``state``: [B, …state] before it; queries and keys [B, …letters]; coefficients [(1 or size) …state],
    ``decay`` in float64: a rounding of ρ would count once a position.
    """
    made = outer(keys, how)
    return contracted(queries, past * state + now * made, how), (decay * state + made).to(state.dtype)


def outer(keys: Sequence[Tensor], how: Contraction) -> Tensor:
    """What keys [B, …letters] add to the state: their products, [B, …state] with size 1 along letters of none."""
    letters = [x for x in how.state if x in set("".join(how.keys))]
    made = _einsum([_BATCH + x for x in how.keys], _BATCH + "".join(letters), keys)
    for place, letter in enumerate(how.state, 1):
        if letter not in letters:
            made = made.unsqueeze(place)
    return made


def contracted(queries: Sequence[Tensor], state: Tensor, how: Contraction) -> Tensor:
    """What queries [B, …letters] read of a state: [B, …out]."""
    return _einsum(
        [*(_BATCH + x for x in how.queries), _BATCH + how.state], _BATCH + how.out, [*queries, state]
    )


def final_state(keys: Sequence[Tensor], decay: Tensor, how: Contraction) -> Tensor:
    """The state [B, …state] after keys [B, …letters, P] from position 0 on: Σ_j ρ^(P-1-j) ⊗ keys[j].

    One product over the positions; no value has more entries than the positions times one key's letters and the
    coefficients'.
    """
    lags = torch.arange(keys[0].shape[-1] - 1, -1, -1, device=decay.device)
    moving = "".join(x for x in how.state if x in how.coefficients)
    rho = decay.reshape(how.shape(moving)).double()
    total, letters = (rho.unsqueeze(-1) ** lags).to(keys[0].dtype), moving + _POSITION
    order = sorted(range(len(keys)), key=lambda i: how.count(how.keys[i]))
    for place, i in enumerate(order):
        key = _BATCH + how.keys[i] + _POSITION
        union = "".join(dict.fromkeys(_BATCH + letters + key))
        made = _BATCH + how.state if place == len(order) - 1 else union
        total = _einsum([letters, key], made, [total, keys[i]])
        letters = made
    return total


def _einsum(terms: Sequence[str], out: str, values: Sequence[Tensor]) -> Tensor:
    return torch.einsum(",".join(terms) + "->" + out, *values)
