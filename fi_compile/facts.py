"""What the prover knows about a value: one :class:`Axis` per dimension factor, and the algebra of axes.

Every quantity that depends on the length (a size, a shift, a bound) is held *evaluated at all admitted
lengths at once*, as an integer array, so each condition below is decided completely and without symbolic
reasoning. The claim a fact makes: for any two admitted lengths r and s and one infinite sequence x,
``V_r(x[:r])`` and ``V_s(x[:s])`` agree wherever every axis is valid at both lengths.

An axis carries a *content* c(t), t an integer, of which the tensor shows a window: index i holds
``c(sign * (i - shift))``. c is zero outside ``[lo, hi]`` and the same at all lengths for ``t < valid``.
A plain sequence has sign 1, shift 0 and valid = size; a reversed one has sign -1 and shift = size - 1; a
padded one a shift; a spectrum or a cyclic sequence has a ``period``: its index is taken modulo that.
Convolution of contents then needs no linearity: c = a * b is known up to
``min(valid_a + lo_b, valid_b + lo_a)``. The derivation is in docs and in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from .symbolic import one_array

Quantity = int | np.ndarray
# "At every t": large enough to exceed any length, small enough that sums stay exact.
EVERYWHERE = 1 << 40


# What to change, by kind of refusal, where a rule knows nothing better.
_HINTS = {
    "batch_as_value": "use x.shape[0] in sizes only; a row must not depend on how many rows there are",
    "data_dependent": "index by positions or parameters, not by what the sequence contains",
    "length_as_value": "use x.shape[1] in sizes and slices only; take positions from a fixed table",
    "merged": "keep batch and sequence as separate axes, or merge and split them in one order",
    "misaligned": "let every value start at position 0: pad in front and cut at the end",
    "mixes_positions": "mask later positions first, or reduce over features instead of positions",
    "non_causal": "check masks, flips, shifts and the side that is padded",
    "random": "call model.eval(); draw nothing at random in forward",
    "spectrum": "use spectra only between rfft and irfft of one length, as products with a filter's spectrum",
    "unknown_operator": "write it with operators that have a rule, or add a rule",
}
_HINT = "if every output depends on earlier positions only, please report the model"


class Deny(Exception):
    """A rule's refusal: ``kind`` a short word, ``reason`` a sentence, ``hint`` what to change."""

    def __init__(self, kind: str, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.hint = kind, reason, hint or _HINTS.get(kind, _HINT)


def tidy(value: Any) -> Quantity:
    """An array of equal entries as one ``int``, and arrays of the same entries as one array."""
    if isinstance(value, np.ndarray):
        first = value.flat[0]
        return int(first) if bool((value == first).all()) else one_array(value)
    return int(value)


def same(a: Quantity, b: Quantity) -> bool:
    """Equal at every length."""
    return a is b or bool(np.all(a == b))


def always(condition: Any) -> bool:
    """Whether a comparison of quantities holds at every length."""
    return bool(np.all(condition))


def constant(value: Quantity) -> bool:
    """Free of the length (it may follow the batch): rows of an array are batch sizes, columns lengths."""
    return not isinstance(value, np.ndarray) or bool((value == value[:, :1]).all())


def by_batch(value: Quantity) -> bool:
    """Whether a quantity follows the batch."""
    return isinstance(value, np.ndarray) and not bool((value == value[:1]).all())


def least(*values: Quantity) -> Quantity:
    """The minimum at every length."""
    result = values[0]
    for value in values[1:]:
        if value is not result:
            result = tidy(np.minimum(result, value))
    return result


def most(*values: Quantity) -> Quantity:
    """The maximum at every length."""
    result = values[0]
    for value in values[1:]:
        if value is not result:
            result = tidy(np.maximum(result, value))
    return result


def floor_of(value: Quantity) -> int:
    """The smallest value over all lengths."""
    return int(np.min(value))


def plus(a: Quantity, b: Quantity) -> Quantity:
    """``a + b``, where EVERYWHERE absorbs."""
    total = np.where((np.asarray(a) >= EVERYWHERE) | (np.asarray(b) >= EVERYWHERE), EVERYWHERE, np.add(a, b))
    return tidy(total) if total.ndim else int(total)


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension, or one factor of a merged dimension; see the module's docstring."""

    size: Quantity
    valid: Quantity
    lo: Quantity
    hi: Quantity
    sign: int = 1
    shift: Quantity = 0
    period: Quantity | None = None
    freq: bool = False
    real: bool = True  # of a spectrum: its content is real, so half the bins hold everything
    batch: bool = False  # index = row of the batch
    flat: bool = False  # the same value at every index

    @property
    def plain(self) -> bool:
        """Index = position, outside any cyclic context."""
        return self.period is None and self.sign == 1 and isinstance(self.shift, int) and self.shift == 0

    @property
    def prefix(self) -> bool:
        """Plain, and certified at every index."""
        return self.plain and always(self.valid >= self.size)

    @property
    def fixed(self) -> bool:
        """Certified at every index and of a size free of the length: constant in s along this axis."""
        return constant(self.size) and (self.prefix or self.frozen)

    @property
    def frozen(self) -> bool:
        """A spectrum or cyclic sequence whose period and whole content do not follow the length."""
        return (
            self.period is not None
            and constant(self.period)
            and constant(self.shift)
            and always(self.valid >= EVERYWHERE)
        )

    @property
    def window(self) -> tuple[Quantity, Quantity]:
        """First and last content index the tensor shows."""
        if self.sign == 1:
            return tidy(-np.asarray(self.shift)), tidy(self.size - 1 - np.asarray(self.shift))
        return tidy(self.shift - np.asarray(self.size) + 1), self.shift

    def __str__(self) -> str:
        """A short description at the longest length, for refusals."""
        if self.freq:
            return f"a spectrum of transform length {last(self.period)}"
        if self.period is not None:
            return f"a cyclic sequence of period {last(self.period)}"
        if self.sign == -1:
            return "in reversed order"
        if not self.plain:
            return f"shifted by {last(self.shift)} positions"
        return "certified" if self.prefix else f"certified only below index {max(0, last(self.valid))}"


def last(value: Any) -> int:
    """A quantity at the longest length."""
    return int(value.flat[-1]) if isinstance(value, np.ndarray) else int(value)


def fixed(size: Quantity, batch: bool = False) -> Axis:
    """An axis whose size, and content, do not follow the length."""
    return Axis(size, EVERYWHERE, 0, tidy(size - 1), batch=batch)


def sequence(size: Quantity, valid: Quantity | None = None) -> Axis:
    """A plain axis, certified at every index (or below ``valid``)."""
    return settle(Axis(size, size if valid is None else valid, 0, tidy(size - 1)))


def settle(axis: Axis) -> Axis:
    """The same claim in normal form: constant shifts absorbed, fixed contents valid everywhere."""
    if constant(axis.hi) and axis.valid is not EVERYWHERE and always(axis.valid > axis.hi):
        axis = replace(axis, valid=EVERYWHERE)
    if axis.sign == -1 and isinstance(axis.valid, int) and axis.valid >= EVERYWHERE:
        axis = replace(axis, sign=1, lo=tidy(-np.asarray(axis.hi)), hi=tidy(-np.asarray(axis.lo)))
    if axis.sign == 1 and isinstance(axis.shift, int) and axis.shift != 0:
        k = axis.shift
        axis = replace(axis, shift=0, lo=plus(axis.lo, k), hi=plus(axis.hi, k), valid=plus(axis.valid, k))
    return axis


def exponents(axis: Axis) -> tuple[Quantity, Quantity]:
    """First and last index (before any modulo) at which the content may be nonzero."""
    if axis.sign == 1:
        return tidy(np.add(axis.lo, axis.shift)), tidy(np.add(axis.hi, axis.shift))
    return tidy(np.subtract(axis.shift, axis.hi)), tidy(np.subtract(axis.shift, axis.lo))


def clip(axis: Axis) -> Axis:
    """Set the content to zero outside the window the tensor shows."""
    first, end = axis.window
    valid = axis.valid
    if not always(axis.hi <= end):
        kept = np.minimum(valid, np.add(end, 1))
        if _saturates(end) and always(axis.valid > np.max(end)):
            # A table cut at min(m, s): from s = m on it is one and the same filter.
            kept = np.where(end == np.max(end), EVERYWHERE, kept)
        valid = tidy(np.where(np.greater(axis.hi, end), kept, valid))
    if not constant(first) and not always(axis.lo >= first):
        valid = least(valid, floor_of(first))
    return settle(replace(axis, lo=most(axis.lo, first), hi=least(axis.hi, end), valid=valid))


def _saturates(end: Quantity) -> bool:
    return isinstance(end, np.ndarray) and end.shape[1] > 1 and bool((end[:, -2:] == np.max(end)).all())


def filled(axis: Axis) -> Axis:
    """After a map that does not keep zeros: nothing is known to be zero inside the window."""
    first, end = axis.window
    if axis.lo is first and axis.hi is end:
        return axis
    if same(axis.lo, first) and same(axis.hi, end):
        return axis
    valid = least(axis.valid, tidy(np.add(end, 1)))
    if constant(end) and always(axis.valid > end):
        valid = EVERYWHERE
    if not constant(first):
        valid = least(valid, floor_of(first))
    return settle(replace(axis, lo=first, hi=end, valid=valid))


def unwrapped(axis: Axis, start: Quantity, stop: Quantity) -> Axis | None:
    """Leave the cyclic context where the window [start, stop) is free of aliases; else ``None``.

    Index i holds the sum of all exponents congruent to i; with the content's exponents in [e0, e1] only
    one of them can be nonzero iff ``e1 - n < start`` and ``e0 + n > stop - 1`` (for some multiple of n).
    """
    n = axis.period
    assert n is not None
    e0, e1 = exponents(axis)
    for k in (0, 1, -1):
        a, b = np.subtract(start, np.multiply(k, n)), np.subtract(stop, np.multiply(k, n))
        if always(np.subtract(e1, n) < a) and always(np.add(e0, n) > b - 1):
            return replace(axis, period=None, shift=tidy(np.add(axis.shift, np.multiply(k, n))))
    return None


def alias(axis: Axis, start: Quantity, stop: Quantity) -> Deny:
    """Why a window of a cyclic axis is not free of aliases, with the numbers of one length."""
    e0, e1 = exponents(axis)
    n = axis.period
    assert n is not None
    bad = np.atleast_1d((np.subtract(e1, n) >= start) | (np.add(e0, n) <= np.subtract(stop, 1)))
    where = np.unravel_index(int(np.argmax(bad)), bad.shape)

    def at(q: Any) -> int:
        return int(np.broadcast_to(q, bad.shape)[where])

    return Deny(
        "alias",
        f"circular convolution wraps around: the product's support is [{at(e0)}, {at(e1)}] but the transform "
        f"length is {at(n)}, and the window read is [{at(start)}, {at(stop)})",
        "use a transform length of at least (signal length + filter length - 1), e.g. n = 2 * L, "
        "and cut the filter to L taps",
    )


def cut(axis: Axis, start: Quantity, stop: Quantity) -> Axis:
    """The axis after ``[start:stop]``; raises :class:`Deny` where aliases are in sight."""
    if same(start, 0) and same(stop, axis.size):
        return axis
    size = tidy(np.subtract(stop, start))
    if axis.freq:
        if same(start, 0) and always(stop >= np.add(np.floor_divide(axis.period, 2), 1)):  # type: ignore[arg-type]
            return replace(axis, size=size, batch=False, flat=False)
        raise Deny("spectrum", "a slice of a spectrum drops frequencies, which spreads over all positions")
    if axis.period is not None:
        free = unwrapped(axis, start, stop)
        if free is None:
            raise alias(axis, start, stop)
        axis = free
    shift = tidy(np.subtract(axis.shift, start))
    return clip(replace(axis, size=size, shift=shift, batch=False))


def padded(axis: Axis, left: Quantity, right: Quantity) -> Axis:
    """Zeros to the left and right; negative amounts cut."""
    start, stop = most(0, tidy(-np.asarray(left))), tidy(np.add(axis.size, least(0, right)))
    axis = cut(axis, start, stop)
    left, right = most(left, 0), most(right, 0)
    if same(left, 0) and same(right, 0):
        return axis
    if axis.freq:
        raise Deny("spectrum", "pads a spectrum: its frequencies then belong to another transform length")
    if axis.period is not None:
        free = unwrapped(axis, 0, axis.size)
        if free is None:
            raise alias(axis, 0, axis.size)
        axis = free
    size = tidy(np.add(np.add(axis.size, left), right))
    return settle(replace(axis, size=size, shift=tidy(np.add(axis.shift, left)), batch=False, flat=False))


def flipped(axis: Axis) -> Axis:
    """Reversed along this axis."""
    if axis.period is not None:
        raise Deny("spectrum", f"a flip of {axis}")
    whole_rows(axis, "a flip")
    shift = tidy(np.subtract(np.subtract(axis.size, 1), axis.shift))
    return settle(replace(axis, sign=-axis.sign, shift=shift, batch=False))


def whole_rows(axis: Axis, doing: str) -> None:
    """Refuse to mix the entries of an axis of the batch's size that are not the batch's rows."""
    if by_batch(axis.size) and not axis.batch:
        raise Deny("batch_as_value", f"{doing} over as many entries as there are rows in the batch")


def rolled(axis: Axis, by: Quantity) -> Axis:
    """Rotated by ``by`` positions: a shift in a cyclic context of the axis' own size."""
    if axis.freq:
        raise Deny("spectrum", f"a roll of {axis}")
    if by_batch(by):
        raise Deny("batch_as_value", "rolls by the batch size")
    whole_rows(axis, "a roll")
    period = axis.size if axis.period is None else axis.period
    axis = replace(axis, period=period, shift=tidy(np.add(axis.shift, by)), batch=False)
    return closed(axis)


def closed(axis: Axis) -> Axis:
    """Leave the cyclic context if its whole window is free of aliases already."""
    free = unwrapped(axis, 0, axis.size)
    if free is not None:
        return clip(free)
    return fixed(axis.size) if axis.frozen else axis


def negated(axis: Axis) -> Axis:
    """Index i becomes -i: what conjugation does to a spectrum, correlation to a filter."""
    return settle(replace(axis, sign=-axis.sign, shift=tidy(-np.asarray(axis.shift))))


def convolved(a: Axis, b: Axis, size: Quantity) -> Axis:
    """The axis of the convolution of two contents, in the same (or no) cyclic context."""
    a, b = settle(a), settle(b)
    if a.sign != b.sign:
        raise Deny("non_causal", "correlates two sequences (one is reversed): a position sees later ones")
    return settle(
        replace(
            a,
            size=size,
            shift=tidy(np.add(a.shift, b.shift)),
            lo=tidy(np.add(a.lo, b.lo)),
            hi=tidy(np.add(a.hi, b.hi)),
            valid=least(plus(a.valid, floor_of(b.lo)), plus(b.valid, floor_of(a.lo))),
            real=a.real and b.real,
            batch=False,
            flat=False,
        )
    )


def delta(like: Axis) -> Axis:
    """The spectrum of a constant added to every bin: a content at t = 0 alone."""
    return replace(like, shift=0, sign=1, lo=0, hi=0, valid=EVERYWHERE)


def united(axes: Sequence[Axis], how: str, partial: bool) -> Axis:
    """The axis of an elementwise map of operands that show ``axes`` on one dimension.

    ``how``: "linear" (a sum), "product", "zero" (f(0, …, 0) = 0) or "any". ``partial``: some operand does
    not vary along the dimension.
    """
    if any(a.freq for a in axes):
        try:
            return _united_spectra(axes, how, partial)
        except Deny:
            if not all(a.fixed for a in axes):
                raise
            return fixed(axes[0].size)
    first = axes[0]
    flat = all(a.flat for a in axes)
    # Rows beside entries that differ by their number are no longer rows of the batch alone.
    batch = any(a.batch for a in axes) and all(a.batch or a.flat for a in axes)
    for a in axes[1:]:
        if a is not first and not (a.sign == first.sign and same(a.shift, first.shift)):
            raise Deny("misaligned", f"combines values whose rows are {first} and {a}")
    if any(a.period is not None for a in axes):
        if any(a.period is None or not same(a.period, axes[0].period) for a in axes):  # type: ignore[arg-type]
            raise Deny("misaligned", "combines a cyclic sequence with one that is not")
        linear = (how == "linear" and not partial) or (how == "product" and len(axes) == 1)
        # Where each index shows exactly one content, a rotated sequence, any map will do.
        rotated = all(
            constant(a.lo) and same(np.subtract(a.hi, a.lo), np.subtract(first.period, 1))  # type: ignore[arg-type]
            for a in axes
        )  # type: ignore[arg-type]
        rotated = rotated and all(same(a.lo, first.lo) for a in axes)
        if not (linear or rotated):
            raise alias(first, 0, first.size)
        if rotated:
            return replace(first, valid=least(*(a.valid for a in axes)), batch=batch, flat=flat)
    if len(axes) > 1:
        lo = most(*(a.lo for a in axes)) if how == "product" else least(*(a.lo for a in axes))
        hi = least(*(a.hi for a in axes)) if how == "product" else most(*(a.hi for a in axes))
        valid = least(*(a.valid for a in axes))
        first = replace(first, lo=lo, hi=hi, valid=valid, batch=batch, flat=flat)
    if how == "any" or (partial and how in ("linear", "zero")):
        first = filled(first)
    return settle(first) if len(axes) > 1 else first


def _united_spectra(axes: Sequence[Axis], how: str, partial: bool) -> Axis:
    first = axes[0]
    if how not in ("linear", "product"):
        raise Deny("spectrum", "a non-linear map of a spectrum mixes all positions")
    for a in axes:
        if not a.freq or not same(a.period, first.period):  # type: ignore[arg-type]
            raise Deny("spectrum", "combines spectra of different transform lengths, or of unknown origin")
    result = first
    if how == "product":
        for a in axes[1:]:
            result = convolved(result, a, result.size)
        return result
    for a in [*axes[1:], *([delta(first)] if partial else [])]:
        if a.sign != result.sign or not same(a.shift, result.shift):
            raise Deny("spectrum", "adds spectra of sequences that are not aligned")
        result = replace(
            result,
            lo=least(result.lo, a.lo),
            hi=most(result.hi, a.hi),
            valid=least(result.valid, a.valid),
            real=result.real and a.real,
        )
    return result


Dim = tuple[Axis, ...]


@dataclass(frozen=True)
class Affine:
    """A number tensor whose value is ``offset + Σ coefficients[d] * index_d``."""

    coefficients: tuple[float, ...]
    offset: Quantity | float


@dataclass(frozen=True)
class Triangle:
    """What is known where index ``key`` > index ``query``, and where they are equal.

    ``above``/``diagonal`` hold the one value there, :data:`OPEN` (only ``diagonal``) where numbers of ordinary
    size are, ``None`` where no more is known of the (certified) data than of all entries, or :data:`JUNK` where
    the fact claims nothing.
    """

    query: int
    key: int
    above: Any
    diagonal: Any = None


@dataclass(frozen=True)
class Chunk:
    """Of entries in the last, incomplete chunk of positions: which are certified beside those of whole chunks.

    Position ``index of outer · size + index of inner`` below ``valid``. Where a fact has several, all must hold.
    """

    outer: int
    inner: int
    size: int
    valid: Quantity


@dataclass(frozen=True)
class View:
    """Whose entries a tensor shows: index i_0, i_1, … is the base's entry at i_k on its dimension ``dims[k]``.

    ``None`` in ``dims``: a dimension the base has not. A dimension of the base that is not in ``dims`` has size 1.
    """

    base: Any  # the fx node
    dims: tuple[int | None, ...]

    def moved(self, where: Mapping[int, int], rank: int) -> View:
        """The view with its dimensions rearranged; ``where`` maps old to new dimensions of ``rank`` in all."""
        dims: list[int | None] = [None] * rank
        for old, new in where.items():
            dims[new] = self.dims[old]
        return View(self.base, tuple(dims))


class _Junk:
    def __repr__(self) -> str:
        return "junk"


JUNK = _Junk()


class _Open:
    def __repr__(self) -> str:
        return "open"


OPEN = _Open()
# How large the entries of a tensor may be: of ordinary size (no mask, no extreme number has met them), besides
# that very low or -inf, or anything.
ORDINARY, LOW, EXTREME = 0, 1, 2
# Numbers beyond this are not of ordinary size.
LARGE = 1e20


@dataclass(frozen=True)
class Fact:
    """What is certified of one tensor: its axes, and more where it is known."""

    dims: tuple[Dim, ...]
    scale: Any = 1.0  # the value is this float (an array over all lengths) times a certified one
    triangles: tuple[Triangle, ...] = ()
    newest: bool = False
    rows: bool = True  # each batch row depends on that row of the sequence alone
    affine: Affine | None = None
    fill: Any = None  # every element equals this number
    bounds: tuple[Quantity, Quantity] | None = None  # of an integer tensor: least and greatest value
    magnitude: int = ORDINARY
    chunks: tuple[Chunk, ...] = ()
    view: View | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All factors of all dimensions."""
        return tuple(a for dim in self.dims for a in dim)

    @property
    def scaled(self) -> bool:
        """Whether a factor that follows the length is still to be cancelled."""
        return isinstance(self.scale, np.ndarray)

    @property
    def junk(self) -> bool:
        """Whether some entries above a diagonal are not covered by the claim."""
        return any(t.above is JUNK for t in self.triangles)

    @property
    def fixed(self) -> bool:
        """Constant in s."""
        return not self.junk and not self.scaled and not self.newest and all(a.fixed for a in self.axes)

    def proved(self, length: Quantity) -> bool:
        """Prefix-consistent: every dimension constant, or exactly the sequence axis."""
        return (
            not (self.newest or self.junk or self.scaled)
            and all(len(dim) == 1 for dim in self.dims)
            and all(a.fixed or (a.prefix and same(a.size, length)) for a in self.axes)
        )


def tidy_scale(value: Any) -> Any:
    """A scale over all lengths; 1.0 where it is constant up to rounding."""
    if not isinstance(value, np.ndarray):
        return 1.0
    base = value[:, :1]
    if not np.all(np.isfinite(value)) or bool((value == 0).any()):
        raise Deny(
            "length_as_value", "multiplies by a factor of the length that is 0 or not finite somewhere"
        )
    return 1.0 if bool((np.abs(value - base) <= 1e-12 * np.abs(base)).all()) else value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a uniform value is known as one finite or infinite number."""
    return isinstance(value, (bool, int, float))
