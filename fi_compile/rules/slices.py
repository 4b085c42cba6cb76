"""Windows and shifts along a dimension: slice, select, pad, cat, flip, roll, split, scatter of a slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fi_compile.facts import (
    JUNK,
    Axis,
    Deny,
    Fact,
    Quantity,
    by_batch,
    constant,
    cut,
    fixed,
    flipped,
    least,
    most,
    padded,
    plus,
    rolled,
    same,
    sequence,
    settle,
    tidy,
)

from . import chunks
from .call import Call, mixed, one, rule, table_axis


def replaced(fact: Fact, dim: int, axes: tuple[Axis, ...]) -> Fact:
    """The fact with one dimension changed; only the scale, a uniform value and chunks of others survive."""
    dims = (*fact.dims[:dim], axes, *fact.dims[dim + 1 :])
    kept = chunks.without(fact.chunks, [dim], kept=True)
    return Fact(dims, fact.scale, fill=fact.fill, bounds=fact.bounds, chunks=kept)


def bounded(c: Call, value: object, size: Quantity, default: Quantity) -> Quantity:
    """A slice bound as Python reads it: negative from the end, clamped to [0, size]."""
    if value is None:
        return default
    q = c.q(value)
    if not by_batch(size):
        c.no_batch(value)
    q = tidy(np.where(np.less(q, 0), np.add(q, size), q))
    return least(most(q, 0), size)


def window(c: Call, fact: Fact, dim: int, start: Quantity, stop: Quantity) -> Fact:
    """``fact[start:stop]`` along ``dim``; the newest row is recognised."""
    if len(fact.dims[dim]) != 1:
        if same(start, 0) and same(stop, _size(fact.dims[dim])):
            return fact
        one(fact.dims[dim])
    axis = fact.dims[dim][0]
    length = c.context.length
    single = same(np.subtract(stop, start), 1)
    newest = single and not constant(start) and same(start, np.subtract(length, 1))
    if newest and axis.plain and bool(np.all(axis.valid >= length)):
        out = replaced(fact, dim, (fixed(1),))
        if not all(a.fixed for a in out.axes) or fact.junk or fact.scaled:
            raise Deny("unproved", "takes the newest row of a value that has other uncertified dimensions")
        return Fact(out.dims, fill=fact.fill, newest=True)
    if axis.fixed and axis.period is None and constant(stop) and not constant(start):
        axis = seen_from_the_end(cut(axis, 0, stop))
    result = replaced(fact, dim, (cut(axis, start, stop),))
    others = tuple(t for t in fact.triangles if dim not in (t.query, t.key))
    if same(start, 0):
        others = fact.triangles
    if any(t.above is JUNK and t not in others for t in fact.triangles):
        raise Deny("unproved", "moves entries that are certified only below a diagonal")
    affine = fact.affine
    if affine is not None and not same(start, 0):
        from .affine import moved

        affine = moved(affine, dim, start)
    return replace(result, triangles=others, affine=affine, view=fact.view if same(start, 0) else None)


def seen_from_the_end(axis: Axis) -> Axis:
    """The same fixed content, counted from its last index: what ``table[-s:]`` shows is known there.

    Not in normal form: where the cut that follows leaves everything in sight, settling turns it back.
    """
    last = tidy(np.subtract(axis.size, 1))
    lo, hi = tidy(np.subtract(last, axis.hi)), tidy(np.subtract(last, axis.lo))
    return replace(axis, sign=-1, shift=last, lo=lo, hi=hi)


def _size(dim: tuple[Axis, ...]) -> Quantity:
    total: Quantity = 1
    for axis in dim:
        total = tidy(np.multiply(total, axis.size))
    return total


@rule("slice", "slice_copy", scales=True, junk=True)
def slice_(c: Call) -> Fact:
    """x[..., start:stop:step, ...]."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim"), len(fact.dims))
    size = _size(fact.dims[dim])
    start = bounded(c, c.arg("start"), size, 0)
    stop = most(bounded(c, c.arg("end"), size, size), start)
    step = c.number("step", 1)
    c.note_linear([c.arg("self")])
    if step != 1:
        axis = one(fact.dims[dim])
        if not axis.fixed or not (constant(start) and constant(stop)) or fact.junk:
            raise Deny(
                "stride",
                "takes every k-th position",
                "a strided view of positions has no incremental form here",
            )
        return replaced(fact, dim, (fixed(c.out[dim]),))
    c.row_local = keeps_rows(c, fact, dim, start, stop)
    return window(c, fact, dim, start, stop)


