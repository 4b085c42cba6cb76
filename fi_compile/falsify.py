"""Try to catch a plan in a wrong number before anybody sees the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .costs import Tiling
from .derive import derive
from .errors import Refusal, Unsupported
from .lane import Lane
from .passes.propose_consistency import Consistency, agrees
from .program import is_tensor
from .step import StepProgram
from .twin import widen_call
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
