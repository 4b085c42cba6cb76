"""Transforms: a padded sequence becomes a spectrum of period n, and back; conjugation reverses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fi_compile.facts import (
    Axis,
    Deny,
    Fact,
    Quantity,
    alias,
    closed,
    cut,
    fixed,
    least,
    negated,
    same,
    tidy,
    tidy_scale,
    unwrapped,
)

from .call import Call, one, rule


def _scale(c: Call, fact: Fact, n: Quantity, forward: bool) -> Any:
    """The factor a normalisation puts in, relative to sum forward and 1/n inverse."""
    norm = c.arg("norm") or "backward"
    power = {"backward": 0.0, "ortho": -0.5, "forward": -1.0}[norm]
    factor = np.power(np.asarray(n, dtype=np.float64), power if forward else -power)
    return tidy_scale(np.multiply(fact.scale, factor)) if np.asarray(n).ndim or fact.scaled else fact.scale


def _replace(fact: Fact, dim: int, axis: Axis) -> tuple[tuple[Axis, ...], ...]:
    return (*fact.dims[:dim], (axis,), *fact.dims[dim + 1 :])


@rule("fft_rfft", "fft_fft", scales=True)
def forward(c: Call) -> Fact:
    """rfft, fft: needs the content within [0, n); what a shorter n cuts off is cut off."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim", -1), len(fact.dims))
    axis = one(fact.dims[dim])
    n = axis.size if c.arg("n") is None else c.q("n")
    c.note_linear([c.arg("self")])
    size = c.out[dim]
    if axis.freq:
        if not axis.fixed:
            raise Deny("spectrum", "a transform of a spectrum")
        axis = fixed(axis.size)
    if axis.period is not None and not same(axis.period, n):
        free = unwrapped(axis, 0, least(axis.size, n))
        if free is None:
            raise alias(axis, 0, axis.size)
        axis = free
    if axis.period is None:
        axis = cut(axis, 0, least(axis.size, n))
    axis = replace(
        axis, size=size, period=n, freq=True, real=not c.is_complex(c.arg("self")), batch=False, flat=False
    )
    return Fact(_replace(fact, dim, axis), _scale(c, fact, n, forward=True))


@rule("fft_irfft", "fft_ifft", scales=True)
def inverse(c: Call) -> Fact:
    """irfft, ifft of a whole spectrum with its own transform length: back to a cyclic sequence."""
    fact = c.fact("self")
    dim = c.dim(c.number("dim", -1), len(fact.dims))
    axis = one(fact.dims[dim])
    n = c.out[dim]
    if c.arg("n") is not None:
        c.q("n")
    c.note_linear([c.arg("self")])
    if not axis.freq:
        if axis.fixed:
            scale = _scale(c, fact, n, forward=False)
            if isinstance(n, int):
                return Fact(_replace(fact, dim, fixed(n)), scale)
        raise Deny("spectrum", "an inverse transform of something that is not the spectrum of a sequence")
    assert axis.period is not None
    if not same(axis.period, n):
        raise Deny(
            "spectrum",
            "the inverse transform has another length than the forward one",
            "pass the same n to both",
        )
    half = tidy(np.add(np.floor_divide(n, 2), 1))
    if c.name == "fft_irfft" and not axis.real:
        raise Deny("spectrum", "irfft of the spectrum of a complex sequence", "use ifft(...).real")
    if not (same(axis.size, n) or (c.name == "fft_irfft" and same(axis.size, half))):
        raise Deny("spectrum", "an inverse transform of only a part of the spectrum")
    back = closed(replace(axis, size=n, freq=False, real=True))
    c.conditions.append(
        f"support within one period of n = {back if back.period is None else 'n, else cut later'}"
    )
    return Fact(_replace(fact, dim, back), _scale(c, fact, n, forward=False))


@rule("_conj", "conj", "conj_physical", "_conj_physical", "resolve_conj", scales=True)
def conjugate(c: Call) -> Fact:
    """Conjugation of a spectrum reverses its sequence; elsewhere it is pointwise."""
    fact = c.fact("self")
    dims = fact.dims
    if c.name != "resolve_conj" and c.is_complex():
        if sum(a.freq for a in fact.axes) > 1:
            raise Deny("spectrum", "conjugate of a two-dimensional spectrum")
        dims = tuple(tuple(negated(a) if a.freq else a for a in dim) for dim in dims)
    c.note_linear([c.arg("self")])
    c.row_local = not any(a.freq for a in fact.axes)
    return Fact(dims, fact.scale)


@rule(
    "fft_fftn",
    "fft_ifftn",
    "fft_rfftn",
    "fft_irfftn",
    "fft_fft2",
    "fft_ifft2",
    "fft_rfft2",
    "fft_irfft2",
    scales=True,
)
def several(c: Call) -> Fact:
    """Transforms over several dimensions: one after another (a real one last)."""
    fact = c.fact("self")
    dims = c.arg("dim")
    if dims is None or len(dims) != 1:
        if not all(a.fixed for a in fact.axes):
            raise Deny("spectrum", f"{c.name} over several dimensions of a value with a sequence axis")
        return Fact(tuple((fixed(size),) for size in c.out), fact.scale)
    c.arguments["dim"] = dims[0]
    lengths = c.arg("s")
    c.arguments["n"] = lengths[0] if lengths else None
    backwards = c.name.startswith("fft_i")
    c.name = ("fft_irfft" if "irfft" in c.name else "fft_ifft") if backwards else "fft_rfft"
    return inverse(c) if backwards else forward(c)
