"""Operands that enter weights over pairs of positions as exponents: ``exp(± a[t] ± b[j] + …)``.

A decay that follows the data is the exponential of a difference of two running sums. For any numbers it is the product
of one exponential for each operand, ``exp(± a[t])·exp(± b[j])·exp(…)``: what multiplies the products is these.
"""

from __future__ import annotations

import torch
from torch import fx

from fi_compile.program import operator_name
from fi_compile.proof import Proof
from fi_compile.twin import widen_call
from fi_compile.units import run_unit

from .groups import Group, uniform_tables
from .lag_tables import scrambled


def exponent_sign(group: Group, node: fx.Node, proof: Proof) -> int:
    """1 or -1 where the group follows ``exp(± value)`` in one factor of each product; 0 where it does not.

    By rule: what comes from the value is affine in it, row by row, up to one exponential, and the exit affine in that.
    By trial at a sampled length, with random numbers for all else: one more in the value is one more or less in every
    exponent.
    """
    before, after = {node}, set[fx.Node]()
    root: fx.Node | None = None
    for n in group.nodes:
        early, late = before.intersection(n.all_input_nodes), after.intersection(n.all_input_nodes)
        if late and (early or not proof.affine_in(n, late)):
            return 0
        if late:
            after.add(n)
        elif early and operator_name(n.target) == "exp":
            if root is not None:
                return 0
            root = n
            after.add(n)
        elif early:
            if not proof.affine_in(n, early) or not proof.row_local(n):
                return 0
            before.add(n)
    if root is None or group.unit.exit not in after:
        return 0
    return _step(group, node, root, proof)


def _step(group: Group, node: fx.Node, root: fx.Node, proof: Proof) -> int:
    """What one more in a value adds to the exponents, if that is 1 or -1 in all of them that are finite."""
    (exponents,) = root.all_input_nodes
    if exponents is node:
        return 1
    known, program = group.analysis.values[group.length], group.program
    generator = torch.Generator().manual_seed(31)
    uniform = uniform_tables(group, proof)
    given = {n: uniform[n] if n in uniform else scrambled(known[n], generator) for n in group.boundary}
    nodes = group.nodes[: group.nodes.index(exponents) + 1]
    batch = known[program.sequence].shape[0]

    def run(more: float) -> torch.Tensor:
        env = {**given, node: given[node] + more}
        with torch.no_grad():
            run_unit(program, nodes, env, length=group.length, batch=batch, rewrite=widen_call)
        return env[exponents]

    try:
        first, second = run(0.0), run(1.0)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return 0
    finite = first.isfinite()
    added = (second - first)[finite]
    if not added.numel() or not bool((second[~finite] == first[~finite]).all()):
        return 0
    sign = round(float(added[0]))
    return sign if abs(sign) == 1 and bool(((added - sign).abs() < 1e-9).all()) else 0
