"""Views: which dimension is where; merged dimensions keep their factors until they are split again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fi_compile.facts import JUNK, Axis, Deny, Dim, Fact, Quantity, by_batch, constant, fixed, same, tidy

from . import chunks
from .call import Call, is_one, rule, table_axis


def moved(fact: Fact, dims: tuple[Dim, ...], where: dict[int, int]) -> Fact:
    """The fact with its dimensions rearranged; ``where`` maps old to new dimensions."""
    triangles = tuple(
        replace(t, query=where[t.query], key=where[t.key])
        for t in fact.triangles
        if t.query in where and t.key in where
    )
    if any(t.above is JUNK and not (t.query in where and t.key in where) for t in fact.triangles):
        raise Deny("unproved", "rearranges entries that are certified only below a diagonal")
    form = fact.affine
    if form is not None:
        coefficients = [0.0] * len(dims)
        for old, new in where.items():
            coefficients[new] = form.coefficients[old]
        lost = [x for i, x in enumerate(form.coefficients) if i not in where and x]
        form = None if lost else replace(form, coefficients=tuple(coefficients))
    kept = chunks.moved(fact.chunks, where)
    view = None if fact.view is None else fact.view.moved(where, len(dims))
    return Fact(
        dims, fact.scale, triangles, affine=form, fill=fact.fill, bounds=fact.bounds, chunks=kept, view=view
    )


def _linear(c: Call) -> Fact:
    c.note_linear([c.tensors()[0]])
    c.note_ignored(c.tensors()[0], c.arg("other"))
    c.row_local = True
    return c.fact(c.tensors()[0])


def permuted(fact: Fact, order: list[int]) -> Fact:
    """Dimensions in another order."""
    return moved(fact, tuple(fact.dims[i] for i in order), {old: new for new, old in enumerate(order)})


@rule("transpose", "swapaxes", "swapdims", "transpose_copy", scales=True, junk=True)
def transpose(c: Call) -> Fact:
    """Two dimensions exchanged."""
    fact = _linear(c)
    names = [k for k in c.arguments if k != "self"]
    a, b = (c.dim(c.number(k), len(fact.dims)) for k in names[:2])
    order = list(range(len(fact.dims)))
    order[a], order[b] = order[b], order[a]
    return permuted(fact, order)


@rule("t", "numpy_T", "mT", "mH", "adjoint", "matrix_H", scales=True, junk=True)
def reversed_dims(c: Call) -> Fact:
    """All dimensions reversed, or the last two exchanged."""
    fact = _linear(c)
    order = list(range(len(fact.dims)))
    if c.name in ("mH", "adjoint", "matrix_H") and c.is_complex():
        raise Deny("unproved", "a conjugate transpose", "use .conj() and .transpose()")
    if c.name in ("t", "numpy_T"):
        order.reverse()
    else:
        order[-2:] = order[-1], order[-2]
    return permuted(fact, order)


@rule("permute", "permute_copy", scales=True, junk=True)
def permute(c: Call) -> Fact:
    """Dimensions in another order."""
    fact = _linear(c)
    return permuted(fact, [c.dim(d, len(fact.dims)) for d in c.arg("dims")])


@rule("movedim", "moveaxis", scales=True, junk=True)
def movedim(c: Call) -> Fact:
    """Dimensions moved to given places."""
    fact = _linear(c)
    rank = len(fact.dims)

    def listed(name: str) -> list[int]:
        value = c.arg(name)
        return [c.dim(d, rank) for d in (value if isinstance(value, (list, tuple)) else [value])]

    source, destination = listed("source"), listed("destination")
    placed = dict(zip(destination, source, strict=True))
    rest = iter(i for i in range(rank) if i not in source)
    return permuted(fact, [placed[i] if i in placed else next(rest) for i in range(rank)])


@rule("unsqueeze", "unsqueeze_copy", scales=True, junk=True)
def unsqueeze(c: Call) -> Fact:
    """A new dimension of size 1."""
    fact = _linear(c)
    dim = c.dim(c.number("dim"), len(fact.dims) + 1)
    dims = (*fact.dims[:dim], (fixed(1),), *fact.dims[dim:])
    return moved(fact, dims, {i: i + (i >= dim) for i in range(len(fact.dims))})


@rule("squeeze", "squeeze_copy", scales=True, junk=True)
def squeeze(c: Call) -> Fact:
    """Dimensions of size 1 removed."""
    fact = _linear(c)
    asked = c.arg("dim")
    if asked is None:
        candidates = set(range(len(fact.dims)))
    else:
        candidates = {
            c.dim(d, len(fact.dims)) for d in (asked if isinstance(asked, (list, tuple)) else [asked])
        }
    kept = [i for i in range(len(fact.dims)) if not (i in candidates and is_one(fact.dims[i]))]
    return moved(fact, tuple(fact.dims[i] for i in kept), {old: new for new, old in enumerate(kept)})


@rule("expand", "expand_copy", "expand_as", "broadcast_to", scales=True, junk=True)
def expand(c: Call) -> Fact:
    """Size-1 dimensions repeated."""
    fact = _linear(c)
    if c.name not in ("expand_as",):
        c.qs("size")
    return repeated(fact, c.out)


def repeated(fact: Fact, sizes: tuple[Quantity, ...]) -> Fact:
    """The fact broadcast to ``sizes``."""
    missing = len(sizes) - len(fact.dims)
    dims: list[Dim] = []
    for i, size in enumerate(sizes):
        dim = fact.dims[i - missing] if i >= missing else (fixed(1),)
        dims.append((replace(table_axis(size), flat=True),) if is_one(dim) and not same(size, 1) else dim)
    return moved(fact, tuple(dims), {i: i + missing for i in range(len(fact.dims))})


@rule("repeat", scales=True)
def repeat(c: Call) -> Fact:
    """Tiled copies: of size-1 or constant dimensions."""
    fact = _linear(c)
    times = c.qs("repeats")
    missing = len(times) - len(fact.dims)
    dims: list[Dim] = []
    for i, (n, size) in enumerate(zip(times, c.out, strict=True)):
        dim = fact.dims[i - missing] if i >= missing else (fixed(1),)
        if same(n, 1):
            dims.append(dim)
        elif is_one(dim):
            dims.append((replace(table_axis(size), flat=True),))
        elif all(a.fixed for a in dim) and constant(n):
            copies = replace(fixed(n), flat=True)
            dims.append((copies, *dim) if by_batch(n) and not any(a.batch for a in dim) else (fixed(size),))
        else:
            raise Deny("unproved", "repeats a sequence of positions end to end")
    return Fact(tuple(dims), fact.scale, fill=fact.fill)


@rule("repeat_interleave", scales=True)
def repeat_interleave(c: Call) -> Fact:
    """Each element of a constant dimension several times."""
    fact = _linear(c)
    dim = c.dim(c.number("dim"), len(fact.dims))
    if not isinstance(c.arg("repeats"), int) or not all(a.fixed for a in fact.dims[dim]):
        raise Deny("unproved", "repeats positions in place")
    dims = (*fact.dims[:dim], (fixed(c.out[dim]),), *fact.dims[dim + 1 :])
    return Fact(dims, fact.scale, fill=fact.fill)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "_reshape_alias", "reshape_as",
      "view_as",
      "_reshape_copy", "ravel", scales=True, junk=True)  # fmt: skip
def view(c: Call) -> Fact:
    """Dimensions merged and split; a merged sequence axis survives until it is split off exactly."""
    fact = _linear(c)
    for key in ("size", "shape", "sizes"):
        if c.arg(key) is not None:
            c.qs(key)
    fact = chunks.regrouped(fact, c.out, c.context.length)
    dims = viewed(fact, c.out)
    old = [i for i, dim in enumerate(fact.dims) if not is_one(dim)]
    new = [i for i, dim in enumerate(dims) if not is_one(dim)]
    if len(old) == len(new) and all(_alike(fact.dims[i], dims[j]) for i, j in zip(old, new, strict=True)):
        return moved(fact, dims, dict(zip(old, new, strict=True)))  # only dimensions of size 1 come or go
    where = _untouched(fact.dims, dims)
    triangles = tuple(
        replace(t, query=where[t.query], key=where[t.key])
        for t in fact.triangles
        if t.query in where and t.key in where
    )
    if any(t.above is JUNK and not (t.query in where and t.key in where) for t in fact.triangles):
        raise Deny("unproved", "a view regroups entries that are certified only below a diagonal")
    kept = chunks.after_view(fact, c.out)
    return Fact(dims, fact.scale, triangles, fill=fact.fill, bounds=fact.bounds, chunks=kept)


def _untouched(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> dict[int, int]:
    """Dimensions before and after all that a view regroups: they hold what they held."""
    where: dict[int, int] = {}
    for i, j in zip(range(len(old)), range(len(new)), strict=False):
        if not _alike(old[i], new[j]):
            break
        where[i] = j
    for i, j in zip(reversed(range(len(old))), reversed(range(len(new))), strict=False):
        if not _alike(old[i], new[j]):
            break
        where[i] = j
    return where


def _alike(a: Dim, b: Dim) -> bool:
    return len(a) == len(b) and all(same(x.size, y.size) for x, y in zip(a, b, strict=True))


def viewed(fact: Fact, sizes: tuple[Quantity, ...]) -> tuple[Dim, ...]:
    """The dimensions after a reshape to ``sizes``: factors regrouped in row-major order."""
    pending = [a for dim in fact.dims for a in dim if not same(a.size, 1)]
    dims: list[Dim] = []
    for size in sizes:
        taken: list[Axis] = []
        product: Quantity = 1
        while not same(product, size):
            if not pending:
                raise Deny("merged", "a view regroups dimensions of a size that follows the length")
            axis = pending.pop(0)
            together = np.multiply(product, axis.size)
            splittable = _free(axis) and isinstance(axis.size, int)
            if splittable and isinstance(product, int) and isinstance(size, int) and size % product == 0:
                need = size // product
                if axis.size > need and axis.size % need == 0:  # type: ignore[operator]
                    pending.insert(0, fixed(axis.size // need))  # type: ignore[operator]
                    axis = fixed(need)
                    together = np.multiply(product, need)
            elif splittable and not np.all(np.mod(size, together) == 0):
                axis, rest = _split(axis, size, product)
                pending.insert(0, rest)
                together = np.multiply(product, axis.size)
            product = tidy(np.asarray(together))
            if np.any(np.asarray(product) > np.asarray(size)):
                raise Deny("merged", "a view splits the sequence axis, or regroups it with other dimensions")
            taken.append(axis)
        dims.append(_joined(taken))
    if pending:
        raise Deny("merged", "a view regroups dimensions of a size that follows the length")
    return tuple(dims)


def _split(axis: Axis, size: Quantity, product: Quantity) -> tuple[Axis, Axis]:
    """A constant axis split so that ``product`` times its first part is ``size``."""
    need = tidy(np.floor_divide(size, product))
    if not isinstance(need, int) or need <= 0 or axis.size % need:  # type: ignore[operator]
        raise Deny("merged", "a view splits the sequence axis, or regroups it with other dimensions")
    return fixed(need), fixed(axis.size // need)  # type: ignore[operator]


def _free(axis: Axis) -> bool:
    return axis.fixed and not axis.batch and axis.period is None


def _one_a_row(a: Axis, b: Axis) -> bool:
    """Whether one of two factors repeats the other for every row of the batch, which merging would forget."""
    return a.flat != b.flat and by_batch((a if a.flat else b).size)


def _joined(factors: list[Axis]) -> Dim:
    """Adjacent constant factors are one; sequence axes stay themselves."""
    out: list[Axis] = []
    for axis in factors:
        if out and _free(out[-1]) and _free(axis) and not _one_a_row(out[-1], axis):
            out[-1] = fixed(tidy(np.multiply(out[-1].size, axis.size)))
        else:
            out.append(axis)
    if len(out) > 1 and any(not a.plain for a in out):
        raise Deny(
            "merged", "a view merges a shifted, reversed or transformed sequence with another dimension"
        )
    return tuple(out) if out else (fixed(1),)
