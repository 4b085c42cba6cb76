"""Recognise linear attention in any spelling: a group is tried on a short sequence, then held to the rules.

A group is an exit of one sequence axis with everything of two sequence axes behind it: scores, masks, decays. What
meets what is found by trial. That the trial stands for all lengths follows from the operators' own rules, and from
:meth:`LinearAttention.holds`.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.kernels.linear_attention import Contraction, attention_reference
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import is_tensor
from fi_compile.proof import Proof
from fi_compile.twin import widen_call
from fi_compile.units import Unit, run_unit

from .convolution import FilterGrew, layout_of, parameters_behind
from .exponents import exponent_sign
from .groups import Group, Operand, canonical, close, noise_of, random_tables, score_scale
from .lag_tables import scrambled
from .layout import Layout
from .linear_attention import LinearAttention, curve, first_lags

_MOST_STATE = 1 << 22


def recognise_group(
    analysis: Consistency,
    unit: Unit,
    proof: Proof,
    is_affine: Callable[[Unit, fx.Node], bool],
) -> LinearAttention | None:
    """The linear attention a group is, as far as trials at a sampled length and the rules can say, or None.

    Requires: ``unit`` with everything of two sequence axes inside. Certified by the operators' own rules: it is affine
    in each operand, and every operator but one makes each entry from the same entries of its arguments.
    """
    group = Group(analysis, unit, None, analysis.lengths[0])
    if not _is_plain(group, proof):
        return None
    operands = _operands(group, proof, is_affine)
    return None if operands is None else read_group(analysis, unit, operands, proof)


def read_group(
    analysis: Consistency, unit: Unit, operands: tuple[Operand, ...], proof: Proof
) -> LinearAttention | None:
    """The linear attention that a unit is of these operands at the shortest sampled length, or None."""
    layout_out = layout_of(analysis, unit.exit)
    if layout_out is None or (layout_out.batch is None and analysis.program.batch != 1):
        return None  # rows of the batch would be told apart like channels
    try:
        group = Group(analysis, unit, analysis.parameters, analysis.lengths[0], [o.node for o in operands])
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
        factor, sign = None, 0
        if not is_affine(group.unit, node):
            factor = _factor(group, node, proof)
            sign = 0 if factor is not None else exponent_sign(group, node, proof)
            if factor is None and not sign:
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
        found.append(Operand(node, layout, False, factor=factor, sign=sign))
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
        return factor if close(found, value * score_scale(factor, node, by)) else None
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def _read(
    group: Group, operands: tuple[Operand, ...], layout_out: Layout, proof: Proof
) -> LinearAttention | None:
    generator = torch.Generator().manual_seed(13)

    def noise(operand: Operand) -> Tensor:
        return noise_of(group, operand, generator)

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
    named = _with_letters(group, operands, layout_out, noise)
    if named is None:
        return None
    operands, out, sizes = named
    queries = tuple(o.letters for o in operands if o.newest)
    keys = tuple(o.letters for o in operands if not o.newest)
    how = Contraction(queries, keys, out, out, sizes)
    lags = first_lags(group, operands, layout_out, how, 3)
    if not any(bool(lag.any()) for lag in lags):
        return None
    differing = "".join(
        letter
        for place, letter in enumerate(out)
        if any(not close(lag, lag.narrow(place, 0, 1).expand_as(lag)) for lag in lags)
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


def _entries_agree(group: Group, found: LinearAttention, noise: Callable[..., Tensor], proof: Proof) -> bool:
    """Whether the group is one product an entry, for any tables: R[t, j]·⟨queries[t], keys[j] ⊗ …⟩.

    With random numbers for the tables of two axes, R is read off key by key; then random operands are compared.
    """
    generator = torch.Generator().manual_seed(17)
    tables = random_tables(group, proof, generator)
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
    queries, keys = canonical(operands, values)
    terms = ["Y" + x + "T" for x in how.queries] + ["Y" + x + "Z" for x in how.keys] + [how.out + "TZ"]
    expected = torch.einsum(",".join(terms) + "->Y" + how.out + "T", *queries, *keys, entries)
    return close(actual, expected.reshape(actual.shape))


def _samples_agree(group: Group, found: LinearAttention, noise: Callable[..., Tensor]) -> bool:
    weights = found.derive(group.analysis.parameters, group.length)
    values = [noise(o) for o in found.operands]
    queries, keys = canonical(found.operands, values)
    d = curve(found, weights, torch.arange(group.length, device=queries[0].device))
    expected = attention_reference(queries, keys, d, found.how)
    actual = found.layout_out.flatten(group.run(found.operands, values))
    return close(actual, expected.reshape(actual.shape))
