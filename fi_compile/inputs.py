"""What a model reads beside its sequence: masks, positions, conditions.

Most such tensors are functions of the sequence's shape: a mask of ones, an arange of positions. At every
call each of them is *described*, from its values, as such a function. The description is part of what a
graph is analysed for, and in the analysis the function takes the tensor's place. So nothing is assumed that
was not seen in this very call: another description is another analysis, and a tensor without one
(a padded mask) runs the graph as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .weights import checksum

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(value: Tensor) -> Tensor:
    """A floating tensor as integers, so that -0.0 is not 0.0 and a NaN equals itself."""
    return value.view(_INTEGER[value.element_size()]) if value.dtype.is_floating_point else value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape and in every bit."""
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def exact(number: float) -> str | int | bool:
    """A number as a key: floats by their digits, so that -0.0 is not 0.0 and a NaN equals itself."""
    return number.hex() if isinstance(number, float) else number


@dataclass(frozen=True)
class Extra:
    """A tensor the caller passes beside the sequence: its place, its name, its sizes.

    ``shape``: per axis ``"batch"``, ``"length"``, the size itself, ``"own"`` for one that follows neither, or
    None for one computed from the length.
    """

    place: int
    name: str
    shape: tuple[str | int | None, ...]
    dtype: torch.dtype

    @property
    def moves(self) -> bool:
        """Whether it grows with the sequence."""
        return "length" in self.shape or None in self.shape


@dataclass(frozen=True)
class Filled:
    """One value everywhere: a mask of ones, segment ids of zero."""

    value: str | int | bool


@dataclass(frozen=True)
class Counted:
    """``start + i`` along the sequence, the same in every row: position ids."""

    start: str | int


@dataclass(frozen=True)
class Causal:
    """One value up to the diagonal of the last two axes, another above it: an explicit causal mask."""

    below: str | int | bool
    above: str | int | bool


@dataclass(frozen=True)
class Same:
    """The sequence itself, in other memory: labels."""


@dataclass(frozen=True)
class Fixed:
    """Contents that do not grow with the sequence: a condition of each row. Compared again where it is used."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: int


Description = Filled | Counted | Causal | Same | Fixed


def describe(value: Tensor, sequence: Tensor, extra: Extra) -> Description | None:
    """What ``value`` is as a function of the sequence's shape, exactly; None where it is no such function.

    Reads every entry: as costly as comparing the sequence with a known one.
    """
    if not extra.moves:
        return Fixed(tuple(value.shape), value.dtype, checksum(value))
    if value.numel() == 0 or not {None, "own"}.isdisjoint(extra.shape) or value.is_complex():
        return None
    plain = bits(value)
    first = value[(0,) * value.dim()]
    if extra.shape.count("length") == 1:
        axis = extra.shape.index("length")
        column = value.movedim(axis, -1)[(0,) * (value.dim() - 1)]
        if bool((plain == bits(first)).all()):
            return Filled(_key(first))
        if len(column) > 1 and value.dtype is not torch.bool and bool(column[1] > column[0]):
            shape = [-1 if a == axis else 1 for a in range(value.dim())]
            count = torch.arange(column.shape[0], dtype=value.dtype, device=value.device) + first
            if bool((plain == bits(count).view(shape)).all()):
                return Counted(_key(first))
    elif extra.shape[-2:] == ("length", "length") and extra.shape.count("length") == 2:
        found = _causal(value)
        if found is not None:
            return found
    return Same() if value.dtype == sequence.dtype and same_bits(value, sequence) else None


def _causal(value: Tensor) -> Causal | None:
    rows = torch.arange(value.shape[-1], device=value.device)
    corner = value[(0,) * (value.dim() - 2)]
    below, above = corner[0, 0], corner[0, -1]
    expected = bits(torch.where(rows <= rows.unsqueeze(1), below, above))
    return Causal(_key(below), _key(above)) if bool((bits(value) == expected).all()) else None


def build(
    description: Filled | Counted | Causal | Same,
    extra: Extra,
    like: Tensor,
    graph: fx.Graph,
    sequence: fx.Node,
) -> fx.Node:
    """Append nodes to ``graph`` that compute the described tensor from ``sequence``; ``like`` is one of its values."""
    if isinstance(description, Same):
        return sequence
    kind = {"dtype": like.dtype, "device": like.device}
    length = graph.call_method("size", (sequence, 1))
    names: dict[Any, Any] = {"batch": graph.call_method("size", (sequence, 0)), "length": length}
    sizes = tuple(names.get(size, size) for size in extra.shape)
    if isinstance(description, Filled):
        return graph.call_function(torch.full, (sizes, _number(description.value)), kind)
    if isinstance(description, Counted):
        count = graph.call_function(torch.arange, (length,), kind)
        if _number(description.start):
            count = graph.call_function(torch.add, (count, _number(description.start)))
        for _ in range(like.dim() - 1 - extra.shape.index("length")):
            count = graph.call_method("unsqueeze", (count, -1))
        return count if like.dim() == 1 else graph.call_method("expand", (count, *sizes))
    count = graph.call_function(torch.arange, (length,), {"device": like.device})
    seen = graph.call_function(torch.le, (count, graph.call_method("unsqueeze", (count, 1))))
    below, above = (
        graph.call_function(torch.full, ((), _number(key)), kind)
        for key in (description.below, description.above)
    )
    return graph.call_method("expand", (graph.call_function(torch.where, (seen, below, above)), *sizes))


def _key(value: Tensor) -> Any:
    return exact(value.item())


def _number(key: str | int | bool) -> float | int | bool:
    return float.fromhex(key) if isinstance(key, str) else key


def undescribed(extra: Extra, value: Tensor, sequence: Tensor) -> str:
    """Why a tensor has no description, for a person."""
    if not {None, "own"}.isdisjoint(extra.shape):
        return (
            f"{extra.name} has sizes {list(value.shape)} that follow neither batch nor length of the sequence"
        )
    text = f"{extra.name} is neither one value everywhere nor a count of the positions"
    if value.dim() == 2 and value.shape == sequence.shape[:2] and value.dtype in (torch.bool, torch.int64):
        odd = (value != value[:, -1:]).any(1)
        if bool(odd.any()) and set(value.unique().tolist()) <= {0, 1}:
            row = int(odd.to(torch.uint8).argmax())
            return f"{extra.name} leaves out positions (row {row} of {value.shape[0]}): a padded batch"
    return text


def sequence_rank(name: str, value: Tensor, described: bool) -> tuple[bool, ...]:
    """How unlikely a tensor [B, s, …] is to be the sequence itself; the least is."""
    beside = any(word in name.lower() for word in _BESIDE)
    return value.dtype is torch.bool, beside, described


_BESIDE = ("mask", "position", "type_id", "label", "segment", "target", "pad")
