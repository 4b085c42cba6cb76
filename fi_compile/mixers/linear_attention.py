"""Recognise linear attention: a sum over earlier positions that is linear in a query and in keys.

A group is an exit of one sequence axis with everything of two sequence axes behind it: scores, masks, decays. It is read
as a function F of the values of one axis that enter it. F is linear attention if each of its rows is
``Σ_{j≤t} d(t - j)·⟨queries[t], keys[j] ⊗ …⟩``, d a geometric sequence from lag 1 on: then a state takes the place of keys
and values (`outer_sums.py`). What meets what is found by trial, whatever the spelling.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.facts import is_number
from fi_compile.kernels.linear_attention import Contraction, attention_reference
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.passes.prove_prefix import Proof
from fi_compile.program import Program, is_tensor
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit, run_unit

from .convolution import FilterGrew, layout_of, parameters_behind
from .lag_tables import FollowsPosition, LagTables, changed, scrambled
from .layout import Layout

_TOLERANCE = 1e-11  # of what the twin sums in double precision
_TINY = 1e-290  # below, double precision has few digits left
_CHUNK = 32  # lags that are compared at a time
_MOST_STATE = 1 << 22


@dataclass(frozen=True)
class Decay:
    """The weights of one version: what a product counts at its own position, one later, and from there on.

    Each broadcasts to the state: float64, size 1 along letters it does not follow.
    """

    now: Tensor
    past: Tensor
    decay: Tensor


@dataclass(frozen=True)
class Operand:
    """A value of one sequence axis that enters the group.

    ``letters``: of the channels whose size is not 1. ``newest``: read at the newest position (a query). ``factor``: the
    operator that scales the scores by it in a way not linear in it, such as a division.
    """

    node: fx.Node
    layout: Layout
    newest: bool
    letters: str = ""
    factor: fx.Node | None = None

    def canonical(self, value: Tensor) -> Tensor:
        """A value of this operand's own layout as [B, …letters, n]."""
        flat = self.layout.flatten(value)
        return flat.reshape(flat.shape[0], *(n for n in self.layout.channels if n != 1), flat.shape[-1])

    def read(self, value: Tensor) -> Tensor:
        """What the node's value stands for in the products, [B, C, n]."""
        return self.layout.flatten(value if self.factor is None else _scale(self.factor, self.node, value))


def _scale(factor: fx.Node, by: fx.Node, value: Tensor) -> Tensor:
    """What ``factor`` multiplies one score by."""
    rank = factor.meta["val"].dim()

    def argument(node: fx.Node) -> Tensor:
        return value if node is by else value.new_ones([1] * rank)

    args, kwargs = fx.map_arg((factor.args, factor.kwargs), argument)
    return factor.target(*args, **kwargs)  # type: ignore[operator]


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
    support = None
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

    def derive(self, values: Mapping[str, Tensor], length: int) -> Decay:
        """Read d(0), d(1) and d(2) / d(1) off the group, on weights in double precision."""
        group = Group(self.analysis, self.unit, values, max(3, self.analysis.lengths[0]))
        lags = _lags(group, self.operands, self.layout_out, self.how, 3)
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


