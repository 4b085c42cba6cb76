"""Reductions, norms and scans: over features freely, over positions only causally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from fi_compile.facts import Deny, Dim, Fact, Triangle, constant, filled, fixed, is_number, least, settle
from fi_compile.program import is_tensor

from . import chunks
from .affine import aligned
from .call import Call, Result, is_one, mixed, need_fixed, one, rule
from .contract import masked
from .masks import is_hidden
from .pointwise import unite_dims
from .triangles import of_table


def listed(c: Call, fact: Fact) -> list[int]:
    """The dimensions reduced over."""
    asked = c.arg("dim")
    if asked is None or asked == []:
        return list(range(len(fact.dims)))
    return [c.dim(d, len(fact.dims)) for d in (asked if isinstance(asked, (list, tuple)) else [asked])]


def dropped(c: Call, fact: Fact, dims: list[int]) -> tuple[Dim, ...]:
    """The remaining dimensions, after any non-linear map of each row."""
    rest: list[Dim] = []
    for i, dim in enumerate(fact.dims):
        if i in dims:
            if c.arg("keepdim"):
                rest.append((fixed(1),))
        else:
            rest.append(dim)
    return tuple(rest)


def _by_value(c: Call, fact: Fact, key: int) -> tuple[Triangle, ...]:
    """What the values of a table say above the diagonal of ``key`` and the one other sequence dimension."""
    moving = [d for d, dim in enumerate(fact.dims) if not all(a.fixed for a in dim)]
    if len(moving) != 2:
        return ()
    found = of_table(c, c.arg("self"), sum(moving) - key, key)
    if found:
        c.conditions.append("decided by value at the longest length")
    return found


def _known(fact: Fact) -> tuple[Triangle, ...]:
    """The triangles that say something of what lies above."""
    return tuple(t for t in fact.triangles if t.above is not None)


LINEAR = {"sum", "mean"}


@rule("sum", "mean", scales=True, junk=True)
def sums(c: Call) -> Fact:
    """Over features; over keys where later ones are exactly 0."""
    fact = c.fact("self")
    dims = listed(c, fact)
    c.keep_rows(*(fact.dims[d] for d in dims))
    follows = [d for d in dims if not all(a.fixed for a in fact.dims[d])]
    c.note_linear([c.arg("self")])
    if not follows:
        if fact.junk:
            raise Deny("unproved", "uses entries that are certified only below a diagonal")
        c.row_local = True
        kept = chunks.without(fact.chunks, dims, bool(c.arg("keepdim")))
        return Fact(dropped(c, fact, dims), fact.scale, chunks=kept)
    if c.name == "sum" and len(follows) == 1:
        key = follows[0]
        for t in _known(fact) or _by_value(c, fact, key):
            if t.key == key and t.query not in dims and is_number(t.above) and t.above == 0 and not fact.junk:
                axis, query = one(fact.dims[key]), one(fact.dims[t.query])
                if axis.plain and query.plain:
                    shown = list(fact.dims)
                    shown[t.query] = (replace(query, valid=least(query.valid, axis.valid)),)
                    c.conditions.append("entries with key > query are exactly 0")
                    return Fact(dropped(c, Fact(tuple(shown)), dims), fact.scale)
    need_fixed(fact, follows[0], f"{c.name}()")
    raise Deny("mixes_positions", f"{c.name}() over positions")


@rule("amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std", "var_mean", "std_mean", "norm",
      "linalg_vector_norm", "any", "all", "median", "aminmax", "mode", "count_nonzero", "nansum",
      "frobenius_norm")  # fmt: skip
def reductions(c: Call) -> Result:
    """Over features; the largest of keys where later ones are lower than any."""
    if c.name in ("max", "min") and isinstance(c.arg("other"), fx.Node):
        from .pointwise import elementwise

        return elementwise(c, "any")
    fact = c.fact("self")
    dims = listed(c, fact)
    _no_spectra(c, fact, dims)
    seen = _largest_of_keys(c, fact, dims)
    if seen is None:
        for d in dims:
            need_fixed(fact, d, f"{c.name}()")
        c.row_local, seen = True, fact
    rest = tuple(tuple(filled(a) for a in d) for d in dropped(c, seen, dims))
    values = c.node.meta["val"]
    return [Fact(rest) for _ in values] if isinstance(values, (list, tuple)) else Fact(rest)


def _largest_of_keys(c: Call, fact: Fact, dims: list[int]) -> Fact | None:
    """The fact with its queries known as far as their keys are, where no later key can be the largest."""
    if c.name not in ("amax", "max", "argmax") or len(dims) != 1 or all(a.fixed for a in fact.dims[dims[0]]):
        return None
    (key,) = dims
    shown = _known(fact) or _by_value(c, fact, key)
    known = _hidden(shown, key) or _far_below(c, fact, key)
    if not known:
        need_fixed(fact, key, f"{c.name}(){_lowered(c, shown, key)}")
    c.keep_rows(fact.dims[key])
    c.conditions.append("entries with key > query are lower than any other")
    return Fact(_kept_to_keys([tuple(filled(a) for a in d) for d in fact.dims], known[0]))


def _hidden(triangles: Sequence[Triangle], key: int) -> list[Triangle]:
    """The triangles of later keys that are lower than any score."""
    return [t for t in triangles if t.key == key and masked(t) and not isinstance(t.above, bool)]


def _kept_to_keys(dims: Sequence[Dim], triangle: Triangle) -> tuple[Dim, ...]:
    """Dimensions of scores, where each query is known as far as its keys are."""
    axis, query = one(dims[triangle.key]), one(dims[triangle.query])
    if not (axis.plain and query.plain):
        raise Deny("misaligned", "a reduction over shifted positions")
    known = list(dims)
    known[triangle.query] = (replace(query, valid=least(query.valid, axis.valid)),)
    return tuple(known)


def _no_spectra(c: Call, fact: Fact, dims: list[int]) -> None:
    for i, dim in enumerate(fact.dims):
        if i not in dims and any(a.period is not None and not a.fixed for a in dim):
            raise Deny("spectrum", f"{c.name} of a spectrum or cyclic sequence mixes all positions")


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "softmin")
def softmax(c: Call) -> Fact:
    """Over features; over keys where later ones are -inf."""
    fact = c.fact("self")
    dims = listed(c, fact)
    _no_spectra(c, fact, dims)
    shown = [tuple(filled(a) for a in d) for d in fact.dims]
    triangles = []
    c.row_local = True
    for dim in dims:
        c.keep_rows(fact.dims[dim])
        if all(a.fixed for a in fact.dims[dim]):
            shown[dim] = mixed(shown[dim])
            continue
        c.row_local = False
        shown_above = _known(fact) or _by_value(c, fact, dim)
        known = _hidden(shown_above, dim)
        # The logarithm of a weight that underflows is a finite number.
        exactly_nothing = "log" not in c.name and len(dims) == 1
        if exactly_nothing and not known and not any(t.query == dim and masked(t) for t in fact.triangles):
            known = _far_below(c, fact, dim)
        if len(dims) != 1 or not known or c.name == "softmin":
            if any(t.query == dim for t in fact.triangles if masked(t)):
                raise Deny(
                    "non_causal", "a softmax over queries: every row sees later ones", "normalise over keys"
                )
            lowered = _lowered(c, shown_above, dim)
            need_fixed(
                fact, dim, f"a softmax{lowered or ' whose later entries are not certified to be -inf'}"
            )
        t = known[0]
        shown = list(_kept_to_keys(shown, t))
        above = float("-inf") if "log" in c.name else 0.0
        triangles = [replace(t, above=above, diagonal=None)]
        c.conditions.append("scores with key > query are -inf")
    if c.name == "logsumexp":
        return Fact(dropped(c, Fact(tuple(shown)), dims))
    return Fact(tuple(shown), triangles=tuple(triangles))


def _far_below(c: Call, fact: Fact, key: int) -> list[Triangle]:
    """Triangles of finite numbers so low that no score these weights can give reaches them."""
    moving = [d for d, dim in enumerate(fact.dims) if not all(a.fixed for a in dim)]
    for query in moving:
        known = [t for t in fact.triangles if (t.query, t.key) == (query, key)]
        for t in known or ([Triangle(query, key, None)] if query != key else []):
            why = is_hidden(c.context.entry_sizes, c.arg("self"), t)
            if why is not None:
                c.conditions.append(why)
                return [t]
    return []


def _lowered(c: Call, triangles: Sequence[Triangle], key: int) -> str:
    """What is wrong with later keys that are lowered, but not enough; empty where none are."""
    scores = c.arg("self")
    masks = [c.context.fact(n) for n in scores.all_input_nodes if is_tensor(n) and not c.context.is_data(n)]
    beside = [t for f in masks if isinstance(f, Fact) for t in f.triangles]
    for t in (*(t for t in triangles if t.key == key), *beside):
        if is_number(t.above) and t.above == float("-inf"):
            return (
                " of rows that may be masked as a whole: nothing says that the entry on the diagonal is not"
            )
        if is_number(t.above) and not isinstance(t.above, bool) and t.above < -1:
            return (
                f" whose later entries are lowered by {-t.above:g}, which nothing bounds the others against "
                "(-inf or torch.finfo(dtype).min is low enough always; a norm before the projections bounds scores)"
            )
    return ""


@rule("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(c: Call) -> Fact:
    """Over the last dimensions, which must be features."""
    fact = c.fact("input")
    count = len(c.qs("normalized_shape"))
    _no_spectra(c, fact, [])
    for d in range(len(fact.dims) - count, len(fact.dims)):
        need_fixed(fact, d, "a normalisation")
    for key in ("weight", "bias"):
        if c.has(key):
            c.keep_rows(*c.fact(key).dims)
            if not all(a.fixed for a in c.fact(key).axes):
                raise Deny("unproved", "a normalisation whose weight follows the length")
    c.row_local = True
    dims = [tuple(filled(a) for a in d) for d in fact.dims]
    return Fact((*dims[: len(dims) - count], *(mixed(d) for d in dims[len(dims) - count :])))


@rule("group_norm", "instance_norm", "native_group_norm")
def group_norm(c: Call) -> Fact:
    """Over channels of a group and all that follows: only without a sequence axis there."""
    fact = c.fact("input")
    for d in range(1, len(fact.dims)):
        need_fixed(fact, d, "a normalisation over everything behind the channels")
    for key in ("weight", "bias"):
        if c.has(key):
            c.keep_rows(*c.fact(key).dims)
    c.row_local = True
    return Fact((fact.dims[0], *(mixed(d) for d in fact.dims[1:])))


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update")
def batch_norm(c: Call) -> Result:
    """In eval mode: a scale and shift a channel."""
    fact = c.fact("input")
    if c.arg("training") or (c.name == "batch_norm" and not c.has("running_mean")):
        raise Deny("mixes_positions", "batch normalisation over the current batch", "call model.eval()")
    _no_spectra(c, fact, [])
    c.row_local = True
    for key in ("weight", "bias", "running_mean", "running_var"):
        if c.has(key):
            c.keep_rows(*c.fact(key).dims)
    c.keep_rows(fact.dims[1])
    dims = tuple(tuple(filled(a) for a in d) for d in fact.dims)
    values = c.node.meta["val"]
    if isinstance(values, (list, tuple)):
        return [Fact(dims), *(Fact(((fixed(0),),)) for _ in values[1:])]
    return Fact(dims)


@rule("normalize", "cosine_similarity", "glu", "softmax_over_features")
def features(c: Call) -> Fact:
    """Maps over one feature dimension."""
    facts = [c.fact(n) for n in c.tensors()]
    fact = facts[0]
    dim = c.dim(c.number("dim", 1), len(fact.dims))
    for f in facts:
        need_fixed(f, dim, c.name)
        _no_spectra(c, f, [])
    c.row_local = True
    dims = [unite_dims([f.dims[i] for f in facts], "any", False) for i in range(len(fact.dims))]
    if c.name == "glu":
        dims[dim] = (fixed(c.out[dim]),)
    elif c.name == "cosine_similarity":
        del dims[dim]
    else:
        dims[dim] = mixed(dims[dim])
    return Fact(tuple(dims))


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", scales=False)
def scans(c: Call) -> Result:
    """Causal along a sequence axis that runs forward."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim"), len(fact.dims))
    _no_spectra(c, fact, [])
    axis = one(fact.dims[dim])
    if axis.fixed:
        c.row_local = True
        axis = fixed(axis.size)
    elif not axis.plain:
        raise Deny("non_causal", f"a running reduction over a sequence {axis}", "run it forward in time")
    else:
        axis = settle(filled(replace(axis, batch=False)))
        if not (constant(axis.lo) and np.all(np.asarray(axis.lo) >= 0)):
            raise Deny("misaligned", "a running reduction over shifted positions")
    others = [tuple(filled(a) for a in d) for d in fact.dims]
    dims = (*others[:dim], (axis,), *others[dim + 1 :])
    if c.name == "cumsum":
        entering, kept = c.arg("self").meta["val"].dtype, c.node.meta["val"].dtype
        if (
            not kept.is_floating_point or torch.promote_types(entering, kept) == kept
        ):  # else each entry is rounded
            c.note_linear([c.arg("self")])
        if is_number(fact.fill) and fact.fill == 0:
            return Fact(dims, fill=0)
    values = c.node.meta["val"]
    inside = fact.chunks if axis.fixed else ()  # along the places of a chunk, or features
    result = Fact(dims, chunks=inside)
    return [result for _ in values] if isinstance(values, (list, tuple)) else result


