"""Branches on the length and the batch: whether the model does the same where a trace is not valid.

A trace records Python's control flow for the length it met; its guards say which other lengths follow the same path.
Every length that they leave out is covered by another trace, made there, or is not decoded: below the range, at single
holes, and at some of every k lengths. Where a trace makes the very same calls, the program's own lengths grow by those
of that trace. Where it applies the same operators to its data and only sizes, paddings and tables differ, random input
says all there is to say, and the two are compared (:mod:`fi_compile.compare`) at each of these lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min

from .alike import are_alike, is_same
from .errors import Refusal, Unsupported
from .guards import HORIZON, from_whole_sizes, lengths_of
from .passes.prove_prefix import prove_prefix
from .program import Program, as_expr, is_integer, is_tensor
from .questions import UNKNOWN
from .single import same_at_one

_IRREGULAR = (Max, Min, FloorDiv, CleanDiv)  # of which a length of 1 may be an exception
_MOST_TRACES = 12
_MOST_SINGLE = 24  # traces for one length
_MOST_COLLISIONS = 4
_SHORTEST = 2  # a trace is for no length of 1: see `_Walk.settle_one`
_MOST_POSITIONS = 1 << 19  # that are compared one length after another
_MOST_FAILING = 64  # lengths from the shortest on at which a trace may fail
_LONGEST_COMPARED = 1 << 16

Trace = Callable[..., Program]


def cover_lengths(
    program: Program,
    trace: Trace,
    compare: Callable[[Program, Sequence[int]], list[int]],
    near: int,
    odd: Iterable[int] = (),
    look: Callable[[Program, int], None] | None = None,
) -> Program:
    """The program with the lengths at which the model does what it shows.

    ``trace(n, general=True)`` traces the model at length n without the guards of torch's own, see
    :func:`~.exporting.export_module`, ``trace(n, pinned=True)`` for that length alone; ``compare(program, lengths)``
    names those at which model and program differ on random input, as they are known to at ``odd``. Of what is left,
    lengths above ``near`` end the range, and shorter ones raise the fewest positions. Before any trace is made the
    program is shown to ``look``, with ``near``, which may raise.
    """
    walk = _Walk(program, trace, near)
    if look is not None and not walk.known.all():
        look(program, near)
    for n in odd:
        walk.give_up(n)
    walk.run()
    walk.settle_one()
    found, unlike = walk.program, walk.unlike
    if walk.alike:
        unlike = [*unlike, *compare(found, sorted(walk.alike))]
    if any(n <= near and n % program.lengths.period in program.lengths.left_out for n in unlike):
        raise Unsupported(_sparse(program.lengths.period))
    above, below = [n for n in unlike if n > near], [n for n in unlike if n <= near]
    lengths = found.lengths
    if above:
        end = min(above) - 1
        lengths = replace(lengths, maximum=end, holes=frozenset(h for h in lengths.holes if h <= end))
    return replace(found, lengths=replace(lengths, fewest=max([lengths.fewest - 1, *below]) + 1))


class _Walk:
    """What is known of every length: followed by the program, alike, or unlike."""

    def __init__(self, program: Program, trace: Trace, near: int) -> None:
        self.program, self.trace, self.near = program, trace, near
        self.top = program.lengths.maximum or HORIZON
        self.known = program.lengths.mask(self.top)
        self.known[:_SHORTEST] = True
        self.alike: set[int] = set()
        self.unlike: list[int] = []
        self.admitted = program.lengths.mask(self.top)
        self.traces, self.single = 0, 0
        self.holes = set(program.lengths.holes)  # of all traces so far
        self.one_is_settled = answers_one_alike(program)

    def run(self) -> None:
        while not self.known.all():
            n = self.next_length()
            other = self.trace_with(n)
            if other is None:
                self.give_up(n)
                continue
            self.holes |= other.lengths.holes
            reached = other.lengths.mask(self.top) & ~self.known
            reached[n] = True
            at = reached.nonzero()[0]
            if is_same(self.program, other, at):
                self.admitted |= reached
            elif not self.is_alike(other, at):
                self.give_up(n)
                continue
            self.known |= reached
            self.one_is_settled = self.one_is_settled or answers_one_alike(other)
        before = self.program.lengths
        lengths = lengths_of(self.admitted, self.admitted)
        if lengths is not None:
            end = before.maximum if lengths.maximum is None else lengths.maximum
            of = self.program
            lengths = from_whole_sizes(lengths, of.graph.nodes, of.length, of.batch)
            self.program = replace(self.program, lengths=replace(lengths, fewest=before.fewest, maximum=end))

    def settle_one(self) -> None:
        """Cut off the length of 1 where the model takes a way there that no trace has shown to be the same.

        Operators go other ways there themselves, so no trace is for it and for more; one for it alone may be alike.
        """
        before = self.program.lengths
        if any(n <= self.near for n in self.unlike) or 1 % before.period in before.left_out:
            return
        if not is_regular_at_one(self.program, self.near):
            self.unlike.append(1)
            return
        if self.one_is_settled:
            return
        try:
            one = self.trace(1, pinned=True)
        except Exception:
            one = None
        if one is None or not (same_at_one(self.program, one) or are_alike(self.program, one, {1})):
            self.unlike.append(1)

    def is_alike(self, other: Program, at: np.ndarray) -> bool:
        """Whether comparing the program with the model at some of these lengths settles all of them; notes which.

        All, where they are few and short. Else the longest: other lengths of the same trace, which is certified to
        agree with itself at all lengths, then follow from that one.
        """
        if not are_alike(self.program, other, {int(at[0]), int(at[-1])}):
            return False
        if at.sum() <= _MOST_POSITIONS:
            self.alike |= set(map(int, at))
            return True
        longest = int(at[-1])
        if longest > _LONGEST_COMPARED:
            return False
        proof = prove_prefix(other, longest)
        self.alike |= {int(at[0]), longest}
        return all(proof.proved(o) for o in other.outputs if is_tensor(o))

    def next_length(self) -> int:
        """The longest unknown length within the next period; else the shortest beyond."""
        unknown = (~self.known).nonzero()[0]
        within = unknown[unknown <= self.near + self.program.lengths.period]
        return int(within[-1] if within.size else unknown[0])

    def trace_with(self, n: int) -> Program | None:
        """A trace that admits ``n``, made there or, where that meets a size of the model, a little below."""
        if n not in self.holes:
            for m in range(n, max(n - _MOST_COLLISIONS, _SHORTEST), -1):
                if self.traces >= _MOST_TRACES:
                    break
                self.traces += 1
                try:
                    found = self.trace(m, general=True)
                except Exception:
                    continue
                if found.lengths.admits(n):
                    return found
        if self.single >= _MOST_SINGLE:
            return None
        self.single += 1
        try:
            return self.trace(n, pinned=True)
        except Exception:
            return None

    def give_up(self, n: int) -> None:
        """Nothing is known of what the model does at this length: shorter ones, or longer ones, are cut off."""
        self.unlike.append(n)
        if n <= self.near:
            self.known[: n + 1] = True
        else:
            self.known[n:] = True
            self.admitted[n:] = False


def from_where_it_runs(program: Program) -> Program:
    """The program begun at the first length it runs at: `x[:, [-1, -3]]` leaves no guard."""
    example, shortest = program.example, program.lengths.minimum
    for n in program.lengths.upto(shortest + _MOST_FAILING):
        shape = (example.shape[0], int(n), *example.shape[2:])
        try:
            with torch.no_grad():
                program.evaluate(example.new_zeros((1,) * len(shape)).expand(shape))
        except IndexError:
            shortest = int(n) + 1
    return replace(program, lengths=replace(program.lengths, minimum=shortest))


def answers_one_alike(program: Program) -> bool:
    """Whether the model's own code, where it asks something of its sizes, is told the same at a length of 1."""
    if program.questions is None:
        return False
    shortest = program.lengths.at_least(_SHORTEST)
    lengths = np.asarray([1, shortest])
    try:
        for question in program.questions:
            for rows in (1, 3):
                one, more = program.size_values(question, lengths, rows)
                if one != more:
                    return False
    except KeyError:  # a size that is counted from values
        return False
    return True


