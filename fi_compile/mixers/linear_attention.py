"""Linear attention: a sum over earlier positions that is linear in a query and in keys, and its weights by lag.

Each row is ``Σ_{j≤t} d(t - j)·⟨queries[t], keys[j] ⊗ …⟩``, d a geometric sequence from lag 1 on: a state takes the
place of keys and values (`outer_sums.py`). Where queries or keys are exponentials, ``exp(a[t] + b[j])`` as decays from
data have them, d is constant from lag 1 on, and the state is kept in their scale (`fading_sums.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fi_compile.kernels.linear_attention import Contraction
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import Program
from fi_compile.proof import Proof
from fi_compile.units import Unit

from .convolution import FilterGrew
from .groups import TOLERANCE, Group, Operand, canonical, query_axes, uniform_tables
from .lag_tables import FollowsPosition, LagTables
from .layout import Layout

_TINY = 1e-290  # below, double precision has few digits left
_CHUNK = 32  # lags that are compared at a time


@dataclass(frozen=True)
class Decay:
    """The weights of one version: what a product counts at its own position, one later, and from there on.

    Each broadcasts to the state: float64, size 1 along letters it does not follow.
    """

    now: Tensor
    past: Tensor
    decay: Tensor


@dataclass(frozen=True)
class LinearAttention:
    """A unit that is linear attention, with what its step reads.

    ``operands``: queries first, then keys, as in ``how``.
    """

    program: Program = field(repr=False)
    analysis: Consistency = field(repr=False)
    unit: Unit = field(repr=False)
    operands: tuple[Operand, ...]
    layout_out: Layout
    how: Contraction
    depends_on: tuple[str, ...]

    kind = "linear_attention"
    lowering = "recurrence"
    verdict = "proved linear, its weights a function of the lag; equals its recurrence at all lags"
    support = None
    source = None
    reference = None

    @property
    def name(self) -> str:
        """The name of the node whose value this makes."""
        return self.unit.exit.name

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What it reads of every position."""
        return tuple(o.node for o in self.operands)

    @property
    def fades(self) -> bool:
        """Whether operands enter as exponents: these alone make weights fade, or the recurrence does not hold."""
        return any(o.sign for o in self.operands)

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each operand has."""
        return tuple(o.layout.count for o in self.operands)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """Whole values of the inputs, side by side: [B, C, n]."""
        flat = [o.read(v) for o, v in zip(self.operands, values, strict=True)]
        batch = max(f.shape[0] for f in flat)
        dtype = flat[0].dtype
        for f in flat[1:]:
            dtype = torch.promote_types(dtype, f.dtype)
        return torch.cat([f.to(dtype).expand(batch, -1, -1) for f in flat], 1)

    def split(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys [B, …letters(, n)] of what ``flatten`` gave."""
        parts = x.split(self.channels, 1)
        letters = (*self.how.queries, *self.how.keys)
        shaped = [
            p.reshape(p.shape[0], *self.how.shape(names), *p.shape[2:])
            for p, names in zip(parts, letters, strict=True)
        ]
        return shaped[: len(self.how.queries)], shaped[len(self.how.queries) :]

    def group(self, values: Mapping[str, Tensor], length: int) -> Group:
        """The unit as a function of its operands, on given weights."""
        return Group(self.analysis, self.unit, values, length, self.inputs)

    def derive(self, values: Mapping[str, Tensor], length: int) -> Decay:
        """Read d(0), d(1) and d(2) / d(1) off the group, on weights in double precision."""
        group = self.group(values, max(3, self.analysis.lengths[0]))
        lags = first_lags(group, self.operands, self.layout_out, self.how, 3)
        state = self.how.state
        parts = []
        for lag in lags:
            for place, letter in enumerate(self.how.out):
                if letter not in self.how.coefficients:
                    lag = lag.narrow(place, 0, 1)
            kept = [x for x in self.how.out if x in self.how.coefficients]
            lag = lag.reshape(self.how.shape("".join(kept)))
            order = [kept.index(x) for x in state if x in kept]
            parts.append(lag.permute(order).reshape([self.how.sizes[x] if x in kept else 1 for x in state]))
        now, past, second = parts
        decay = torch.where(past == 0, 0.0, second / torch.where(past == 0, 1.0, past))
        if self.fades:
            decay = torch.ones_like(decay)
        found = Decay(now, past, decay)
        if not all(bool(torch.isfinite(part).all()) for part in (now, past, decay)):
            raise FilterGrew(self.name)
        return found

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether the group equals its recurrence on weights in double precision, at every position up to a capacity.

        The tables inside depend on the lag alone: by rule, or by value. So the newest row stands for all. It is
        compared on random queries and keys, a few lags at a time, so that no lag hides behind nearer ones.
        """
        try:
            return _row_agrees(self, LagTables(self.analysis, proof, values, capacity))
        except (RuntimeError, IndexError, ValueError, TypeError, FollowsPosition, FilterGrew):
            return False


def first_lags(
    group: Group, operands: Sequence[Operand], layout_out: Layout, how: Contraction, count: int
) -> list[Tensor]:
    """d(0) … d(count-1), each [sizes of out]: what one key at position 0 gives to later queries."""
    values = []
    for operand in operands:
        shown = torch.zeros if not operand.newest else torch.ones
        batch = group.batch if operand.layout.batch is not None else 1
        flat = shown(batch, operand.layout.count, group.length, dtype=torch.float64)
        flat[..., 0] = 1
        values.append(operand.layout.unflatten(flat.to(group.program.example.device)))
    found = layout_out.flatten(group.run(operands, values))[0] / how.summed
    return [found[:, lag].reshape(how.shape(how.out)) for lag in range(count)]


def curve(found: LinearAttention, weights: Decay, lags: Tensor) -> Tensor:
    """d at some lags: [lags, …coefficients] in the order of ``how.coefficients``."""
    how = found.how
    lag = lags.double().view(-1, *[1] * len(how.state))
    powers = weights.decay.unsqueeze(0) ** (lag - 1).clamp_min(0)
    d = torch.where(lag == 0, weights.now.unsqueeze(0), weights.past.unsqueeze(0) * powers)
    kept = [x for x in how.state if x in how.coefficients]
    d = d.reshape(len(lags), *how.shape("".join(kept)))
    return d.permute(0, *(1 + kept.index(x) for x in how.coefficients))


def _row_agrees(found: LinearAttention, lag_tables: LagTables) -> bool:
    analysis, unit, how = found.analysis, found.unit, found.how
    weights = found.derive(lag_tables.values, lag_tables.capacity)
    trial = Group(analysis, unit, analysis.parameters, analysis.lengths[0])
    queries_at = query_axes(trial, found.operands, lag_tables.proof)
    fixed = uniform_tables(trial, lag_tables.proof)
    tables = {t: lag_tables.row(t, queries_at[t]) for t in trial.two_axes if t not in fixed}
    fixed |= {t: lag_tables.constant(t) for t in trial.tables if t not in trial.two_axes}
    generator = torch.Generator().manual_seed(19)
    capacity = lag_tables.capacity
    rounding = max(TOLERANCE, 64 * torch.finfo(torch.float64).eps * capacity)
    for start in range(0, capacity, _CHUNK):
        stop = min(start + _CHUNK, capacity)
        group = Group(analysis, unit, None, stop - start)
        group.batch = lag_tables.batch
        part = {
            t: v.narrow(next(a for a in analysis.axes[t].rows if a != queries_at[t]), start, stop - start)
            for t, v in tables.items()
        }
        values = []
        for operand in found.operands:
            batch = lag_tables.batch if operand.layout.batch is not None else 1
            n = 1 if operand.newest else stop - start
            flat = torch.randn(batch, operand.layout.count, n, dtype=torch.float64, generator=generator)
            flat = flat.abs() if operand.sign else flat
            values.append(operand.layout.unflatten(flat.to(found.program.example.device)))
        actual = found.layout_out.flatten(group.run(found.operands, values, {**fixed, **part}, queries_at))
        queries, keys = canonical(found.operands, values)
        lags = torch.arange(capacity - 1 - start, capacity - 1 - stop, -1, device=actual.device)
        d = curve(found, weights, lags)
        terms = ["Y" + x for x in how.queries] + ["Y" + x + "Z" for x in how.keys] + ["Z" + how.coefficients]
        factors = [*(q[..., 0] for q in queries), *keys, d]
        expected = torch.einsum(",".join(terms) + "->Y" + how.out, *factors)
        scale = torch.einsum(",".join(terms) + "->Y" + how.out, *(f.abs() for f in factors))
        error = (actual - expected.reshape(actual.shape)).abs()
        if not bool((error <= rounding * scale.reshape(actual.shape) + _TINY).all()):
            return False
    return True
