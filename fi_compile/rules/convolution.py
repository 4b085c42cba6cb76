"""Convolution operators: correlation with a weight, which is convolution with the reversed weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fi_compile.facts import (
    Axis,
    Deny,
    Dim,
    Fact,
    Quantity,
    clip,
    convolved,
    filled,
    fixed,
    negated,
    settle,
    tidy,
    tidy_scale,
)

from .call import Call, need_fixed, one, rule


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", scales=True)
def convolution(c: Call) -> Fact:
    """input [b, c, m…] with weight [o, c / groups, K…]: out[i] = Σ w[k] x[i + k·dilation - padding].

    The transposed form is the convolution out[i] = Σ w[k] x[i - k·dilation + padding].
    """
    x, w = c.fact("input"), c.fact("weight")
    transposed = bool(c.arg("transposed")) or "transpose" in c.name
    spatial = len(w.dims) - 2
    if len(x.dims) != spatial + 2:
        raise Deny("unknown_operator", f"{c.name} of an unbatched input has no rule", "add a batch dimension")
    need_fixed(x, 1, "a convolution over channels")
    c.keep_rows(*x.dims[1:], *w.dims[1:])
    c.mixes_rows = c.mixes_rows or any(a.batch for a in w.dims[0])
    if c.has("bias"):
        c.keep_rows(*c.fact("bias").dims)
    for dim in (0, 1):
        need_fixed(w, dim, "a convolution over channels")
    if isinstance(c.arg("padding"), str):
        raise Deny("unproved", f"convolution with padding={c.arg('padding')!r}", "pad on the left by hand")
    strides, paddings, dilations = (_each(c, key, spatial) for key in ("stride", "padding", "dilation"))
    dims: list[Dim] = []
    for i in range(spatial):
        size = c.out[2 + i]
        source, filters = one(x.dims[2 + i]), one(w.dims[2 + i])
        if source.fixed and filters.fixed:
            dims.append((fixed(size),))
            continue
        if not isinstance(strides[i], int) or strides[i] != 1:
            raise Deny("stride", "a strided convolution: its outputs are not one a position")
        dims.append((_along(source, filters, size, paddings[i], dilations[i], transposed),))
    scale = tidy_scale(np.multiply(x.scale, w.scale))
    c.note_linear([c.arg("input")], [c.arg("weight")])
    if c.has("bias"):
        if isinstance(scale, np.ndarray):
            raise Deny("length_as_value", "adds a bias to a value that carries a factor of the length")
        need_fixed(c.fact("bias"), 0, "a bias")
        dims = [tuple(filled(a) for a in dim) for dim in dims]
        c.affine_groups = c.linear
        c.linear = [frozenset([c.arg(k), c.arg("bias")]) for k in ("input", "weight")]
    return Fact((x.dims[0], (fixed(c.out[1]),), *dims), scale)


def _each(c: Call, key: str, count: int) -> list[Quantity]:
    values: Any = c.qs(key)
    return list(values) * count if len(values) == 1 else list(values)


def _along(
    source: Axis, filters: Axis, size: Quantity, padding: Quantity, dilation: Quantity, transposed: bool
) -> Axis:
    if source.period is not None or filters.period is not None:
        raise Deny("spectrum", "a convolution of a spectrum or cyclic sequence")
    if not isinstance(dilation, int) or dilation != 1:
        if not (filters.fixed and isinstance(filters.size, int) and isinstance(dilation, int)):
            raise Deny("unproved", "a dilated convolution with a filter whose length follows the sequence")
        filters = fixed((filters.size - 1) * dilation + 1)
    axis = convolved(source, filters if transposed else negated(filters), size)
    late = tidy(-np.asarray(padding)) if transposed else padding
    return clip(settle(replace(axis, shift=tidy(np.add(axis.shift, late)))))
