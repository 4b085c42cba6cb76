"""Reading rows of tables by index: constants by any index, sequences by certified index arithmetic only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fi_compile.facts import (
    JUNK,
    Affine,
    Axis,
    Deny,
    Dim,
    Fact,
    Triangle,
    constant,
    cut,
    fixed,
    flipped,
    is_number,
    least,
    same,
    tidy,
)

from . import affine as index
from .call import Call, mixed, one, rule
from .pointwise import unite_dims, value_bounds
from .slices import window


@rule("embedding")
def embedding(c: Call) -> Fact:
    """weight[indices]."""
    return looked_up(c, c.fact("weight"), 0, c.fact("indices"))


@rule("index_select")
def index_select(c: Call) -> Fact:
    """x.index_select(dim, index)."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim"), len(fact.dims))
    c.note_linear([c.arg("self")], invariant=False)
    return looked_up(c, fact, dim, c.fact("index"))


def looked_up(c: Call, table: Fact, dim: int, where: Fact) -> Fact:
    """``table`` with dimension ``dim`` replaced by the dimensions of the index tensor."""
    if isinstance(where.fill, int) and len(where.dims) == 1 and same(one(where.dims[0]).size, 1):
        return _single(c, table, dim, where.fill)
    c.row_local = all(a.fixed for a in table.axes)
    before, after = table.dims[:dim], table.dims[dim + 1 :]
    dims, triangles = indexed(c, table, dim, where)
    moved = tuple(replace(t, query=t.query + dim, key=t.key + dim) for t in triangles)
    return Fact((*before, *dims, *after), triangles=moved)


def _single(c: Call, table: Fact, dim: int, place: int) -> Fact:
    """``x[..., [-1], ...]``: one entry, by a number, its dimension kept."""
    size = one(table.dims[dim]).size
    start = place if place >= 0 else tidy(np.add(size, place))
    if not (np.all(np.asarray(start) >= 0) and np.all(np.less(start, size))):
        raise Deny("wraps", f"entry {place} of a dimension that is shorter at some lengths")
    result = window(c, table, dim, start, tidy(np.add(start, 1)))
    if not result.newest and not result.dims[dim][0].fixed:
        raise Deny("moving", f"takes entry {place} of the positions", "take the first or the newest row")
    c.row_local = all(a.fixed for a in table.axes)
    return result


def indexed(c: Call, table: Fact, dim: int, where: Fact) -> tuple[tuple[Dim, ...], tuple[Triangle, ...]]:
    """The axes that ``index`` puts in the place of one axis of ``table``, and where nothing is claimed."""
    axis = one(table.dims[dim])
    if where.scaled or where.junk:
        raise Deny("length_as_value", "an index that follows the length")
    form = where.affine
    if len(where.dims) == 1 and form is not None and abs(form.coefficients[0]) == 1 and not axis.freq:
        return ((_sliced(axis, where, int(form.coefficients[0])),),), ()
    c.keep_rows((axis,))
    if axis.fixed:
        return tuple(where.dims), ()
    if axis.batch or not axis.plain:
        raise Deny("data_dependent", f"reads positions by index from a sequence {axis}")
    low_high = value_bounds(where)
    if low_high is None:
        raise Deny(
            "data_dependent",
            "reads positions by an index that is not certified: any position could be read",
            "index with arange arithmetic, or mask scores instead",
        )
    low, high = low_high
    if np.all(low >= 0) and np.all(high < axis.valid):
        # Within any corner [0, r) of the index its values stay below r's certified content.
        return tuple(where.dims), ()
    if form is None:
        raise Deny("data_dependent", "reads positions by an index that may reach uncertified ones")
    sizes = [one(d).size for d in where.dims]
    follows = [i for i, size in enumerate(sizes) if not constant(size)]
    for q in follows:
        for k in follows:
            if q == k or not all(a.prefix for a in where.axes):
                continue
            low, high = index.bounds(form, sizes, (q, k, "below"))
            if np.all(low >= 0) and np.all(high < np.minimum(axis.valid, axis.size)):
                return tuple(where.dims), (Triangle(q, k, JUNK, None),)
    raise Deny(
        "wraps", "a negative index reads from the end of the sequence, and no mask hides what it reads"
    )


def _sliced(axis: Axis, where: Fact, step: int) -> Axis:
    """``x[offset + step * i]`` for i in [0, m): a slice, reversed for step -1."""
    assert where.affine is not None
    size = one(where.dims[0]).size
    offset = where.affine.offset
    if not isinstance(offset, np.ndarray):
        offset = int(offset)
    start = offset if step == 1 else tidy(np.add(np.subtract(offset, size), 1))
    stop = tidy(np.add(start, size))
    if not (np.all(np.asarray(start) >= 0) and np.all(np.asarray(stop) <= np.asarray(axis.size))):
        raise Deny(
            "wraps", "index arithmetic leaves the range of the table: a negative index reads from the end"
        )
    piece = cut(axis, start, stop)
    return flipped(piece) if step == -1 else piece


