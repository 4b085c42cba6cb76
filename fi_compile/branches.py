"""Branches on the length: whether the model does the same to its data where a trace is not valid.

A trace records Python's control flow for the length it met; its guards say from which length on, or for which of
every k lengths. What happens at the others is compared on random input (:func:`fi_compile.compare.disagreements`),
which shows nothing of an operator that matters for rare values only. So the model is traced there too: if the same
operators are applied to the data, and only sizes, paddings and tables differ, random input says all there is to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from .program import Program, is_integer, operator_name

_MOST_RANGES = 8
_MOST_COLLISIONS = 4
_SHORTEST_TRACED = 3  # torch.export pins shorter ones
# Operators whose integers are sizes and places, never factors or exponents.
_SIZED = frozenset(
    {
        "view", "reshape", "_unsafe_view", "expand", "roll", "unflatten", "split", "chunk",
        "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    }
)  # fmt: skip
# Operators that move data and compute nothing: one graph may have them where another has not.
_MOVES = frozenset(
    {"slice", "narrow", "constant_pad_nd", "pad", "clone", "contiguous", "_assert_tensor_metadata"}
)


def same_below(program: Program, trace: Callable[[int], Program]) -> int:
    """The least length from which on the model applies the program's operators to its data.

    ``trace(n)`` traces the model at length n. Returns 1 where all lengths from 3 on agree (shorter ones cannot be
    traced), else a length up to the program's minimum: below it the model does something the program does not show.
    """
    top = program.lengths.minimum
    for _ in range(_MOST_RANGES):
        if top <= _SHORTEST_TRACED:
            return 1
        below = _range_with(top - 1, trace)
        if below is None or not _alike(program, below):
            return top
        top = below.lengths.minimum
    return top


def same_between(program: Program, trace: Callable[[int], Program], near: int) -> bool:
    """Whether the model applies the program's operators to its data at the lengths its period leaves out."""
    lengths = program.lengths
    missing = [n for n in range(near, near + lengths.period) if n % lengths.period in lengths.left_out]
    for _ in range(_MOST_RANGES):
        if not missing:
            return True
        other = _range_with(missing[0], trace)
        if other is None or not _alike(program, other):
            return False
        missing = [n for n in missing[1:] if not other.lengths.admits(n)]
    return False


def _range_with(length: int, trace: Callable[[int], Program]) -> Program | None:
    """A trace that admits ``length``, made there or, where that meets a size of the model, a little below."""
    for n in range(length, max(length - _MOST_COLLISIONS, 1), -1):
        try:
            found = trace(n)
        except Exception:
            continue
        lengths = found.lengths  # guards on memory layout exclude single lengths: compared on random input
        if length in lengths.holes or lengths.admits(length) or lengths.maximum == length - 1:
            return found
    return None


def _alike(program: Program, other: Program) -> bool:
    """Whether two graphs apply the same operators to data, up to sizes and to the tables they meet."""
    ours, theirs = _data_nodes(program), _data_nodes(other)
    if len(ours) != len(theirs):
        return False
    partner: dict[fx.Node, fx.Node] = {program.sequence: other.sequence}
    moved = {**_unmoved(program), **_unmoved(other)}

    def match(a: Any, b: Any, sized: bool) -> bool:
        ours, spec = pytree.tree_flatten(a)
        theirs, other_spec = pytree.tree_flatten(b)
        return spec == other_spec and all(same(x, y, sized) for x, y in zip(ours, theirs, strict=True))

    def same(x: Any, y: Any, sized: bool) -> bool:
        if _is_size(x) and _is_size(y) and (sized or is_integer(x) or is_integer(y)):
            return True
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            if x in program.input_dependent or y in other.input_dependent:
                return partner.get(moved.get(x, x)) is moved.get(y, y)
            return True  # two tables: compared by what comes of them
        return type(x) is type(y) and x == y

    for a, b in zip(ours, theirs, strict=True):
        sized = operator_name(a.target) in _SIZED
        if a.target != b.target or not match((a.args, a.kwargs), (b.args, b.kwargs), sized):
            return False
        partner[a] = b
    return match(program.outputs, other.outputs, False)


def _data_nodes(program: Program) -> list[fx.Node]:
    data = program.input_dependent
    return [
        n
        for n in program.graph.nodes
        if n in data and n is not program.sequence and operator_name(n.target) not in _MOVES
    ]


def _unmoved(program: Program) -> dict[fx.Node, fx.Node]:
    """What each moved value was before it was moved."""
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if operator_name(node.target) in _MOVES:
            (source,) = node.all_input_nodes[:1]
            found[node] = found.get(source) or source
    return found


def _is_size(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, int) and not isinstance(value, bool))