@rule("diff")
def difference(c: Call) -> Fact:
    """The step of an arithmetic progression that its prefix continues backwards: one number."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim", -1), len(fact.dims))
    form, before = fact.affine, c.fact("prepend") if c.has("prepend") else None
    whole = None if before is None else aligned(before, len(fact.dims))
    if form is None or before is None or whole is None or c.has("append") or c.number("n", 1) != 1:
        raise Deny("unproved", "differences of neighbours", "write them as x[:, 1:] - x[:, :-1]")
    step = form.coefficients[dim]
    others = [i for i in range(len(fact.dims)) if i != dim]
    continues = (
        is_one(before.dims[dim])
        and bool(np.all(np.equal(whole.offset, np.subtract(form.offset, step))))
        and all(whole.coefficients[i] == form.coefficients[i] for i in others)
    )
    if not continues:
        raise Deny("unproved", "differences of neighbours", "write them as x[:, 1:] - x[:, :-1]")
    return Fact(fact.dims, fill=step)


@rule("sort", "topk", "argsort", "msort", "kthvalue")
def ordering(c: Call) -> Result:
    """Over features only."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim", -1), len(fact.dims))
    need_fixed(fact, dim, f"{c.name}()")
    _no_spectra(c, fact, [])
    if c.arg("k") is not None:
        c.number("k")
    c.row_local = True
    values = c.node.meta["val"]
    shapes = [c.shape(v) for v in (values if isinstance(values, (list, tuple)) else [values])]
    dims = [tuple(filled(a) for a in d) for d in fact.dims]

    def result(shape: tuple) -> Fact:
        if len(shape) < len(dims):
            return Fact((*dims[:dim], *dims[dim + 1 :]))
        return Fact((*dims[:dim], (fixed(shape[dim]),), *dims[dim + 1 :]))

    return [result(s) for s in shapes] if isinstance(values, (list, tuple)) else result(shapes[0])


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter")
def scatter(c: Call) -> Fact:
    """Writes along a feature dimension; rows stay rows."""
    fact = c.fact("self")
    if c.name == "masked_scatter":
        raise Deny("data_dependent", "masked_scatter places values by counting a mask")
    dim = c.dim(c.number("dim"), len(fact.dims))
    need_fixed(fact, dim, f"{c.name}()")
    facts = [c.fact(n) for n in c.tensors()]
    if c.name.startswith("index"):
        if not all(a.fixed for f in facts for a in f.axes):
            raise Deny("unproved", f"{c.name} into a value with a sequence axis")
        return Fact(tuple(mixed(d) for d in fact.dims))
    dims: list[Dim] = []
    for i in range(len(fact.dims)):
        if i == dim:
            for f in facts:
                need_fixed(f, i, f"{c.name}()")
            dims.append(mixed(fact.dims[i]))
        else:
            dims.append(unite_dims([f.dims[i] for f in facts], "any", False))
    c.row_local = True
    return Fact(tuple(dims))
