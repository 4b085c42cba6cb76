"""Positions in chunks: an axis of whole chunks beside one of the places in each.

A sequence so split shows position ``chunk · size + place``. The axis of chunks is a sequence of its own, certified for
all chunks before the last one, which may be incomplete; a :class:`~fi_compile.facts.Chunk` says that of the last one
the places so far are certified as well. A rule that does not keep it leaves the weaker claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fi_compile.facts import (
    EVERYWHERE,
    Axis,
    Chunk,
    Dim,
    Fact,
    Quantity,
    always,
    constant,
    fixed,
    least,
    same,
    tidy,
)


def shared(facts: Sequence[Fact], places: Sequence[Mapping[int, int]]) -> tuple[Chunk, ...]:
    """What an entry of a result needs that is made of the same entry of each operand.

    ``places``: the dimension of the result that each operand's dimension runs along.
    """
    found: dict[tuple[int, int], Chunk] = {}
    for fact, where in zip(facts, places, strict=True):
        for chunk in fact.chunks:
            if chunk.outer not in where or chunk.inner not in where:
                return ()
            key = (where[chunk.outer], where[chunk.inner])
            valid = least(chunk.valid, found[key].valid) if key in found else chunk.valid
            found[key] = Chunk(*key, chunk.size, valid)
    outers = {outer for outer, _ in found}
    if len(outers) != 1:
        return ()
    (outer,) = outers
    for fact, where in zip(facts, places, strict=True):
        if not fact.chunks and any(
            where.get(i) == outer and not _whole(dim) for i, dim in enumerate(fact.dims)
        ):
            return ()
    return tuple(found.values())


def _whole(dim: Dim) -> bool:
    """Whether every entry along a dimension is certified."""
    return all(a.fixed or always(a.valid >= a.size) for a in dim)


def aligned(facts: Sequence[Fact], rank: int) -> tuple[Chunk, ...]:
    """:func:`shared` of operands aligned at the right."""
    places = [{i: i + rank - len(f.dims) for i in range(len(f.dims))} for f in facts]
    return shared(facts, places)


def moved(chunks: tuple[Chunk, ...], where: Mapping[int, int]) -> tuple[Chunk, ...]:
    """The same with dimensions rearranged; nothing is left where one of them is gone."""
    if not all(c.outer in where and c.inner in where for c in chunks):
        return ()
    return tuple(Chunk(where[c.outer], where[c.inner], c.size, c.valid) for c in chunks)


def without(chunks: tuple[Chunk, ...], dims: Sequence[int], kept: bool) -> tuple[Chunk, ...]:
    """What is left where dimensions of features were reduced: they remain with size 1 if ``kept``."""
    if any(d in (c.outer, c.inner) for c in chunks for d in dims):
        return ()
    if kept:
        return chunks

    def place(d: int) -> int:
        return d - sum(x < d for x in dims)

    return tuple(Chunk(place(c.outer), place(c.inner), c.size, c.valid) for c in chunks)


def summed(
    facts: Sequence[Fact],
    letters: Sequence[Sequence[str]],
    out: Sequence[str],
    bounded_by: Mapping[str, set[str]],
) -> tuple[Chunk, ...]:
    """Of a contraction: a place that is summed over may be bounded by one that stays.

    ``bounded_by``: the letters a letter cannot exceed where the product is not zero.
    """
    index = {name: i for i, name in enumerate(out)}
    places: list[dict[int, int]] = []
    for fact, names in zip(facts, letters, strict=True):
        where = {d: index[name] for d, name in enumerate(names) if name in index}
        for chunk in fact.chunks:
            if chunk.inner in where:
                continue
            bounds = [q for q in sorted(bounded_by.get(names[chunk.inner], ())) if q in index]
            if not bounds:
                return ()
            where[chunk.inner] = index[bounds[0]]
        places.append(where)
    return shared(facts, places)


def regrouped(fact: Fact, sizes: Sequence[Quantity], length: Quantity) -> Fact:
    """The fact before a reshape to ``sizes``, with positions split into chunks, or chunks joined, as that does."""
    ends = _products(sizes)
    for i, dim in enumerate(fact.dims):
        if len(dim) != 1 or not dim[0].plain or dim[0].fixed or dim[0].batch:
            continue
        before = _products([_total(d) for d in fact.dims])[i]
        starts = [j for j, end in enumerate(ends[:-1]) if same(end, before) and not constant(sizes[j])]
        if not starts or same(sizes[starts[0]], dim[0].size):
            continue
        size = sizes[starts[0]]
        if np.all(np.asarray(size) > 0) and np.all(np.mod(dim[0].size, size) == 0):
            chunk = tidy(np.floor_divide(dim[0].size, size))
            if isinstance(chunk, int) and chunk > 1 and not fact.chunks:
                return _split(fact, i, size, chunk)
        joined = _joined(fact, i, size, length)
        if joined is not None:
            return joined
    return fact


def _split(fact: Fact, i: int, size: Quantity, chunk: int) -> Fact:
    (axis,) = fact.dims[i]
    if not (constant(axis.lo) and always(axis.lo >= 0)):
        return fact
    valid = least(axis.valid, axis.size)
    # The last chunk is taken for incomplete even where it is not: a shorter sequence may end in it.
    complete = tidy(np.floor_divide(np.subtract(valid, 1), chunk))
    outer = Axis(size, complete, 0, tidy(np.subtract(size, 1)))
    dims = (*fact.dims[:i], (outer,), (fixed(chunk),), *fact.dims[i + 1 :])
    return Fact(dims, fact.scale, fill=fact.fill, bounds=fact.bounds, chunks=(Chunk(i, i + 1, chunk, valid),))


def _joined(fact: Fact, i: int, size: Quantity, length: Quantity) -> Fact | None:
    (axis,) = fact.dims[i]
    if i + 1 >= len(fact.dims) or same(axis.size, length) or len(fact.dims[i + 1]) != 1:
        return None
    (place,) = fact.dims[i + 1]
    if (
        not place.fixed
        or not isinstance(place.size, int)
        or not same(np.multiply(axis.size, place.size), size)
    ):
        return None
    if _whole(fact.dims[i]):
        valid: Quantity = size
    elif len(fact.chunks) == 1 and (fact.chunks[0].outer, fact.chunks[0].inner) == (i, i + 1):
        valid = fact.chunks[0].valid
    else:
        valid = tidy(np.minimum(np.multiply(np.minimum(axis.valid, EVERYWHERE >> 20), place.size), size))
    joined = Axis(size, valid, 0, tidy(np.subtract(size, 1)))
    dims = (*fact.dims[:i], (joined,), *fact.dims[i + 2 :])
    return Fact(dims, fact.scale, fill=fact.fill, bounds=fact.bounds)


def after_view(fact: Fact, sizes: Sequence[Quantity]) -> tuple[Chunk, ...]:
    """The chunks of a fact after a reshape that keeps their dimensions and regroups others."""
    if not fact.chunks:
        return ()
    old, new = [_total(d) for d in fact.dims], list(sizes)
    before, after = _products(old), _products(new)
    where = {}
    for i, size in enumerate(old):
        match = [j for j in range(len(new)) if same(before[i], after[j]) and same(size, new[j])]
        if match and not same(size, 1):
            where[i] = match[0]
    return moved(fact.chunks, where)


def _products(sizes: Sequence[Quantity]) -> list[Quantity]:
    """The product of all sizes before each place, and of all."""
    products: list[Quantity] = [1]
    for size in sizes:
        products.append(tidy(np.asarray(np.multiply(products[-1], size))))
    return products


def _total(dim: Dim) -> Quantity:
    total: Quantity = 1
    for axis in dim:
        total = tidy(np.asarray(np.multiply(total, axis.size)))
    return total