@rule("index", "_unsafe_index")
def advanced_index(c: Call) -> Fact:
    """x[i, :, j]: index tensors broadcast together and stand where the first one stood."""
    fact = c.fact("self")
    indices = list(c.arg("indices"))
    places = [i for i, n in enumerate(indices) if isinstance(n, fx.Node)]
    wheres = [c.fact(indices[i]) for i in places]
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in indices if isinstance(n, fx.Node)):
        raise Deny(
            "data_dependent", "boolean indexing: the size of the result depends on data", "use torch.where"
        )
    if len(places) == 1:
        c.note_linear([c.arg("self")], invariant=False)
        return looked_up(c, fact, places[0], wheres[0])
    rank = max(len(w.dims) for w in wheres)
    dims: list[Dim] = []
    for i in range(rank):
        shown = [w.dims[i - rank + len(w.dims)] for w in wheres if i - rank + len(w.dims) >= 0]
        dims.append(unite_dims(shown, "any", len(shown) < len(wheres)))
    adjacent = places[-1] - places[0] + 1 == len(places)
    kept = [i for i in range(len(fact.dims)) if i not in places]
    at = places[0] if adjacent else 0
    known = _known_entries(fact, dict(zip(places, wheres, strict=True)), rank, kept, at)
    if known is None and not all(a.fixed and not a.batch for i in places for a in fact.dims[i]):
        raise Deny("unproved", "reads positions through several index tensors at once")
    c.row_local = all(a.fixed for a in fact.axes)
    every = (*(fact.dims[i] for i in kept[:at]), *dims, *(fact.dims[i] for i in kept[at:]))
    if known is None:
        return Fact(every)
    coefficients = known.coefficients if isinstance(known, Affine) else (0,) * len(every)
    same_in_rows = tuple(
        dim if coefficient else tuple(replace(a, flat=True) if a.fixed else a for a in dim)
        for dim, coefficient in zip(every, coefficients, strict=True)
    )
    if isinstance(known, Affine):
        return Fact(same_in_rows, affine=known)
    return Fact(same_in_rows, fill=known)


def _known_entries(table: Fact, wheres: dict[int, Fact], rank: int, kept: list[int], at: int) -> Any:
    """What is read from a table of one number, or by index arithmetic from an affine one; None where not known.

    ``wheres``: the index of each dimension, broadcast to ``rank`` dimensions that stand before the ``kept[at]``-th.
    """
    if any(w.scaled or w.junk for w in wheres.values()):
        return None
    if is_number(table.fill):
        return table.fill
    form = table.affine
    if form is None:
        return None
    total = Affine((0,) * rank, form.offset)
    for i, where in wheres.items():
        read = index.aligned(where, rank)
        own = index.aligned(where, len(where.dims))
        if read is None or own is None:
            return None
        low, high = index.bounds(own, [one(d).size for d in where.dims])
        if not (np.all(low >= 0) and np.all(high < one(table.dims[i]).size)):
            return None
        total = index.combine(total, read, form.coefficients[i])
    others = [form.coefficients[i] for i in kept]
    return Affine((*others[:at], *total.coefficients, *others[at:]), total.offset)


@rule("gather", "take_along_dim")
def gather(c: Call) -> Fact:
    """x.gather(dim, index): along features, or along positions by certified index arithmetic."""
    fact, where = c.fact("self"), c.fact("index")
    dim = c.dim(c.number("dim"), len(fact.dims))
    c.note_linear([c.arg("self")], invariant=False)
    others: list[Dim] = []
    for i in range(len(fact.dims)):
        if i == dim:
            others.append(where.dims[i])
            continue
        if all(a.fixed for a in (*fact.dims[i], *where.dims[i])):
            shared = len(fact.dims[i]) == len(where.dims[i]) and all(
                same(a.size, b.size) for a, b in zip(fact.dims[i], where.dims[i], strict=True)
            )
            pair = [fact.dims[i], where.dims[i]]
            others.append(unite_dims(pair, "any", False) if shared else mixed(where.dims[i]))
            continue
        axis, wanted = one(fact.dims[i]), one(where.dims[i])
        if not (axis.plain and wanted.plain):
            raise Deny("misaligned", "gathers from values whose rows are not aligned with the index")
        if same(axis.size, wanted.size):
            others.append(unite_dims([fact.dims[i], where.dims[i]], "any", False))
        else:
            others.append((replace(wanted, valid=least(axis.valid, wanted.valid), batch=False, flat=False),))
    c.keep_rows(fact.dims[dim])
    if all(a.fixed for a in fact.dims[dim]):
        c.row_local = True
        others[dim] = mixed(others[dim])
        return Fact(tuple(others))
    if not all(a.plain for a in where.axes):
        raise Deny("misaligned", "gathers with an index whose rows are not aligned")
    _, triangles = indexed(c, fact, dim, where)
    return Fact(tuple(others), triangles=triangles)


@rule("one_hot")
def one_hot(c: Call) -> Fact:
    """A new feature dimension."""
    if c.number("num_classes", -1) == -1:
        raise Deny("data_dependent", "one_hot without num_classes: its width depends on data")
    c.row_local = True
    return Fact((*c.fact("self").dims, (fixed(c.out[-1]),)))
