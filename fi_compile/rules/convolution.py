"""conv1d: correlation with a weight, which is convolution with the reversed weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..facts import Deny, Fact, clip, convolved, fixed, negated, settle, tidy, tidy_scale
from .call import Call, need_fixed, one, rule


@rule("conv1d", "convolution", "conv_transpose1d", scales=True)
def conv1d(c: Call) -> Fact:
    """input [b, c, m] with weight [o, c / groups, K]: out[i] = Σ w[k] x[i·stride + k·dilation - padding]."""
    x, w = c.fact("input"), c.fact("weight")
    if c.name == "conv_transpose1d" or c.arg("transposed"):
        raise Deny("unknown_operator", "a transposed convolution has no rule", "use conv1d with a flipped weight")
    if len(x.dims) != 3 or len(w.dims) != 3:
        raise Deny("unknown_operator", f"{c.name} of rank {len(x.dims)} has no rule")
    (stride,), (padding,), (dilation,) = (
        (v if isinstance(v, (list, tuple)) else [v]) for v in (c.arg("stride"), c.arg("padding"), c.arg("dilation"))
    )
    if isinstance(padding, str):
        raise Deny("unproved", f"convolution with padding={padding!r}", "pad on the left by hand")
    padding = c.q(padding)
    if stride != 1:
        raise Deny("stride", "a strided convolution: its outputs are not one a position")
    c.number("groups", 1)
    need_fixed(x, 1, "a convolution over channels")
    need_fixed(w, 1, "a convolution over channels")
    source, filters = one(x.dims[2]), one(w.dims[2])
    if source.period is not None or filters.period is not None:
        raise Deny("spectrum", "a convolution of a spectrum or cyclic sequence")
    if dilation != 1:
        if not (filters.fixed and isinstance(filters.size, int)):
            raise Deny("unproved", "a dilated convolution with a filter whose length follows the sequence")
        filters = fixed((filters.size - 1) * int(dilation) + 1)
    size = c.out[2]
    axis = convolved(source, negated(filters), size)
    axis = clip(settle(replace(axis, shift=tidy(np.add(axis.shift, padding)))))
    scale = tidy_scale(np.multiply(x.scale, w.scale))
    c.note_linear([c.arg("input")], [c.arg("weight")])
    if c.has("bias"):
        if isinstance(scale, np.ndarray):
            raise Deny("length_as_value", "adds a bias to a value that carries a factor of the length")
        from ..facts import filled

        axis = filled(axis)
        need_fixed(c.fact("bias"), 0, "a bias")
        pair = [frozenset([c.arg(k), c.arg("bias")]) for k in ("input", "weight")]
        c.affine_groups, c.linear = c.linear, pair
        c.invariant = []
    batch = x.dims[0]
    return Fact((batch, (fixed(c.out[1]),), (axis,)), scale)