def keeps_rows(c: Call, fact: Fact, dim: int, start: Quantity, stop: Quantity) -> bool:
    """Whether row i of ``fact[start:stop]`` along ``dim`` is row i of ``fact``, at every row of the sequence."""
    whole = same(start, 0) and (same(stop, _size(fact.dims[dim])) or same(stop, c.context.length))
    return whole or (all(a.fixed for a in fact.dims[dim]) and constant(start) and constant(stop))


@rule("narrow", scales=True)
def narrow(c: Call) -> Fact:
    """x.narrow(dim, start, length)."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim"), len(fact.dims))
    start = bounded(c, c.arg("start"), _size(fact.dims[dim]), 0)
    stop = tidy(np.add(start, c.q("length")))
    if not by_batch(_size(fact.dims[dim])):
        c.no_batch(c.arg("length"))
    c.note_linear([c.arg("self")])
    c.row_local = keeps_rows(c, fact, dim, start, stop)
    return window(c, fact, dim, start, stop)


@rule("select", "select_copy", scales=True)
def select(c: Call) -> Fact:
    """x[..., index, ...]: a dimension less."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim"), len(fact.dims))
    size = _size(fact.dims[dim])
    index = c.q("index")
    c.no_batch(c.arg("index"))
    index = tidy(np.where(np.less(index, 0), np.add(index, size), index))
    result = window(c, fact, dim, index, tidy(np.add(index, 1)))
    if not result.newest and not result.dims[dim][0].fixed:
        raise Deny(
            "moving",
            "takes one position whose content follows the length",
            "only the first or the newest row can be taken",
        )
    c.note_linear([c.arg("self")])
    c.row_local = fact.dims[dim][0].fixed
    dims = (*result.dims[:dim], *result.dims[dim + 1 :])
    kept = chunks.without(result.chunks, [dim], kept=False)
    return Fact(dims, result.scale, newest=result.newest, fill=result.fill, bounds=result.bounds, chunks=kept)


