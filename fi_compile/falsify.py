"""Try to catch a model or a plan in a wrong number before anybody sees the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .costs import Tiling
from .derive import derive
from .errors import Refusal, Unsupported
from .lane import Lane
from .passes.propose_consistency import Consistency, agrees
from .program import Kind, Program, is_tensor
from .step import StepProgram
from .twin import random_sequence, widen_call
from .units import Plan, take_row


def check_step(analysis: Consistency, plan: Plan, tiling: Tiling) -> None:
    """Decode the sampled sequence in double precision, tiled so, and compare every output at every position.

    Raises :class:`Unsupported` when the step program does not reproduce the model.
    """
    program, n = analysis.program, analysis.longest
    values, step = analysis.values[n], StepProgram(program, plan, n)
    sequence = values[program.sequence]
    twin = derive(
        step,
        analysis.parameters,
        {mixer.name: mixer.derive(analysis.parameters, n) for mixer in step.mixers},
        dtype=torch.float64,
        tiling=tiling,
        batch=sequence.shape[0],
        rewrite=widen_call,
    )
    lane = Lane(twin, sequence.shape[0])
    for t in range(n):
        found = lane.step(sequence[:, t : t + 1], lambda: step(lane.tensors, widen_call))
        for node, value in zip(program.outputs, found, strict=True):
            expected = _expected(analysis, plan, node, t)
            if expected is not None and not agrees(value, expected, 1e-9, values[node]):
                raise Unsupported(
                    Refusal(
                        "internal",
                        f"the derived step disagrees with the model at position {t} of {node.name!r}",
                        (node.name,),
                        hint="please report this model: the analysis accepted a plan that is wrong",
                    )
                )


def _expected(analysis: Consistency, plan: Plan, node: Any, t: int) -> Tensor | None:
    if not is_tensor(node):
        return None
    axes = plan.axes[node]
    if axes:
        return take_row(analysis.values[analysis.longest][node], axes[0], t)
    return analysis.values.get(t + 1, {}).get(node)


def rows_apart(analysis: Consistency, plan: Plan) -> bool:
    """Whether one row of a batch keeps its outputs when the others change, on random sequences."""
    n = analysis.lengths[0]
    program, values = analysis.program, analysis.parameters
    if isinstance(program.batch, int):
        return False
    outputs = [o for o in program.outputs if isinstance(o, fx.Node)]
    mixers = [u.mixer for u in plan.units if u.mixer is not None]
    kept = [*plan.histories, *(x for mixer in mixers for x in mixer.inputs)]
    if not all(len(plan.batch_axes[n]) == 1 for n in (*outputs, *kept) if n in program.input_dependent):
        return False
    sequence = random_sequence(program, 3, n, seed=0)
    other = random_sequence(program, 3, n, seed=1)
    other[1] = sequence[1]
    with torch.no_grad():
        first = program.evaluate(sequence, values, keep=outputs, rewrite=widen_call)
        second = program.evaluate(other, values, keep=outputs, rewrite=widen_call)
    return all(
        agrees(second[o].select(a, 1), first[o].select(a, 1)) for o in outputs for a in plan.batch_axes[o]
    )


def check_finite(program: Program) -> None:
    """Raise :class:`Unsupported` where a parameter has NaN or infinite values."""
    for spec in program.inputs:
        value = program.values.get(spec.name)
        if spec.kind is not Kind.PARAMETER or value is None or value.dtype in _WHOLE:
            continue
        if not bool(torch.isfinite(value).all()):
            raise Unsupported(
                Refusal(
                    "weights",
                    f"parameter {spec.path!r} has NaN or infinite values",
                    hint="load finite weights; nothing can be compared with a model that computes NaN",
                )
            )


_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