def is_regular_at_one(program: Program, capacity: int) -> bool:
    """Whether the first row that the graph computes of many positions is what it computes of one position.

    ``max(s, 2) - s`` is 0 at every length but 1. Where a number in the graph is such a one, that takes a proof.
    """
    numbers = (as_expr(node) for node in program.graph.nodes if is_integer(node))
    if not any(isinstance(n, sympy.Basic) and n.atoms(*_IRREGULAR) for n in numbers):
        return True
    from_one = replace(program, lengths=replace(program.lengths, minimum=1, fewest=1))
    try:
        proof = prove_prefix(from_one, capacity)
    except (Unsupported, ValueError, ZeroDivisionError, RuntimeError):
        return False
    return all(proof.proved(o) for o in program.outputs if is_tensor(o))


def matters_for_one_row(asked: Iterable[sympy.Basic], program: Program) -> bool:
    """Whether a question that the model's own code asked of its sizes has another answer for one row of a batch."""
    lengths = program.lengths.upto(HORIZON)
    for question in asked:
        if question == UNKNOWN:
            return True
        if program.batch not in question.free_symbols:
            continue
        one, two = (program.size_values(question, lengths, rows) for rows in (1, 2))
        if not np.array_equal(one, two):
            return True
    return False


def follows_rows(program: Program, trace: Callable[..., Program], rows: int, length: int) -> bool:
    """Whether the model does the same to so many rows at a length; ``trace(length, rows, True)`` traces it there."""
    try:
        return is_same(program, trace(length, rows, True), np.asarray([length]), (rows,))
    except Exception:
        return False


def follows_one_row(program: Program, trace: Callable[[], Program]) -> bool:
    """Whether the model does the same to a batch of one row; ``trace()`` traces it there."""
    try:
        other = trace()
    except Exception:
        return False
    ours, theirs = program.lengths.mask(HORIZON), other.lengths.mask(HORIZON)
    if (ours & ~theirs).any():
        return False
    return is_same(program, other, ours.nonzero()[0], (1,)) or are_alike(program, other, ())


def _sparse(period: int) -> Refusal:
    return Refusal(
        "lengths",
        f"the model does something else at some of every {period} lengths",
        hint="let a branch on the length choose sizes only: pad and cut, nothing else",
    )
