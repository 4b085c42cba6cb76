"""Contractions: einsum and what is one. A sum over positions needs zeros above the diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from fi_compile.facts import (
    JUNK,
    OPEN,
    Deny,
    Fact,
    Quantity,
    Triangle,
    filled,
    is_number,
    least,
    plus,
    tidy_scale,
)

from . import chunks
from .call import Call, is_one, one, rule
from .masks import is_hidden_by
from .pointwise import broadcast, unite_dims, varies
from .triangles import VERY_LOW


def contracted(
    c: Call,
    nodes: Sequence[fx.Node],
    facts: Sequence[Fact],
    letters: Sequence[Sequence[str]],
    out: Sequence[str],
) -> Fact:
    """Σ over the letters not in ``out`` of the product of all operands."""
    for fact in facts:
        if any(is_number(t.above) and t.above <= VERY_LOW for t in fact.triangles):
            raise Deny("unproved", "multiplies by masked scores: 0 times infinity", "mask before a softmax")
    where: dict[str, list[tuple[int, int]]] = {}
    for i, names in enumerate(letters):
        for d, name in enumerate(names):
            where.setdefault(name, []).append((i, d))
    bound, strict = _bounds(facts, letters), _strict(facts, letters)
    dims = {name: unite_dims([facts[i].dims[d] for i, d in where[name]], "product", False) for name in out}
    limits: dict[str, Quantity] = {}
    for name, places in where.items():
        if name in out:
            continue
        shown = [facts[i].dims[d] for i, d in places]
        c.keep_rows(*shown)
        wide = [dim for dim in shown if not is_one(dim)]
        if all(a.fixed for dim in wide for a in dim):
            continue
        if any(a.freq or a.period is not None for dim in wide for a in dim):
            raise Deny("spectrum", "sums over the frequencies of a spectrum")
        query = next((q for q in sorted(_queries(name, bound)) if q in out), None)
        if query is None:
            raise Deny(
                "non_causal",
                "sums over all positions, and nothing certifies that later ones are masked",
                "mask the scores with 0 (or -inf before a softmax) where key > query",
            )
        for dim in wide:
            axis = one(dim)
            if not axis.plain:
                raise Deny("misaligned", f"sums over positions of values that are {axis}")
            valid = plus(axis.valid, 1) if (name, query) in strict else axis.valid
            limits[query] = least(limits.get(query, valid), valid)
        c.conditions.append(f"entries with {name} > {query} are exactly 0")
    for fact in facts:
        if fact.junk:
            raise Deny("unproved", "uses entries that are certified only below a diagonal")
    for name, limit in limits.items():
        axis = one(dims[name])
        dims[name] = (replace(axis, valid=least(axis.valid, limit)),)
    scale: Any = 1.0
    for fact in facts:
        scale = np.multiply(scale, fact.scale)
    contracted_letters = [n for n in where if n not in out]
    _note(c, nodes, facts, letters, contracted_letters, out)
    above = {name: _queries(name, bound) for name in contracted_letters}
    kept = chunks.summed(facts, letters, out, above)
    return Fact(tuple(dims[n] for n in out), tidy_scale(scale), _triangles(bound, out), chunks=kept)


def _bounds(facts: Sequence[Fact], letters: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """key letter → query letters it cannot exceed where the product is nonzero."""
    bound: dict[str, set[str]] = {}
    for fact, names in zip(facts, letters, strict=True):
        for t in fact.triangles:
            if t.above is not JUNK and is_number(t.above) and t.above == 0:
                bound.setdefault(names[t.key], set()).add(names[t.query])
    return bound


def _strict(facts: Sequence[Fact], letters: Sequence[Sequence[str]]) -> set[tuple[str, str]]:
    """Pairs of a key and a query letter: the key is before the query where the product is nonzero."""
    return {
        (names[t.key], names[t.query])
        for fact, names in zip(facts, letters, strict=True)
        for t in fact.triangles
        if is_number(t.above) and t.above == 0 and is_number(t.diagonal) and t.diagonal == 0
    }


def _queries(name: str, bound: dict[str, set[str]]) -> set[str]:
    """All letters that bound a key letter, directly or through others."""
    seen, todo = {name}, [name]
    while todo:
        for query in bound.get(todo.pop(), set()) - seen:
            seen.add(query)
            todo.append(query)
    return seen - {name}


def _triangles(bound: dict[str, set[str]], out: Sequence[str]) -> tuple[Triangle, ...]:
    return tuple(
        Triangle(list(out).index(query), k, 0)
        for k, key in enumerate(out)
        for query in sorted(_queries(key, bound))
        if query in out
    )


def _note(
    c: Call,
    nodes: Sequence[fx.Node],
    facts: Sequence[Fact],
    letters: Sequence[Sequence[str]],
    summed: Sequence[str],
    out: Sequence[str],
) -> None:
    moving = [{names[d] for d in varies(f, len(f.dims))} for f, names in zip(facts, letters, strict=True)]
    for i, node in enumerate(nodes):
        if list(nodes).count(node) > 1:
            continue
        others: set[str] = set().union(*(m for j, m in enumerate(moving) if j != i), set())
        spectral = {
            names[d] for f, names in zip(facts, letters, strict=True) for d, dim in enumerate(f.dims)
            if any(a.freq for a in dim)
        }  # fmt: skip
        clash = (moving[i] & others) - spectral
        c.note_linear([node], invariant=not clash and not (moving[i] & set(summed)))
    c.row_local = not any(m & set(summed) for m in moving) and not any(
        len(m - set(summed)) > 1 and len(nodes) < 2 for m in moving
    )
    if any(a.freq or a.period is not None for f in facts for a in f.axes):
        c.row_local = False


@rule("einsum", scales=True, junk=True)
def einsum(c: Call) -> Fact:
    """torch.einsum."""
    equation = str(c.arg("equation")).replace(" ", "")
    nodes = list(c.arg("tensors"))
    facts = [c.fact(n) for n in nodes]
    left, arrow, right = equation.partition("->")
    letters = [_spread(part, len(f.dims)) for part, f in zip(left.split(","), facts, strict=True)]
    rank = max([sum(x.startswith(".") for x in names) for names in letters])
    if not arrow:
        flat = [x for names in letters for x in names]
        right = "..." * ("..." in left) + "".join(
            sorted(x for x in set(flat) if flat.count(x) == 1 and len(x) == 1)
        )
    out = _spread(right, rank + len(right.replace("...", "")) if "..." in right else len(right))
    for names in letters:
        if len(set(names)) < len(names):
            raise Deny("unproved", "an einsum that takes a diagonal")
    return contracted(c, nodes, facts, letters, out)


def _spread(part: str, rank: int) -> list[str]:
    """One name a dimension; the dots become .k, .k-1, … .1, aligned at the right."""
    head, dots, tail = part.partition("...")
    missing = rank - len(head) - len(tail)
    middle = [f".{i}" for i in range(missing, 0, -1)] if dots else []
    return [*head, *middle, *tail]


def matmul_letters(a: int, b: int) -> tuple[list[str], list[str], list[str]]:
    """The einsum letters of a matrix product of operands of rank ``a`` and ``b``."""
    outer = max(a, b) - 2
    left = [f".{i}" for i in range(a - 2, 0, -1)] + (["m"] if a > 1 else []) + ["k"]
    right = [f".{i}" for i in range(b - 2, 0, -1)] + ["k"] + (["n"] if b > 1 else [])
    out = [f".{i}" for i in range(outer, 0, -1)] + (["m"] if a > 1 else []) + (["n"] if b > 1 else [])
    return left, right, out


@rule("matmul", "mm", "bmm", "mv", "dot", scales=True, junk=True)
def matmul(c: Call) -> Fact:
    """Matrix products."""
    nodes = [c.node.args[0], c.node.args[1]]
    a, b = (c.fact(n) for n in nodes)
    left, right, out = matmul_letters(len(a.dims), len(b.dims))
    return contracted(c, nodes, [a, b], [left, right], out)  # type: ignore[arg-type]


@rule("linear", "addmm", "baddbmm", "outer", "ger", scales=True, junk=True)
def linear(c: Call) -> Fact:
    """x Wᵀ + bias, bias + a b, a ⊗ b."""
    if c.name == "linear":
        x, w, bias = c.arg("input"), c.arg("weight"), c.arg("bias")
        rank = len(c.fact(x).dims)
        names = [f".{i}" for i in range(rank - 1, 0, -1)]
        letters, out = [[*names, "k"], ["n", "k"]], [*names, "n"]
    elif c.name in ("outer", "ger"):
        x, w, bias = c.arg("self"), c.arg("vec2"), None
        letters, out = [["m"], ["n"]], ["m", "n"]
    else:
        x, w = (c.arg(k) for k in (("mat1", "mat2") if c.name == "addmm" else ("batch1", "batch2")))
        bias = c.arg("self")
        left, right, out = matmul_letters(len(c.fact(x).dims), len(c.fact(w).dims))
        letters = [left, right]
        for key in ("alpha", "beta"):
            c.number(key, 1)
    fact = contracted(c, [x, w], [c.fact(x), c.fact(w)], letters, out)
    if isinstance(bias, fx.Node):
        if fact.scaled or c.fact(bias).scaled:
            raise Deny("length_as_value", "adds a bias to a value that carries a factor of the length")
        rank = len(fact.dims)
        added = c.fact(bias)
        missing = rank - len(added.dims)
        dims = [
            unite_dims([dim, added.dims[i - missing]], "linear", False)
            if i >= missing
            else unite_dims([dim], "linear", True)
            for i, dim in enumerate(fact.dims)
        ]
        c.affine_groups += [frozenset([n]) for n in (x, w) if c.linear]
        c.linear = [frozenset([bias, n]) for n in (x, w)]
        return Fact(tuple(dims))
    return fact


@rule("tensordot", scales=True, junk=True)
def tensordot(c: Call) -> Fact:
    """Contraction over listed dimensions."""
    a, b = c.fact("self"), c.fact("other")
    left = [f"a{i}" for i in range(len(a.dims))]
    right = [f"b{i}" for i in range(len(b.dims))]
    for i, j in zip(c.arg("dims_self"), c.arg("dims_other"), strict=True):
        right[c.dim(j, len(right))] = left[c.dim(i, len(left))]
    out = [x for x in left if x not in right] + [x for x in right if x not in left]
    return contracted(c, [c.arg("self"), c.arg("other")], [a, b], [left, right], out)


@rule("scaled_dot_product_attention")
def attention(c: Call) -> Fact:
    """softmax(q kᵀ + mask) v: causal by flag, or by a mask certified above its diagonal."""
    q, k, v = (c.fact(n) for n in ("query", "key", "value"))
    if c.number("dropout_p", 0.0):
        raise Deny("random", "attention with dropout", "call model.eval()")
    for fact, dim in ((q, -1), (k, -1), (v, -1)):
        if not all(a.fixed for a in fact.dims[dim]):
            raise Deny("mixes_positions", "attention whose feature dimension follows the length")
    queries, keys, values = one(q.dims[-2]), one(k.dims[-2]), one(v.dims[-2])
    mask = c.fact("attn_mask") if c.has("attn_mask") else None
    heads = [f.dims[:-2] for f in (q, k, v)]
    c.keep_rows(q.dims[-1], k.dims[-1], k.dims[-2], v.dims[-2])
    if mask is not None:
        c.keep_rows(mask.dims[-1])
    if c.arg("enable_gqa"):
        heads = [h[:-1] for h in heads]
    if mask is not None:
        outer = mask.dims[:-2] if not c.arg("enable_gqa") else mask.dims[:-3]
        heads = [*heads, outer]
    rank = max(len(h) for h in heads)
    dims = broadcast([Fact(h) for h in heads], "any") if rank else ()
    if c.arg("enable_gqa"):
        dims = (*dims, q.dims[-3])
    if keys.fixed and values.fixed and mask is None and not c.arg("is_causal"):
        c.row_local = True
        return Fact((*dims, q.dims[-2], v.dims[-1]))
    if not (queries.plain and keys.plain and values.plain):
        raise Deny("misaligned", f"attention of queries {queries}, keys {keys}, values {values}")
    valid = least(queries.valid, keys.valid, values.valid)
    if not c.arg("is_causal"):
        if mask is None:
            raise Deny(
                "non_causal",
                "attention without a mask: every position sees later ones",
                "pass is_causal=True",
            )
        known = [t for t in mask.triangles if (t.query, t.key) == (len(mask.dims) - 2, len(mask.dims) - 1)]
        far = None
        if known and not masked(known[0]):
            scale = c.arg("scale")
            if scale is None:
                scale = c.arg("query").meta["val"].shape[-1] ** -0.5
            if isinstance(scale, float):
                far = is_hidden_by(
                    c.context.entry_sizes, c.arg("attn_mask"), c.arg("query"), c.arg("key"), scale
                )
            c.conditions += [far] if far is not None else []
        if far is None and (not known or not masked(known[0])):
            raise Deny(
                "non_causal",
                "the attention mask is not certified to hide every later position",
                "use is_causal",
            )
        rows, columns = one(mask.dims[-2]), one(mask.dims[-1])
        if not (rows.plain and columns.plain):
            raise Deny("misaligned", "an attention mask whose rows are shifted")
        valid = least(valid, rows.valid, columns.valid)
    c.conditions.append("every weight of a later key is exactly 0")
    return Fact((*dims, (replace(queries, valid=valid),), v.dims[-1]))


@rule("linalg_solve_triangular")
def solve_triangular(c: Call) -> Fact:
    """X with A X = B: each row from the rows so far of a lower triangle, of which the rest is never read."""
    a, b = c.fact("self"), c.fact("B")
    left, upper = bool(c.arg("left", True)), bool(c.arg("upper"))
    rows, columns = a.dims[-2], a.dims[-1]
    c.note_linear([c.arg("B")], invariant=False)
    apart, along = (b.dims[-1], b.dims[-2]) if left else (b.dims[-2], b.dims[-1])
    outer = broadcast([Fact(a.dims[:-2]), Fact(b.dims[:-2])], "any") if len(b.dims) > 2 else ()
    other = tuple(filled(x) for x in apart)
    c.keep_rows(rows, columns, along)
    if all(x.fixed for dim in (rows, columns, along) for x in dim):
        c.row_local = True
        solved = tuple(filled(x) for x in along)
    else:
        if upper is left:
            raise Deny(
                "non_causal", "solves from the last position backwards", "solve with the lower triangle"
            )
        axes = [one(dim) for dim in (rows, columns, along)]
        if not all(x.plain for x in axes):
            raise Deny("misaligned", "solves for positions of values that are shifted")
        c.conditions.append("only entries with column ≤ row are read")
        solved = (replace(filled(axes[2]), valid=least(*(x.valid for x in axes))),)
    return Fact((*outer, solved, other) if left else (*outer, other, solved))


def masked(triangle: Triangle) -> bool:
    """Whether a softmax gives entries above the diagonal exactly no weight."""
    above, diagonal = triangle.above, triangle.diagonal
    if above is JUNK or above is None or diagonal is JUNK:
        return False
    # A row that is masked as a whole would spread over all positions: its diagonal must be open.
    if isinstance(above, bool):
        return above is False and diagonal is True
    return above <= VERY_LOW and (diagonal is OPEN or (is_number(diagonal) and diagonal > 0.1 * VERY_LOW))
