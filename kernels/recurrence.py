"""One step of a modal recurrence, and the states a whole prompt leaves.

`x[t] = λ·x[t-1] + u[t]` and `z[t] = skip·u[t] + Re⟨R, x[t-1]⟩`, in real blocks of two. Source: docs/algorithms.md,
"Sums of exponentials". In all forms, of one dtype: u [B, C], states [B, C, 2, N] (real and imaginary parts), poles and
residues [2, C, N], skip [C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fi_compile.kernels.channels import chunks, take
from fi_compile.kernels.modes import powers

_SIDE = 128


def states_reference(u: Tensor, poles: Tensor) -> Tensor:
    """The definition: the state after each input of u [B, C, P]. Returns [P, B, C, 2, N]."""
    poles = torch.complex(poles[0], poles[1])
    x = u.new_zeros(*u.shape[:2], poles.shape[-1], dtype=poles.dtype)
    states = []
    for t in range(u.shape[-1]):
        x = poles * x + u[:, :, t, None]
        states.append(torch.stack([x.real, x.imag], -2))
    return torch.stack(states)


def recurrence_step(
    state: Tensor, u: Tensor, poles: Tensor, residues: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """The output [B, C] at a new position, and the state after it."""
    re, im = state[..., 0, :], state[..., 1, :]
    z = (residues[0] * re - residues[1] * im).sum(-1) + skip * u
    new = torch.stack([poles[0] * re - poles[1] * im + u.unsqueeze(-1), poles[1] * re + poles[0] * im], -2)
    return z, new


def final_state(u: Tensor, poles: Tensor, source: Tensor | None = None) -> Tensor:
    """The state after the last input of u [B, Cin, P], in the dtype of poles: Σ_i λ^(P-1-i)·u[i], by matrix products.

    Inputs are cut into rows of m from the end: the sum over a row is a product with the powers of λ, and so is
    the sum over rows.
    """
    batch, _, length = u.shape
    _, channels, modes = poles.shape
    side = min(_SIDE, max(1, length))
    rows = -(-length // side)
    out = poles.new_empty(batch, channels, 2, modes)
    for start, stop in chunks(channels, batch * rows * (side + 2 * modes)):
        part = torch.complex(poles[0, start:stop].double(), poles[1, start:stop].double())
        inner, outer = powers(part, side).flip(-1).mT, powers(part**side, rows).flip(-1).mT
        inner = torch.cat([inner.real, inner.imag], -1).to(poles.dtype)  # [c, m, 2N]
        cut = take(u, source, 1, start, stop).to(poles.dtype).transpose(0, 1)
        cut = torch.nn.functional.pad(cut, (rows * side - length, 0))
        sums = (cut.reshape(stop - start, batch * rows, side) @ inner).unflatten(1, (batch, rows))
        re, im = sums.chunk(2, -1)
        a, b = outer.real.to(poles.dtype).unsqueeze(1), outer.imag.to(poles.dtype).unsqueeze(1)
        state = torch.stack([(a * re - b * im).sum(2), (b * re + a * im).sum(2)], 2)
        out[:, start:stop] = state.transpose(0, 1)
    return out
