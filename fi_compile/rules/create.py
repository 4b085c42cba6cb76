"""Tensors made from sizes: positions, constants. A length as a *value* is a factor to cancel, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from fi_compile.facts import EVERYWHERE, Affine, Axis, Deny, Fact, constant, fixed, settle, tidy_scale

from .call import Call, rule, table_axis
from .pointwise import counted


@rule("arange")
def arange(c: Call) -> Fact:
    """Positions: from a constant start they are certified; counted down from the length they are reversed."""
    start, step = c.arg("start", 0), c.arg("step", 1)
    if isinstance(step, fx.Node) or not isinstance(start, (int, fx.Node)) or not isinstance(step, int):
        if all(not isinstance(c.arg(k), fx.Node) for k in ("start", "end", "step")):
            return Fact(((fixed(c.out[0]),),))
        raise Deny("length_as_value", "arange with a step that is not a whole number")
    offset = c.q(start)
    c.no_batch(start)
    c.q("end")
    (size,) = c.out
    if step in (1, -1) and not constant(offset):
        axis = counted(size, step, offset)
    else:
        axis = table_axis(size)
        if not constant(offset):
            raise Deny("length_as_value", "arange from a start that follows the length")
    return Fact(((axis,),), affine=Affine((step,), offset))


def uniform(c: Call, value: object) -> Fact:
    """One value everywhere."""
    number = c.scalar(value)
    dims = []
    for size in c.out:
        if not isinstance(number, np.ndarray) and number == 0:
            axis = fixed(size) if constant(size) else settle(Axis(size, EVERYWHERE, 0, -1))
        else:
            axis = table_axis(size)
        dims.append((replace(axis, flat=True),))
    if isinstance(number, np.ndarray):
        return Fact(tuple(dims), tidy_scale(number), fill=None)
    return Fact(tuple(dims), fill=number if not isinstance(number, complex) else None)


def _sizes(c: Call) -> None:
    if c.arg("size") is not None:
        c.qs("size")


@rule("zeros", "zeros_like", "new_zeros", "empty", "new_empty", "empty_like")
def zeros(c: Call) -> Fact:
    """All zeros (uninitialised memory has no certified content)."""
    if "empty" in c.name:
        raise Deny("unproved", "uninitialised memory", "use zeros")
    _sizes(c)
    return uniform(c, 0)


@rule("ones", "ones_like", "new_ones")
def ones(c: Call) -> Fact:
    """All ones."""
    _sizes(c)
    return uniform(c, 1)


@rule("full", "full_like", "new_full")
def full(c: Call) -> Fact:
    """One value; a length is a factor that must cancel."""
    _sizes(c)
    return uniform(c, c.arg("fill_value"))


@rule("scalar_tensor")
def scalar_tensor(c: Call) -> Fact:
    """A number as a tensor."""
    return uniform(c, c.arg("s"))


@rule("fill", scales=True, lends=("self",))
def fill(c: Call) -> Fact:
    """A tensor's shape with one value."""
    value = c.arg("value")
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
        source = c.fact(value)
        return Fact(
            uniform(c, source.fill if source.fill is not None else 1).dims, source.scale, fill=source.fill
        )
    return uniform(c, value)


@rule("copy", "copy_", scales=True, lends=("self",))
def copy(c: Call) -> Fact:
    """dst.copy_(src): src broadcast."""
    from .views import repeated

    fact = c.fact("src")
    c.note_linear([c.arg("src")])
    c.row_local = True
    result = repeated(fact, c.out)
    return Fact(result.dims, fact.scale, fill=fact.fill)


@rule("eye")
def eye(c: Call) -> Fact:
    """The identity: certified on both axes, zero off the diagonal."""
    from fi_compile.facts import Triangle

    for key in ("n", "m"):
        if c.arg(key) is not None:
            c.q(key)
    dims = tuple((table_axis(size),) for size in c.out)
    triangles = (Triangle(0, 1, 0, 1), Triangle(1, 0, 0, 1)) if not constant(c.out[0]) else ()
    return Fact(dims, triangles=triangles)


@rule("linspace", "logspace")
def linspace(c: Call) -> Fact:
    """Only with a constant number of points and constant ends."""
    ends = [c.arg("start"), c.arg("end")]
    if any(isinstance(e, fx.Node) for e in ends) or isinstance(c.arg("steps"), fx.Node):
        raise Deny(
            "length_as_value",
            f"{c.name} spreads its points over the current length: every position's value follows the length",
            "spread over a fixed maximum length once, and slice the first L points",
        )
    return Fact(((fixed(c.out[0]),),))