@rule("constant_pad_nd", "pad", scales=True)
def pad(c: Call) -> Fact:
    """Zeros (or a constant) at the ends of the last dimensions."""
    fact = c.fact("self")
    mirrored = c.arg("mode") not in (None, "constant")
    if mirrored and any(not one(fact.dims[-1 - i]).fixed for i in range(len(c.arg("pad")) // 2)):
        raise Deny("unproved", f"padding mode {c.arg('mode')!r}", "pad with zeros on the left")
    amounts = c.qs("pad")
    for amount in c.arg("pad"):
        c.no_batch(amount)
    value = c.number("value") or 0
    dims = list(fact.dims)
    for i in range(len(amounts) // 2):
        left, right = amounts[2 * i], amounts[2 * i + 1]
        if same(left, 0) and same(right, 0):
            continue
        dim = len(dims) - 1 - i
        axis = one(dims[dim])
        if value == 0 and c.arg("mode") in (None, "constant"):
            dims[dim] = (padded(axis, left, right),)
        else:
            if fact.scaled:
                raise Deny("length_as_value", "pads a value that still carries a factor of the length")
            joined = axis
            if not same(left, 0):
                joined = joined_axes([(table_axis(left), False), (joined, False)])
            if not same(right, 0):
                joined = joined_axes([(joined, False), (table_axis(right), False)])
            dims[dim] = (joined,)
    if value == 0:
        c.note_linear([c.arg("self")])
    else:
        c.affine_groups.append(frozenset({c.arg("self")}))
    return Fact(tuple(dims), fact.scale)


def joined_axes(pieces: Sequence[tuple[Axis, bool]]) -> Axis:
    """Concatenation of axes; a piece flagged True is all zeros.

    Leading zeros shift, trailing zeros pad; after pieces of constant size and content the next one goes on
    at a constant offset; anything behind an offset that follows the length is not certified.
    """
    pieces = [p for p in pieces if not same(p[0].size, 0)]
    total = 0
    for axis, _ in pieces:
        total = tidy(np.add(total, axis.size))
    left: Quantity = 0
    while pieces and pieces[0][1]:
        left = tidy(np.add(left, pieces[0][0].size))
        pieces = pieces[1:]
    if not pieces:
        return settle(Axis(total, 1 << 40, 0, -1))
    right: Quantity = 0
    while pieces[-1][1]:
        right = tidy(np.add(right, pieces[-1][0].size))
        pieces = pieces[:-1]
    body = pieces[0][0]
    for axis, _ in pieces[1:]:
        body = _followed(body, axis)
    return padded(body, left, right)


def _followed(body: Axis, axis: Axis) -> Axis:
    size = tidy(np.add(body.size, axis.size))
    if body.period is not None or axis.period is not None:
        if body.fixed and axis.fixed:
            return fixed(size)
        raise Deny("spectrum", "concatenates spectra or cyclic sequences along their own dimension")
    if body.fixed and axis.plain:
        return settle(Axis(size, plus(axis.valid, body.size), 0, tidy(np.subtract(size, 1))))
    if body.plain:  # what follows starts at an index that moves with the length
        return sequence(size, least(body.valid, body.size))
    raise Deny("misaligned", f"concatenates a sequence {body} with more")


@rule("cat", "concat", "concatenate", scales=True)
def cat(c: Call) -> Fact:
    """Concatenation: along features, or of pieces along positions."""
    nodes = [n for n in c.arg("tensors") if c.node is not n]
    facts = [c.fact(n) for n in nodes]
    kept = [
        (n, f)
        for n, f in zip(nodes, facts, strict=True)
        if not (len(f.dims) == 1 and same(f.axes[0].size, 0))
    ]
    nodes, facts = [n for n, _ in kept], [f for _, f in kept]
    dim = c.dim(c.number("dim", 0), len(facts[0].dims))
    if any(f.scaled for f in facts) and not all(same(f.scale, facts[0].scale) for f in facts):
        raise Deny("length_as_value", "joins values that carry different factors of the length")
    from .pointwise import unite_dims

    dims = []
    for i in range(len(facts[0].dims)):
        if i == dim:
            axis = joined_axes([(one(f.dims[i]), f.fill == 0) for f in facts])
            dims.append((axis,))
        else:
            dims.append(unite_dims([f.dims[i] for f in facts], "linear", False))
    c.note_linear(nodes, *([n] for n in nodes if all(f.fill == 0 for m, f in kept if m is not n)))
    c.row_local = all(f.dims[dim][0].fixed for f in facts)
    return Fact(tuple(dims), facts[0].scale)


@rule("stack", scales=True)
def stack(c: Call) -> Fact:
    """A new dimension of the pieces."""
    nodes = list(c.arg("tensors"))
    facts = [c.fact(n) for n in nodes]
    if any(f.scaled for f in facts) and not all(same(f.scale, facts[0].scale) for f in facts):
        raise Deny("length_as_value", "joins values that carry different factors of the length")
    from .pointwise import unite_dims

    dim = c.dim(c.number("dim", 0), len(facts[0].dims) + 1)
    dims = [unite_dims([f.dims[i] for f in facts], "linear", False) for i in range(len(facts[0].dims))]
    c.note_linear(nodes)
    c.row_local = True
    return Fact((*dims[:dim], (fixed(len(nodes)),), *dims[dim:]), facts[0].scale)


@rule("flip", scales=True)
def flip(c: Call) -> Fact:
    """Reversal along dimensions."""
    fact = c.fact("self")
    dims = list(fact.dims)
    for d in c.arg("dims"):
        d = c.dim(d, len(dims))
        dims[d] = (flipped(one(dims[d])),)
    c.note_linear([c.arg("self")])
    c.row_local = all(fact.dims[c.dim(d, len(dims))][0].fixed for d in c.arg("dims"))
    return Fact(tuple(dims), fact.scale, fill=fact.fill)


@rule("roll", scales=True)
def roll(c: Call) -> Fact:
    """Rotation along dimensions."""
    fact = c.fact("self")
    if not c.arg("dims"):
        raise Deny("unproved", "rolls a flattened tensor", "name the dimension")
    dims = list(fact.dims)
    for d, by in zip(c.arg("dims"), c.qs("shifts"), strict=True):
        d = c.dim(d, len(dims))
        dims[d] = (rolled(one(dims[d]), by),)
    c.note_linear([c.arg("self")])
    c.row_local = all(fact.dims[c.dim(d, len(dims))][0].fixed for d in c.arg("dims"))
    return Fact(tuple(dims), fact.scale, fill=fact.fill)


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    scales=True,
    junk=True,
)
def split(c: Call) -> list[Fact]:
    """Pieces along a dimension: slices one after another."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim", 0), len(fact.dims))
    for key in ("split_size", "split_sizes", "chunks", "sections", "indices"):
        if c.arg(key) is not None:
            c.qs(key)
    c.note_linear([c.arg("self")])
    c.row_local = bool(fact.dims[dim][0].fixed)
    start: Quantity = 0
    pieces = []
    for value in c.node.meta["val"]:
        size = 1 if c.name == "unbind" else c.shape(value)[dim]
        stop = tidy(np.add(start, size))
        piece = window(c, fact, dim, start, stop)
        if c.name == "unbind":
            if not piece.newest and not piece.dims[dim][0].fixed:
                raise Deny("moving", "unbinds the positions")
            if fact.junk:
                raise Deny("unproved", "unbinds entries that are certified only below a diagonal")
            dims = (*piece.dims[:dim], *piece.dims[dim + 1 :])
            kept = chunks.without(piece.chunks, [dim], kept=False)
            piece = Fact(dims, piece.scale, newest=piece.newest, chunks=kept)
        pieces.append(piece)
        start = stop
    return pieces


@rule("slice_scatter", "select_scatter", scales=True)
def scatter(c: Call) -> Fact:
    """``x`` with a slice replaced: the concatenation of what is before, the new part and what is after."""
    fact, source = c.fact("self"), c.fact("src")
    dim = c.dim(c.number("dim", 0), len(fact.dims))
    size = _size(fact.dims[dim])
    if c.name == "select_scatter":
        index = c.q("index")
        start = tidy(np.where(np.less(index, 0), np.add(index, size), index))
        stop = tidy(np.add(start, 1))
        source = Fact((*source.dims[:dim], (fixed(1),), *source.dims[dim:]), source.scale, fill=source.fill)
    else:
        start = bounded(c, c.arg("start"), size, 0)
        stop = most(bounded(c, c.arg("end"), size, size), start)
        if c.number("step", 1) != 1:
            if not fact.dims[dim][0].fixed:
                raise Deny("stride", "writes every k-th position")
            return Fact(tuple(mixed(d) for d in fact.dims), fact.scale)
    if not same(fact.scale, source.scale):
        raise Deny("length_as_value", "joins values that carry different factors of the length")
    from .pointwise import unite_dims

    axis = one(fact.dims[dim])
    whole = same(start, 0) and same(stop, size)
    before = _piece(axis, 0, start, fact.fill == 0)
    after = _piece(axis, stop, size, fact.fill == 0)
    zero = source.fill == 0
    parts = [(one(source.dims[dim]), zero)] if whole else [before, (one(source.dims[dim]), zero), after]
    dims = []
    for i in range(len(fact.dims)):
        if i == dim:
            dims.append((joined_axes([p for p in parts if p is not None]),))
        else:
            dims.append(
                source.dims[i] if whole else unite_dims([fact.dims[i], source.dims[i]], "linear", False)
            )
    c.note_linear([c.arg("self"), c.arg("src")], *([[c.arg("src")]] if fact.fill == 0 or whole else []))
    c.row_local = bool(axis.fixed)
    return Fact(tuple(dims), fact.scale)


def _piece(axis: Axis, start: Quantity, stop: Quantity, zero: bool) -> tuple[Axis, bool] | None:
    if same(start, stop):
        return None
    return cut(axis, start, stop), zero
