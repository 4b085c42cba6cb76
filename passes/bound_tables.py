"""analyse: tables no rule can certify, bounded by evaluating them at every length there is.

A table that depends on no input, but is made by a transform whose length follows the sequence (a rational filter,
``irfft(rfft(b, n) / rfft(a, n), n)``), differs between lengths by its aliased tail. It has finitely many versions:
one a length. If all of them agree with the one at the capacity up to rounding, the difference is no larger than
what computing it twice would give, and the certificate may lean on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from fi_compile.passes.propose_consistency import Consistency, narrowed
from fi_compile.program import is_tensor
from fi_compile.twin import TwinValues, widen_call

_ROUNDING = 1e-12  # of the table's norm
_MOST_LENGTHS = 20_000


def bound_tables(
    analysis: Consistency, is_proved: Callable[[fx.Node], bool], capacity: int
) -> dict[fx.Node, float]:
    """Tables without a certificate whose versions at all lengths up to ``capacity`` agree, with the bound.

    The bound is the largest difference, in double precision on the present weights, over the table's norm. Requires:
    the numeric proposal. Ensures: every admitted length was evaluated; a table that exceeds rounding is left out.
    """
    program = analysis.program
    lengths = [int(n) for n in program.lengths.upto(capacity)]
    if not lengths or len(lengths) > _MOST_LENGTHS:
        return {}
    values = TwinValues(program)
    return {
        node: bound
        for node in _unproved_tables(analysis, is_proved)
        if (bound := _spread(analysis, node, lengths, values)) <= _ROUNDING
    }


def _unproved_tables(analysis: Consistency, is_proved: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Consistent input-independent values made directly from inconsistent ones."""
    program = analysis.program
    return [
        node
        for node in program.graph.nodes
        if node in analysis.consistent
        and node not in program.input_dependent
        and len(analysis.axes[node].rows) == 1
        and not is_proved(node)
        and any(is_tensor(a) and a not in analysis.consistent for a in node.all_input_nodes)
    ]


def _spread(analysis: Consistency, node: fx.Node, lengths: list[int], values: Mapping[str, Tensor]) -> float:
    program, rows = analysis.program, analysis.axes[node].rows

    def at(length: int) -> Tensor:
        example = program.example
        shape = (example.shape[0], length, *example.shape[2:])
        sequence = example.new_zeros((1,) * len(shape)).expand(shape)
        table = program.evaluate(sequence, values, keep=[node], rewrite=widen_call)[node]
        return table if table.is_floating_point() or table.is_complex() else table.double()  # signs, masks

    with torch.no_grad():
        longest = at(lengths[-1])
        norm = float(torch.linalg.vector_norm(longest))
        worst = 0.0
        for length in reversed(lengths[:-1]):
            worst = max(worst, float((at(length) - narrowed(longest, rows, length)).abs().max()))
            if not worst <= _ROUNDING * norm:
                return float("inf")
    return worst / max(norm, 1e-300)
