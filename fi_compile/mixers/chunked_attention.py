"""Linear attention written in chunks, or in any other way that no value over pairs of positions shows.

Within a chunk there are scores, across chunks states; between what enters and the exit no value needs to be a sequence.
What it computes is the same: `Σ_{j≤t} d(t - j)·⟨queries[t], keys[j] ⊗ …⟩`. Trials on a short sequence propose
what meets what. Certified by the operators' own rules: the exit is prefix-consistent and affine in each operand. A
polynomial that is affine in each of many numbers and vanishes on random ones is zero, so random operands over the whole
capacity say whether it is the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, fx

from fi_compile.kernels.linear_attention import Contraction, attention_step
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.proof import Proof
from fi_compile.units import Unit

from .convolution import FilterGrew, layout_of
from .groups import TOLERANCE, Group, Operand, canonical
from .linear_attention import Decay, LinearAttention
from .recognise_groups import read_group, recognise_group

_FEWEST_KEYS, _MOST_KEYS = 32, 4096  # positions whose keys are compared at a time
_LEAST_SHARE = 1e-3  # of the nearest weight that the furthest of one comparison may be
_MOST_ROWS = 1 << 21  # over which comparisons are run, all of them together
_TINY = 1e-290


class ChunkedAttention(LinearAttention):
    """A unit that is linear attention by what it computes, however it is written."""

    verdict = "proved causal and linear in each operand; equals its recurrence over the whole capacity"

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether the unit equals its recurrence on weights in double precision, at every position up to a capacity.

        On random operands; the first of the keys is there at a few positions at a time, so that none hides behind
        nearer ones. The others are there always: what meets them at another position is in no recurrence, and shows.
        """
        if not proof.proved(self.unit.exit):
            return False
        length = self.program.lengths.at_least(capacity)
        try:
            group = self.group(values, capacity if length is None else length)
            return _agrees(self, group, self.derive(values, capacity))
        except (RuntimeError, IndexError, ValueError, TypeError, FilterGrew):
            return False


IsAffine = Callable[[Unit, fx.Node], bool]


def recognise_linear(
    analysis: Consistency, unit: Unit, proof: Proof, is_affine: IsAffine
) -> LinearAttention | None:
    """The linear attention a unit is, as far as trials at a sampled length and the rules can say, or None."""
    if any(len(analysis.axes[node].rows) > 1 for node in unit.reads):
        return recognise_group(analysis, unit, proof, is_affine)
    return _recognise_chunked(analysis, unit, proof, is_affine)


def _recognise_chunked(
    analysis: Consistency, unit: Unit, proof: Proof, is_affine: IsAffine
) -> ChunkedAttention | None:
    data = analysis.program.input_dependent
    entering = [node for node in unit.reads if node in data]
    if len(entering) < 2 or len(unit.nodes) < 2 or not proof.proved(unit.exit):
        return None
    has_batch, operands = bool(analysis.axes[unit.exit].batch), []
    for node in entering:
        layout = layout_of(analysis, node)
        if layout is None or (layout.batch is None and has_batch) or not is_affine(unit, node):
            return None
        operands.append(Operand(node, layout, False))
    found = read_group(analysis, unit, tuple(operands), proof)
    if found is None:
        return None
    return ChunkedAttention(**{f.name: getattr(found, f.name) for f in fields(found)})


def _agrees(found: LinearAttention, group: Group, weights: Decay) -> bool:
    length, generator = group.length, torch.Generator().manual_seed(37)
    width = _width(weights)
    if length * -(-length // width) > _MOST_ROWS:
        return False
    rounding = max(TOLERANCE, 64 * torch.finfo(torch.float64).eps * length)
    size = Decay(weights.now.abs(), weights.past.abs(), weights.decay.abs())
    some = next(o for o in found.operands if not o.newest)
    for start in range(0, length, width):
        stop = min(start + width, length)
        values = []
        for operand in found.operands:
            batch = group.batch if operand.layout.batch is not None else 1
            flat = torch.randn(batch, operand.layout.count, length, dtype=torch.float64, generator=generator)
            if operand is some:
                flat[..., :start], flat[..., stop:] = 0, 0
            values.append(operand.layout.unflatten(flat.to(group.program.example.device)))
        actual = found.layout_out.flatten(group.run(found.operands, values))
        queries, keys = canonical(found.operands, values)
        expected = _recurrence(queries, keys, start, stop, weights, found.how)
        scale = _recurrence([q.abs() for q in queries], [k.abs() for k in keys], start, stop, size, found.how)
        error = (actual - expected.reshape(actual.shape)).abs()
        if not bool((error <= rounding * scale.reshape(actual.shape) + _TINY).all()):
            return False
    return True


def _width(weights: Decay) -> int:
    """How many keys are compared at a time: so many that the nearest hides none of them."""
    change = weights.decay.abs().clamp_min(_TINY).log().abs().max()
    return min(max(int(-math.log(_LEAST_SHARE) / max(float(change), _TINY)), _FEWEST_KEYS), _MOST_KEYS)


def _recurrence(
    queries: Sequence[Tensor], keys: Sequence[Tensor], start: int, stop: int, weights: Decay, how: Contraction
) -> Tensor:
    """The outputs [B, …out, n] of queries and keys [B, …letters, n] where keys are only at start … stop-1."""
    now, past, decay = weights.now, weights.past, weights.decay
    batch, length = queries[0].shape[0], queries[0].shape[-1]
    out = queries[0].new_zeros(batch, *how.shape(how.out), length)
    state = queries[0].new_zeros(batch, *how.shape(how.state))
    for t in range(start, stop):
        out[..., t], state = attention_step(
            state, [q[..., t] for q in queries], [k[..., t] for k in keys], now, past, decay, how
        )
    if stop == length:
        return out
    moving = "".join(x for x in how.state if x in how.coefficients)
    faded = decay.reshape(how.shape(moving)).unsqueeze(-1) ** torch.arange(length - stop, device=decay.device)
    terms = [*("Y" + x + "Z" for x in how.queries), moving + "Z", "Y" + how.state]
    out[..., stop:] = torch.einsum(
        ",".join(terms) + "->Y" + how.out + "Z", *(q[..., stop:] for q in queries), faded, past * state
    )
    return out