class Group:
    """F at one length, on given weights: its nodes as a function of operands and tables."""

    def __init__(
        self, analysis: Consistency, unit: Unit, values: Mapping[str, Tensor] | None, length: int
    ) -> None:
        self.analysis, self.unit, self.length = analysis, unit, length
        self.program = program = analysis.program
        data = program.input_dependent
        self.nodes = tuple(n for n in unit.nodes if n in data)
        inside = set(self.nodes)
        outside = [a for n in self.nodes for a in n.all_input_nodes if is_tensor(a) and a not in inside]
        self.boundary = tuple(dict.fromkeys(outside))
        self.ones = tuple(n for n in self.boundary if len(analysis.axes[n].rows) == 1)
        self.tables = tuple(n for n in self.boundary if n not in self.ones)
        self.batch = program.batch if isinstance(program.batch, int) else 2
        self.factors: dict[fx.Node, fx.Node] = {}
        self.given = {} if values is None else self._given(values)

    def _given(self, values: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        example = self.program.example
        shape = (self.batch, self.length, *example.shape[2:])
        sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
        with torch.no_grad():
            return self.program.evaluate(sequence, values, keep=self.tables, rewrite=widen_call)

    @property
    def two_axes(self) -> tuple[fx.Node, ...]:
        """The tables of two sequence axes."""
        return tuple(t for t in self.tables if len(self.analysis.axes[t].rows) == 2)

    def run(
        self,
        operands: Sequence[Operand],
        values: Sequence[Tensor],
        tables: Mapping[fx.Node, Tensor] | None = None,
        queries: Mapping[fx.Node, int] | None = None,
    ) -> Tensor:
        """The exit's value; see :meth:`values`."""
        return self.values(operands, values, tables, queries)[self.unit.exit]

    def values(
        self,
        operands: Sequence[Operand],
        values: Sequence[Tensor],
        tables: Mapping[fx.Node, Tensor] | None = None,
        queries: Mapping[fx.Node, int] | None = None,
    ) -> dict[fx.Node, Any]:
        """All values inside. ``values`` are what the operands stand for in the products, each in its layout.

        ``queries``: the dimension of each node along which there is one row, the newest.
        """
        env: dict[fx.Node, Any] = {**self.given, **(tables or {})}
        scale: dict[fx.Node, Tensor] = {}
        for operand, value in zip(operands, values, strict=True):
            if operand.factor is None:
                env[operand.node] = value
            else:
                scale[operand.factor] = value
        with torch.no_grad():
            for node in self.nodes:
                if node in scale:
                    (scores,) = (a for a in node.all_input_nodes if a in self.nodes)
                    env[node] = env[scores] * scale[node]
                    continue
                lists = None
                if queries is not None:
                    axes = self.analysis.axes[node].rows if is_tensor(node) else ()
                    lists = {a: 1 if a == queries.get(node) else self.length for a in axes}
                run_unit(
                    self.program,
                    (node,),
                    env,
                    length=self.length,
                    batch=self.batch,
                    lists=lists,
                    rewrite=widen_call,
                )
        return env


def recognise_group(
    analysis: Consistency,
    unit: Unit,
    proof: Proof,
    is_affine: Callable[[Unit, fx.Node], bool],
) -> LinearAttention | None:
    """The linear attention a group is, as far as trials at a sampled length and the rules can say, or None.

    Requires: ``unit`` with everything of two sequence axes inside. Certified by the operators' own rules: F is affine in
    each operand, and every operator but the last makes each entry from the same entries of its arguments.
    """
    group = Group(analysis, unit, None, analysis.lengths[0])
    if not _is_plain(group, proof):
        return None
    operands = _operands(group, proof, is_affine)
    layout_out = layout_of(analysis, unit.exit)
    if operands is None or layout_out is None:
        return None
    if layout_out.batch is None and analysis.program.batch != 1:
        return None  # rows of the batch would be told apart like channels
    try:
        group = Group(analysis, unit, analysis.parameters, analysis.lengths[0])
        return _read(group, operands, layout_out, proof)
    except (RuntimeError, IndexError, ValueError, TypeError, FilterGrew):
        return None


def _is_plain(group: Group, proof: Proof) -> bool:
    """Whether what enters is certified, and only one operator mixes positions."""
    known, axes = group.analysis.consistent, group.analysis.axes
    mixing = [n for n in group.nodes if not proof.row_local(n)]
    return (
        len(group.ones) > 1
        and bool(group.two_axes)
        and all(n in known or n.op == "placeholder" for n in (*group.boundary, group.unit.exit))
        and all(is_tensor(n) and axes[n].fixed and len(axes[n].rows) in (1, 2) for n in group.nodes)
        and len(mixing) == 1
        and mixing[0] in proof.facts
    )


def _operands(
    group: Group, proof: Proof, is_affine: Callable[[Unit, fx.Node], bool]
) -> tuple[Operand, ...] | None:
    found = []
    for node in group.ones:
        factor = None
        if not is_affine(group.unit, node):
            factor = _factor(group, node, proof)
            if factor is None:
                return None
        layout = layout_of(group.analysis, node)
        if layout is not None and factor is not None:
            rank = factor.meta["val"].dim() - node.meta["val"].dim()
            batch = None if layout.batch is None else layout.batch + rank
            layout = replace(
                layout, axis=layout.axis + rank, batch=batch, channels=(1,) * rank + layout.channels
            )
        if layout is None or (
            layout.batch is None and node in group.program.input_dependent and _has_batch(group)
        ):
            return None
        found.append(Operand(node, layout, False, factor=factor))
    return tuple(found)


def _has_batch(group: Group) -> bool:
    return bool(group.analysis.axes[group.unit.exit].batch)


def _factor(group: Group, node: fx.Node, proof: Proof) -> fx.Node | None:
    """The operator that multiplies scores by a function of a value, if that is all the group does with it."""
    users = [n for n in group.nodes if node in n.all_input_nodes]
    if len(users) != 1 or users[0] is group.nodes[-1]:
        return None
    (factor,) = users
    tensors = [a for a in factor.all_input_nodes if a is not node]
    scores = [a for a in tensors if a in group.nodes]
    if len(tensors) != 1 or len(scores) != 1 or not proof.affine_in(factor, scores):
        return None
    n = group.length
    known, by = group.analysis.values[n][scores[0]], group.analysis.values[n][node]
    generator = torch.Generator().manual_seed(23)
    value, by = scrambled(known, generator), scrambled(by, generator)
    env = {scores[0]: value, node: by}
    batch = group.analysis.values[n][group.program.sequence].shape[0]
    try:
        with torch.no_grad():
            found = run_unit(group.program, (factor,), env, length=n, batch=batch, rewrite=widen_call)
        return factor if _close(found, value * _scale(factor, node, by)) else None
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def _read(
    group: Group, operands: tuple[Operand, ...], layout_out: Layout, proof: Proof
) -> LinearAttention | None:
    generator = torch.Generator().manual_seed(13)

    def noise(operand: Operand) -> Tensor:
        return _noise(group, operand, generator)

    values = [noise(o) for o in operands]
    before = group.run(operands, values)
    placed = []
    for i, operand in enumerate(operands):
        other = [*values]
        other[i] = values[i].clone()
        other[i].narrow(operand.layout.axis, 0, 1).mul_(2.0)
        moved = layout_out.flatten((group.run(operands, other) - before).abs())[..., 1:]
        placed.append(replace(operand, newest=not bool(moved.any())))
    operands = tuple(sorted(placed, key=lambda o: not o.newest))
    if all(o.newest for o in operands) or not any(o.newest for o in operands):
        return None
    operands = _with_letters(group, operands, layout_out, noise)
    if operands is None:
        return None
    operands, out, sizes = operands
    queries = tuple(o.letters for o in operands if o.newest)
    keys = tuple(o.letters for o in operands if not o.newest)
    how = Contraction(queries, keys, out, out, sizes)
    lags = _lags(group, operands, layout_out, how, 3)
    if not any(bool(lag.any()) for lag in lags):
        return None
    differing = "".join(
        letter
        for place, letter in enumerate(out)
        if any(not _close(lag, lag.narrow(place, 0, 1).expand_as(lag)) for lag in lags)
    )
    how = replace(how, coefficients=differing)
    if how.count(how.state) > _MOST_STATE:
        return None
    behind = parameters_behind(group.program, group.tables)
    found = LinearAttention(group.program, group.analysis, group.unit, operands, layout_out, how, behind)
    return (
        found if _entries_agree(group, found, noise, proof) and _samples_agree(group, found, noise) else None
    )


def _with_letters(
    group: Group, operands: tuple[Operand, ...], layout_out: Layout, noise: Callable[..., Tensor]
) -> tuple[tuple[Operand, ...], str, dict[str, int]] | None:
    """Name the dimensions: those of which an index meets only itself share a letter."""
    values = [noise(o) for o in operands]
    places = [(i, d) for i, o in enumerate(operands) for d, n in enumerate(o.layout.channels) if n != 1]
    sizes = {(i, d): operands[i].layout.channels[d] for i, d in places}
    group_of = {place: {place} for place in places}

    def only(chosen: Mapping[tuple[int, int], int]) -> Tensor:
        masked = [*values]
        for (i, d), index in chosen.items():
            layout = operands[i].layout
            special = [a for a in (layout.axis, layout.batch) if a is not None]
            dims = [a for a in range(len(layout.channels) + len(special)) if a not in special]
            mask = torch.zeros(layout.channels[d], dtype=torch.float64, device=values[i].device)
            mask[index] = 1
            shape = [-1 if a == dims[d] else 1 for a in range(len(layout.channels) + len(special))]
            masked[i] = masked[i] * mask.view(shape)
        flat = layout_out.flatten(group.run(operands, masked))
        return flat.unflatten(1, layout_out.channels or (1,))

    def join(a: Any, b: Any) -> None:
        merged = group_of[a] | group_of[b]
        for place in merged:
            group_of[place] = merged

    for a, b in itertools.combinations(places, 2):
        if a[0] != b[0] and sizes[a] == sizes[b] and not bool(only({a: 0, b: 1}).any()):
            join(a, b)
    names = iter(string.ascii_lowercase)
    letter: dict[frozenset, str] = {}
    for place in places:
        key = frozenset(group_of[place])
        if key not in letter:
            letter[key] = next(names)
    named = {place: letter[frozenset(group_of[place])] for place in places}
    lettered = tuple(
        replace(o, letters="".join(named[i, d] for d, n in enumerate(o.layout.channels) if n != 1))
        for i, o in enumerate(operands)
    )
    if any(len(set(o.letters)) < len(o.letters) for o in lettered):
        return None
    out = ""
    for d, n in enumerate(layout_out.channels):
        if n == 1:
            continue
        meets = (p for p in places if sizes[p] == n and named[p] not in out and _follows(only({p: 0}), d))
        place = next(meets, None)
        if place is None:
            return None
        out += named[place]
    return lettered, out, {named[p]: sizes[p] for p in places}


def _follows(value: Tensor, dim: int) -> bool:
    """Whether all but the first index of a channel dimension [B, …, n] are zero."""
    return not bool(value.narrow(dim + 1, 1, value.shape[dim + 1] - 1).any())


def _lags(
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


def _entries_agree(group: Group, found: LinearAttention, noise: Callable[..., Tensor], proof: Proof) -> bool:
    """Whether the group is one product an entry, for any tables: R[t, j]·⟨queries[t], keys[j] ⊗ …⟩.

    With random numbers for the tables of two axes, R is read off key by key; then random operands are compared.
    """
    generator = torch.Generator().manual_seed(17)
    tables = _scrambled(group, proof, generator)
    operands, how, n = found.operands, found.how, group.length
    columns = []
    for j in range(n):
        values = []
        for operand in operands:
            value = torch.ones_like(noise(operand))
            if not operand.newest:
                one = value.narrow(operand.layout.axis, j, 1).clone()
                value.zero_().narrow(operand.layout.axis, j, 1).copy_(one)
            values.append(value)
        column = found.layout_out.flatten(group.run(operands, values, tables))[0] / how.summed
        columns.append(column.reshape(*how.shape(how.out), n))
    entries = torch.stack(columns, -1)  # [out…, t, j]
    values = [noise(o) for o in operands]
    actual = found.layout_out.flatten(group.run(operands, values, tables))
    queries, keys = _canonical(operands, values)
    terms = ["Y" + x + "T" for x in how.queries] + ["Y" + x + "Z" for x in how.keys] + [how.out + "TZ"]
    expected = torch.einsum(",".join(terms) + "->Y" + how.out + "T", *queries, *keys, entries)
    return _close(actual, expected.reshape(actual.shape))


def _uniform(group: Group, proof: Proof) -> dict[fx.Node, Tensor]:
    """The tables of two axes that are certified to be one number, as that number."""
    fills = {t: proof.facts[t].fill for t in group.two_axes if t in proof.facts}
    return {
        t: torch.full(
            [1] * t.meta["val"].dim(), fill, dtype=widen(t.meta["val"].dtype), device=t.meta["val"].device
        )
        for t, fill in fills.items()
        if is_number(fill)
    }


def _scrambled(group: Group, proof: Proof, generator: torch.Generator) -> dict[fx.Node, Tensor]:
    """Random numbers for the other tables of two axes."""
    uniform = _uniform(group, proof)
    return {t: scrambled(group.given[t], generator) for t in group.two_axes if t not in uniform}


def _canonical(operands: Sequence[Operand], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys as [B, …letters, n], all of one batch."""
    shaped = [o.canonical(v) for o, v in zip(operands, values, strict=True)]
    batch = max(v.shape[0] for v in shaped)
    shaped = [v.expand(batch, *v.shape[1:]) for v in shaped]
    return (
        [v for o, v in zip(operands, shaped, strict=True) if o.newest],
        [v for o, v in zip(operands, shaped, strict=True) if not o.newest],
    )


def _curve(found: LinearAttention, weights: Decay, lags: Tensor) -> Tensor:
    """d at some lags: [lags, …coefficients] in the order of ``how.coefficients``."""
    how = found.how
    lag = lags.double().view(-1, *[1] * len(how.state))
    powers = weights.decay.unsqueeze(0) ** (lag - 1).clamp_min(0)
    d = torch.where(lag == 0, weights.now.unsqueeze(0), weights.past.unsqueeze(0) * powers)
    kept = [x for x in how.state if x in how.coefficients]
    d = d.reshape(len(lags), *how.shape("".join(kept)))
    return d.permute(0, *(1 + kept.index(x) for x in how.coefficients))


def _samples_agree(group: Group, found: LinearAttention, noise: Callable[..., Tensor]) -> bool:
    weights = found.derive(group.analysis.parameters, group.length)
    values = [noise(o) for o in found.operands]
    queries, keys = _canonical(found.operands, values)
    d = _curve(found, weights, torch.arange(group.length, device=queries[0].device))
    expected = attention_reference(queries, keys, d, found.how)
    actual = found.layout_out.flatten(group.run(found.operands, values))
    return _close(actual, expected.reshape(actual.shape))


def _row_agrees(found: LinearAttention, lag_tables: LagTables) -> bool:
    analysis, unit, how = found.analysis, found.unit, found.how
    weights = found.derive(lag_tables.values, lag_tables.capacity)
    trial = Group(analysis, unit, analysis.parameters, analysis.lengths[0])
    queries_at = _query_axes(trial, found, lag_tables.proof)
    fixed = _uniform(trial, lag_tables.proof)
    tables = {t: lag_tables.row(t, queries_at[t]) for t in trial.two_axes if t not in fixed}
    fixed |= {t: lag_tables.constant(t) for t in trial.tables if t not in trial.two_axes}
    generator = torch.Generator().manual_seed(19)
    capacity = lag_tables.capacity
    rounding = max(_TOLERANCE, 64 * torch.finfo(torch.float64).eps * capacity)
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
            values.append(operand.layout.unflatten(flat.to(found.program.example.device)))
        actual = found.layout_out.flatten(group.run(found.operands, values, {**fixed, **part}, queries_at))
        queries, keys = _canonical(found.operands, values)
        lags = torch.arange(capacity - 1 - start, capacity - 1 - stop, -1, device=actual.device)
        d = _curve(found, weights, lags)
        terms = ["Y" + x for x in how.queries] + ["Y" + x + "Z" for x in how.keys] + ["Z" + how.coefficients]
        factors = [*(q[..., 0] for q in queries), *keys, d]
        expected = torch.einsum(",".join(terms) + "->Y" + how.out, *factors)
        scale = torch.einsum(",".join(terms) + "->Y" + how.out, *(f.abs() for f in factors))
        error = (actual - expected.reshape(actual.shape)).abs()
        if not bool((error <= rounding * scale.reshape(actual.shape) + _TINY).all()):
            return False
    return True


def _query_axes(group: Group, found: LinearAttention, proof: Proof) -> dict[fx.Node, int]:
    """Of every value inside, the dimension that runs along the queries; -1 where none does.

    One row of the queries, or of the keys, is replaced: a value moves in that row only, of the one or the other dimension.
    A table's row moves the same row of the exit if it is a query's. Raises :class:`FollowsPosition` where that is not so.
    """
    generator = torch.Generator().manual_seed(29)
    tables = _scrambled(group, proof, generator)
    values = [_noise(group, o, generator) for o in found.operands]
    row = group.length // 2
    axes = {n: group.analysis.axes[n].rows for n in (*group.nodes, *tables)}
    (time,) = axes[group.unit.exit]
    before = group.values(found.operands, values, tables)

    def moved(node: fx.Node, after: Tensor) -> int | None:
        where = (after != before[node]).nonzero()
        along = [a for a in axes[node] if where.numel() and bool((where[:, a] == row).all())]
        return along[0] if len(along) == 1 else None

    result: dict[fx.Node, int] = {}
    for newest in (True, False):
        other = [
            changed(v, o.layout.axis, row) if o.newest == newest else v
            for o, v in zip(found.operands, values, strict=True)
        ]
        after = group.values(found.operands, other, tables)
        for node in group.nodes:
            axis = moved(node, after[node])
            if axis is not None:
                others = (a for a in axes[node] if a != axis)
                result.setdefault(node, axis if newest else next(others, -1))
    for table, value in tables.items():
        for axis in axes[table]:
            trial = {**tables, table: changed(value, axis, row)}
            if moved(group.unit.exit, group.run(found.operands, values, trial)) == time:
                result[table] = axis
    if not all(n in result for n in (*group.nodes, *tables)):
        raise FollowsPosition(group.unit.exit.name)
    return result


def _noise(group: Group, operand: Operand, generator: torch.Generator, n: int | None = None) -> Tensor:
    """Random values of an operand, from 0.5 to 1.5: nothing cancels."""
    batch = group.batch if operand.layout.batch is not None else 1
    shape = (batch, operand.layout.count, group.length if n is None else n)
    flat = 0.5 + torch.rand(shape, dtype=torch.float64, generator=generator)
    return operand.layout.unflatten(flat.to(group.program.example.device))


def _close(found: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    if not found.numel():
        return True
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
