"""Elementwise operators: a table of names, and one function that unites the axes of the operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fi_compile.facts import (
    Affine,
    Axis,
    Deny,
    Dim,
    Fact,
    Quantity,
    constant,
    fixed,
    is_number,
    plus,
    same,
    sequence,
    settle,
    tidy,
    tidy_scale,
    united,
)
from fi_compile.program import is_integer, operator_name

from . import affine as index
from . import chunks
from .call import Call, is_one, rule
from .erased import as_shown
from .triangles import combined, evaluated

# f linear; f(0) = 0; any f of any number of operands.
UNARY_LINEAR = (
    "neg", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh", "real",
    "view_as_real", "positive", "_to_copy", "to", "_unsafe_view_copy", "dropout", "feature_dropout",
    "alpha_dropout", "native_dropout_eval",
)  # fmt: skip
COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "_to_copy", "to")
UNARY_ZERO = (
    "abs", "relu", "gelu", "silu", "tanh", "sin", "sinh", "asin", "asinh", "atan", "atanh", "tan", "erf",
    "sqrt", "square", "sgn", "sign", "round", "floor", "ceil", "trunc", "frac", "expm1", "log1p",
    "leaky_relu", "elu", "celu", "selu", "mish", "hardtanh", "relu6", "hardswish", "softshrink",
    "hardshrink", "tanhshrink", "softsign", "nan_to_num", "imag", "angle", "deg2rad", "rad2deg", "prelu",
)  # fmt: skip
UNARY_ANY = (
    "exp", "exp2", "log", "log2", "log10", "cos", "cosh", "acos", "acosh", "sigmoid", "log_sigmoid",
    "softplus", "hardsigmoid", "rsqrt", "reciprocal", "erfc", "erfinv", "lgamma", "digamma", "logical_not",
    "bitwise_not", "isnan", "isinf", "isfinite", "threshold", "logit", "special_expit", "signbit", "sinc",
    "special_entr", "special_erf", "special_log1p", "special_expm1", "polar", "complex", "eq", "ne", "lt",
    "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or",
    "bitwise_xor", "__and__", "__or__", "__xor__", "pow", "float_power", "maximum", "minimum", "fmax",
    "fmin", "clamp", "clamp_min", "clamp_max", "atan2", "remainder", "fmod", "floor_divide",
    "bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__", "where", "masked_fill", "lerp",
    "addcmul", "addcdiv", "hypot", "xlogy", "logaddexp", "logaddexp2", "heaviside", "ldexp", "copysign",
    "isclose", "square_",
)  # fmt: skip


def unite_dims(dims: Sequence[Dim], how: str, partial: bool, out: Quantity | None = None) -> Dim:
    """One dimension of an elementwise result; operands of size 1 broadcast."""
    wide = [d for d in dims if not is_one(d)]
    if not wide:
        return (fixed(1, batch=any(a.batch for d in dims for a in d)),) if dims else (fixed(1),)
    partial = partial or len(wide) < len(dims)
    if any(len(d) != len(wide[0]) for d in wide):
        raise Deny("merged", "combines values that merge positions with other dimensions differently")
    for d in wide[1:]:
        if any(not same(a.size, b.size) for a, b in zip(d, wide[0], strict=True)):
            raise Deny("merged", "combines values that merge dimensions of different sizes")
    if len(wide[0]) > 1 and any(not a.plain for d in wide for a in d):
        raise Deny("merged", "combines merged dimensions that are not plain positions")
    return tuple(united([d[i] for d in wide], how, partial) for i in range(len(wide[0])))


def broadcast(facts: Sequence[Fact], how: str, partial: bool = False) -> tuple[Dim, ...]:
    """The dimensions of an elementwise result of operands aligned at the right."""
    rank = max((len(f.dims) for f in facts), default=0)
    dims = []
    for i in range(rank):
        shown = [f.dims[i - rank + len(f.dims)] for f in facts if i - rank + len(f.dims) >= 0]
        dims.append(unite_dims(shown, how, partial or len(shown) < len(facts)))
    return tuple(dims)


def varies(fact: Fact, rank: int) -> set[int]:
    """Dimensions of the result along which an operand has a sequence axis or a spectrum."""
    missing = rank - len(fact.dims)
    return {
        i + missing
        for i, dim in enumerate(fact.dims)
        if not is_one(dim) and any(not a.fixed or a.freq for a in dim)
    }


def invariant(nodes: Sequence[fx.Node], facts: Sequence[Fact], rank: int) -> list[frozenset[fx.Node]]:
    """The operands in which a product also commutes with shifts: the others do not vary along their axes."""
    groups = []
    for i, node in enumerate(nodes):
        mine = varies(facts[i], rank)
        clash = False
        for j, other in enumerate(facts):
            if j == i:
                continue
            for d in mine & varies(other, rank):
                dim = facts[i].dims[d - rank + len(facts[i].dims)]
                clash = clash or not any(a.freq for a in dim)
        if not clash:
            groups.append(frozenset([node]))
    return groups


def finish(c: Call, dims: tuple[Dim, ...], scale: Any = 1.0, affine: Affine | None = None) -> Fact:
    """The result of an elementwise operator, with what is known of triangles and uniform values."""
    c.row_local = c.by_entry = True
    facts = {n: c.fact(n) for n in c.tensors()}
    triangles = combined(c, len(dims))
    fill = None
    if (
        facts
        and all(is_number(f.fill) for f in facts.values())
        and not any(map(is_integer, c.node.all_input_nodes))
    ):
        fill = evaluated(c, {n: f.fill for n, f in facts.items()})
    complex_operand = any(c.is_complex(n) and not any(a.freq for a in f.axes) for n, f in facts.items())
    complex_number = any(isinstance(a, complex) for a in c.arguments.values())
    if (complex_operand or complex_number) and any(a.freq for d in dims for a in d):
        dims = tuple(tuple(replace(a, real=False) if a.freq else a for a in d) for d in dims)
    shown = chunks.aligned(list(facts.values()), len(dims))
    return Fact(dims, scale, triangles, affine=affine, fill=fill, chunks=shown)


@rule(*UNARY_LINEAR, scales=True, junk=True)
def linear_unary(c: Call) -> Fact:
    """f(x) with f linear: a cast, a copy, a sign."""
    node = c.tensors()[0]
    fact = c.fact(node)
    if c.name in ("dropout", "feature_dropout", "alpha_dropout") and c.arg("train") and c.arg("p"):
        raise Deny("random", "dropout in training mode", "call model.eval()")
    source, target = node.meta["val"].dtype, c.node.meta["val"].dtype
    linear = (target.is_floating_point or target.is_complex) or target == source
    spectrum = any(a.freq for a in fact.axes)
    halved = c.name == "real" or (source.is_complex and not target.is_complex)
    if halved and not all(a.fixed for a in fact.axes if a.freq):
        raise Deny("spectrum", "takes the real part of a spectrum", "take it after the inverse transform")
    if not linear and fact.scaled:
        raise Deny("length_as_value", "rounds a value that carries a factor of the length")
    dims = broadcast([fact], "linear" if linear else "zero")
    if spectrum and source.is_complex and not target.is_complex:
        dims = tuple(tuple(fixed(a.size, a.batch) if a.freq else a for a in d) for d in dims)
    if c.name == "view_as_real":
        dims = (*dims, (fixed(2),))
        if spectrum or fact.junk:
            raise Deny("spectrum", "splits a spectrum into real and imaginary part")
        c.note_linear([node])
        c.row_local = True
        return Fact(dims, fact.scale)
    if linear:
        c.note_linear([node])
    form = fact.affine
    if c.name == "neg" and form is not None:
        form = index.scaled(form, -1)
    elif c.name != "neg" and (c.name == "real" or (source.is_floating_point and not whole(form, target))):
        form = None
    result = finish(c, dims, fact.scale, form)
    view = fact.view if c.name in COPIES and source == target else None
    return replace(result, dims=dims, scale=fact.scale, affine=form, bounds=_bounds(c, fact), view=view)


def whole(form: Affine | None, target: torch.dtype) -> bool:
    """Whether a cast of these numbers truncates nothing."""
    if form is None or target.is_floating_point:
        return True
    values = [np.asarray(v, dtype=np.float64) for v in (*form.coefficients, form.offset)]
    return all(bool((v == np.rint(v)).all()) for v in values)


def _bounds(c: Call, fact: Fact) -> Any:
    if c.name == "neg" and fact.bounds is not None:
        return tidy(-np.asarray(fact.bounds[1])), tidy(-np.asarray(fact.bounds[0]))
    return fact.bounds


@rule("type_as", "expand_as_copy", scales=True, junk=True)
def type_as(c: Call) -> Fact:
    """x.type_as(y): y lends its type only."""
    fact = c.fact("self")
    c.note_linear([c.arg("self")])
    c.note_ignored(c.arg("self"), c.arg("other"))
    c.row_local = True
    return Fact(fact.dims, fact.scale, fact.triangles, fill=fact.fill, chunks=fact.chunks)


@rule("view_as_complex", scales=True)
def view_as_complex(c: Call) -> Fact:
    """[..., 2] real to complex."""
    fact = c.fact("self")
    c.note_linear([c.arg("self")])
    c.row_local = True
    return Fact(fact.dims[:-1], fact.scale)


def elementwise(c: Call, how: str) -> Fact:
    """A non-linear map of all tensor operands."""
    facts = [c.fact(n) for n in c.tensors()]
    return finish(c, broadcast(facts, how))


@rule(*UNARY_ZERO, junk=True)
def zero_preserving(c: Call) -> Fact:
    """f(0) = 0."""
    if c.name in ("nan_to_num", "prelu"):
        return elementwise(c, "any")
    if c.name == "imag":
        c.note_linear([c.arg("self")])
    result = elementwise(c, "zero")
    known = value_bounds(c.fact("self")) if c.name == "abs" else None
    if known is not None:
        low, high = np.abs(known[0]), np.abs(known[1])
        straddles = np.less(known[0], 0) & np.greater(known[1], 0)
        least = np.where(straddles, 0, np.minimum(low, high))
        return replace(result, bounds=(tidy(least), tidy(np.maximum(low, high))))
    return result


@rule(
    *(
        n
        for n in UNARY_ANY
        if n not in ("where", "masked_fill", *index.DECIDE, "clamp", "clamp_min", "clamp_max")
    ),
    junk=True,
)
def any_map(c: Call) -> Fact:
    """Any elementwise map."""
    return elementwise(c, "any")


@rule(*index.DECIDE, junk=True)
def compare(c: Call) -> Fact:
    """Comparisons: those of affine index tensors are decided above and on the diagonals."""
    facts = [c.fact(n) for n in c.tensors()]
    result = finish(c, broadcast(facts, "any"))
    rank = len(result.dims)
    a, b = (_affine(c, name, rank) for name in ("self", "other"))
    sizes = [_total(d) for d in result.dims]
    common = _common(c)
    if a is None or b is None or not all(index.exact(form, sizes, common) for form in (a, b)):
        return result
    triangles = index.compared(c.name, index.combine(a, b, -1), sizes)
    return Fact(result.dims, triangles=triangles, fill=result.fill)


def _common(c: Call) -> torch.dtype:
    """The type two operands of a comparison are brought to."""
    shown = [c.arg(k) for k in ("self", "other")]
    values: list[Any] = [v.meta["val"] if isinstance(v, fx.Node) and not is_integer(v) else v for v in shown]
    values = [0 if isinstance(v, fx.Node) else v for v in values]
    return torch.result_type(
        *(
            torch.empty(v.shape if v.dim() == 0 else 1, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
            for v in values
        )
    )


def _total(dim: Dim) -> Quantity:
    total: Quantity = 1
    for axis in dim:
        total = tidy(np.multiply(total, axis.size))
    return total


def _affine(c: Call, name: str, rank: int) -> Affine | None:
    value = c.arg(name)
    if isinstance(value, fx.Node) and not is_integer(value):
        return index.aligned(c.fact(value), rank)
    return Affine((0,) * rank, value) if is_number(value) else None


@rule("clamp", "clamp_min", "clamp_max", junk=True)
def clamp(c: Call) -> Fact:
    """Clamping keeps track of the range of index tensors."""
    facts = [c.fact(n) for n in c.tensors()]
    result = finish(c, broadcast(facts, "any"))
    known = value_bounds(facts[0])
    low, high = c.arg("min"), c.arg("max")
    if known is None or not all(v is None or isinstance(v, int) for v in (low, high)):
        return result
    least, most = known
    if low is not None:
        least, most = np.maximum(least, int(low)), np.maximum(most, int(low))
    if high is not None:
        least, most = np.minimum(least, int(high)), np.minimum(most, int(high))
    return replace(result, bounds=(tidy(np.asarray(least)), tidy(np.asarray(most))), affine=None, fill=None)


def value_bounds(fact: Fact) -> tuple[Any, Any] | None:
    """Least and greatest value of an integer tensor, where known."""
    if fact.bounds is not None:
        return fact.bounds
    if fact.affine is not None:
        return index.bounds(fact.affine, [_total(d) for d in fact.dims])
    if isinstance(fact.fill, int):
        return fact.fill, fact.fill
    return None


@rule("where", scales=True, junk=True)
def where(c: Call) -> Fact:
    """A selection; with a 0/False branch it is linear in the other."""
    nodes = [n for n in (c.arg("self"), c.arg("other")) if isinstance(n, fx.Node)]
    chosen = c.arg("condition")
    hidden = {c.arg("self"): [(chosen, torch.logical_not)], c.arg("other"): [(chosen, torch.Tensor.bool)]}
    if c.arg("self") is c.arg("other"):
        hidden = {}
    facts = [as_shown(c, n, hidden.get(n, [])) for n in c.tensors()]
    branches = [c.fact(n) for n in nodes]
    scale: Any = branches[0].scale if branches else 1.0
    if any(f.scaled for f in facts):
        if c.fact("condition").scaled or not all(same(f.scale, scale) or f.fill == 0 for f in branches):
            raise Deny("length_as_value", "selects between values with different factors of the length")
        scale = next(f.scale for f in branches if f.scaled)
    c.note_linear(nodes, *([n] for n in nodes if _only(n, nodes, branches)), invariant=False)
    return finish(c, broadcast(facts, "any"), scale)


def _only(node: fx.Node, nodes: list[fx.Node], facts: list[Fact]) -> bool:
    """Whether a selection is linear in one branch: the other one is zero."""
    return len(nodes) > 1 and all(f.fill == 0 for n, f in zip(nodes, facts, strict=True) if n is not node)


@rule("masked_fill", scales=True, junk=True)
def masked_fill(c: Call) -> Fact:
    """x with a value where the mask is set."""
    mask = (c.arg("mask"), torch.Tensor.bool)
    facts = [as_shown(c, n, [mask] if n is c.arg("self") else []) for n in c.tensors()]
    value = c.arg("value")
    zero = (c.fact(value).fill if isinstance(value, fx.Node) else value) == 0
    scale = c.fact("self").scale
    if c.fact("self").scaled and not zero:
        raise Deny("length_as_value", "fills a value that carries a factor of the length")
    if zero:
        c.note_linear([c.arg("self")], invariant=False)
    else:
        c.affine_groups.append(frozenset({c.arg("self")}))
    return finish(c, broadcast(facts, "any"), scale)


@rule("add", "sub", "rsub", scales=True, junk=True)
def add(c: Call) -> Fact:
    """a ± alpha·b; a length may be added to index arithmetic only."""
    nodes = c.tensors()
    facts = [c.fact(n) for n in nodes]
    rank = max(len(f.dims) for f in facts)
    length = next((v for v in c.arguments.values() if isinstance(v, fx.Node) and is_integer(v)), None)
    alpha = c.arg("alpha", 1)
    if isinstance(alpha, fx.Node) or (alpha != 1 and c.name == "rsub"):
        raise Deny("unproved", "a factor inside of a sum", "write it as a product")
    first = -1 if c.name == "rsub" else 1
    second = (alpha if c.name == "add" else -alpha) * (1 if first == 1 else -1)
    if isinstance(length, fx.Node):
        value = c.scalar(length)
        if isinstance(value, np.ndarray):
            return _shifted_by_length(
                c, facts[0], value, first if length is c.arg("other") else second, length
            )
        number = value != 0
    else:
        number = any(is_number(c.arg(k)) and c.arg(k) != 0 for k in ("self", "other"))
    scale = next((f.scale for f in facts if f.scaled), 1.0)
    if isinstance(scale, np.ndarray) and (
        number or not all(same(f.scale, scale) or f.fill == 0 for f in facts)
    ):
        raise Deny("length_as_value", "adds values that carry different factors of the length")
    facts_in = [f for f in facts if f.fill != 0] or facts[:1]
    partial = number or any(0 < len(f.dims) < rank for f in facts_in)
    dims = (
        broadcast(facts, "linear", partial) if len(facts_in) == len(facts) else _beside_zero(facts, facts_in)
    )
    c.note_linear(nodes)
    if number:
        c.linear.clear()
        c.invariant.clear()
        c.affine_groups.append(frozenset(nodes))
    a, b = (_affine(c, name, rank) for name in ("self", "other"))
    form = None
    if a is not None and b is not None:
        form = index.combine(index.scaled(a, first), b, second if first == 1 else 1)
    return finish(c, _exclusive(c, dims), scale, form)


def _exclusive(c: Call, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """A running sum less its newest term knows one row more than its terms do."""
    total, term = c.arg("self"), c.arg("other")
    if c.name != "sub" or c.arg("alpha", 1) != 1 or not isinstance(total, fx.Node):
        return dims
    if operator_name(total.target) != "cumsum" or total.args[0] is not term or total.kwargs.get("dtype"):
        return dims
    along = total.kwargs.get("dim", total.args[1] if len(total.args) > 1 else None)
    if not isinstance(along, int) or len(dims[along]) != 1 or not dims[along][0].plain:
        return dims
    axis, place = dims[along][0], along % len(dims)
    more = replace(axis, valid=plus(axis.valid, 1))
    return (*dims[:place], (more,), *dims[place + 1 :])


def _beside_zero(facts: list[Fact], moving: list[Fact]) -> tuple[Dim, ...]:
    """A sum with zeros: the zeros add nothing, but may broadcast."""
    try:
        dims = broadcast(moving, "linear")
        full = broadcast(facts, "any")
        return (
            dims
            if len(dims) == len(full)
            and all(same(_total(a), _total(b)) for a, b in zip(dims, full, strict=True))
            else full
        )
    except Deny:
        return broadcast(facts, "any")


def _shifted_by_length(c: Call, fact: Fact, value: np.ndarray, sign: float, length: fx.Node) -> Fact:
    """``value + sign * index``: with sign -1 the positions are counted from the end."""
    form = fact.affine
    if c.name == "sub" and length is c.arg("other"):
        value = -value
    if c.name == "rsub" and length is c.arg("self"):
        value = -value
    follows = [i for i, d in enumerate(fact.dims) if not all(a.fixed for a in d)]
    if form is None or len(follows) != 1 or len(fact.dims[follows[0]]) != 1:
        raise Deny(
            "length_as_value", "adds the sequence length to a value", "values may not follow the length"
        )
    (dim,) = follows
    coefficient = form.coefficients[dim] * sign
    others = [x for i, x in enumerate(form.coefficients) if i != dim]
    if coefficient not in (1, -1) or any(others) or not isinstance(form.offset, (int, float)):
        raise Deny(
            "length_as_value", "adds the sequence length to a value", "values may not follow the length"
        )
    offset = tidy((value + sign * form.offset).astype(np.int64))
    axis = counted(fact.dims[dim][0].size, int(coefficient), offset)
    c.row_local = False
    dims = (*fact.dims[:dim], (axis,), *fact.dims[dim + 1 :])
    form = Affine(tuple(x * sign for x in form.coefficients), offset)
    if not index.exact(form, [_total(d) for d in dims], c.node.meta["val"].dtype):
        raise Deny("length_as_value", "counts from the end in a type that does not hold every position")
    return Fact(dims, affine=form)


def counted(size: Quantity, step: int, offset: Quantity) -> Axis:
    """The axis of values ``offset + step * index`` (step ±1), read as contents c(t) = t."""
    if step == 1 and constant(offset):
        return fixed(size) if constant(size) else sequence(size)
    stop = np.add(offset, np.multiply(step, np.subtract(size, 1)))
    lo, hi = tidy(np.minimum(offset, stop)), tidy(np.maximum(offset, stop))
    valid = tidy(np.add(hi, 1)) if constant(lo) else int(np.min(lo))
    shift = tidy(-np.asarray(offset)) if step == 1 else offset
    return settle(Axis(size, valid, lo, hi, sign=step, shift=shift))


@rule("mul", scales=True, junk=True)
def mul(c: Call) -> Fact:
    """A product: of spectra a convolution, of values elementwise; a length becomes a scale."""
    nodes = c.tensors()
    facts = [as_shown(c, n, [(m, lambda v: v == 0) for m in nodes if m is not n]) for n in nodes]
    if len(nodes) == 1 and all(
        isinstance(c.arg(k), fx.Node) and not is_integer(c.arg(k)) for k in ("self", "other")
    ):
        facts = facts * 2  # x * x
    scale: Any = 1.0
    factor = 1.0
    for f in facts:
        scale = np.multiply(scale, f.scale)
    for key in ("self", "other"):
        value = c.arg(key)
        if not isinstance(value, fx.Node) or is_integer(value):
            factor = c.scalar(value)
            if isinstance(factor, np.ndarray):
                scale, factor = np.multiply(scale, factor), None
    rank = max(len(f.dims) for f in facts)
    dims = broadcast(facts, "product")
    if len(facts) == len(nodes):
        groups = invariant(nodes, facts, rank)
        c.note_linear(*([n] for n in nodes), invariant=False)
        c.invariant.extend(groups)
    form = None
    if len(nodes) == 1 and len(facts) == 1 and facts[0].affine is not None and is_number(factor):
        form = index.scaled(facts[0].affine, factor)
    return finish(c, dims, tidy_scale(scale), form)


@rule("div", "true_divide", scales=True, junk=True)
def div(c: Call) -> Fact:
    """A quotient; by a length it becomes a scale, by a spectrum it is refused."""
    facts = [c.fact(n) for n in c.tensors()]
    top, bottom = c.arg("self"), c.arg("other")
    if c.arg("rounding_mode") is not None:
        if any(f.scaled for f in facts):
            raise Deny("length_as_value", "rounds a value that carries a factor of the length")
        return elementwise(c, "any")
    scale: Any = c.fact(top).scale if isinstance(top, fx.Node) and not is_integer(top) else c.scalar(top)
    scale = scale if isinstance(scale, np.ndarray) else 1.0
    if isinstance(bottom, fx.Node) and not is_integer(bottom):
        below = c.fact(bottom)
        if any(a.freq and not a.fixed for a in below.axes):
            raise Deny(
                "spectrum",
                "divides by a spectrum: an infinite response that wraps around differently at every length",
                "compute the kernel at a fixed transform length and cut it to L taps",
            )
        scale = np.divide(scale, below.scale)
        numerator = [c.fact(top)] if isinstance(top, fx.Node) and not is_integer(top) else []
        rank = max(len(f.dims) for f in [*numerator, below])
        if numerator and not varies(below, rank) & varies(numerator[0], rank):
            dims = _quotient_dims(numerator[0], below, rank)
            c.note_linear([top])
        else:
            dims = broadcast([*numerator, below], "any")
            c.note_linear([top], invariant=False)
    else:
        value = c.scalar(bottom)
        scale = np.divide(scale, value) if isinstance(value, np.ndarray) else scale
        dims = broadcast([c.fact(top)], "linear")
        c.note_linear([top])
    return finish(c, dims, tidy_scale(scale))


def _quotient_dims(top: Fact, below: Fact, rank: int) -> tuple[Dim, ...]:
    """Where only one of the two varies along a dimension, its axis survives as it is."""
    dims = []
    for i in range(rank):
        upper, lower = i - rank + len(top.dims), i - rank + len(below.dims)
        if upper >= 0 and not is_one(top.dims[upper]):
            dims.append(top.dims[upper])
        elif lower >= 0:
            dims.append(unite_dims([below.dims[lower]], "any", upper < 0))
        else:
            dims.append(top.dims[upper])
    return tuple(dims)
