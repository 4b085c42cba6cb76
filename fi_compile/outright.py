"""Refusals that no trace can lift: for reasons other than lengths, and of models that run at few lengths only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import Refusal, Unsupported
from .passes.propose_consistency import explain_inconsistency, propose_consistency
from .passes.prove_prefix import prove_prefix
from .program import Program, is_tensor
from .questions import called
from .rewritten import rewritten

_LONGEST_CHUNK = 128
_SEEN = ("non_causal", "mixes_rows")  # on random input, at one length


class Outright(Unsupported):
    """A refusal that no other trace of the model can lift."""


def refuse_outright(program: Program, capacity: int) -> None:
    """Raise :class:`Outright` where the model is refused whatever it does at lengths that the trace leaves out.

    A value sees the future at a length that the trace admits, or an operator without a rule is on the way of the data
    to an output.
    """
    program, _ = rewritten(program)
    admitted = program.lengths.at_least(capacity)
    if admitted is None:
        return
    analysis, proof = propose_consistency(program), prove_prefix(program, admitted)
    if not analysis.outputs_agree:
        seen = explain_inconsistency(analysis)
        if seen.kind in _SEEN:
            raise Outright(*proof.beside(seen))
        return
    if all(proof.proved(o) or proof.newest(o) for o in program.outputs if is_tensor(o)):
        return
    data = {node.name for node in program.input_dependent}
    if any(r.kind == "unknown_operator" and data.issuperset(r.nodes) for r in proof.refusals):
        raise Outright(*proof.refusals)


def refuse_whole_chunks(model: nn.Module, example: Tensor) -> Refusal | None:
    """The refusal of a model that runs at multiples of a number of positions only; None of one that does not.

    ``example``: a sequence of any length, whose rows are repeated.
    """

    def runs(length: int) -> bool:
        at = torch.arange(length, device=example.device) % example.shape[1]
        return called(model, example[:, at]) is not None

    chunk = next((n for n in range(1, _LONGEST_CHUNK + 1) if runs(n)), 1)
    if chunk == 1 or not all(runs(n) for n in (2 * chunk, 3 * chunk)):
        return None
    if any(runs(n) for n in (chunk + 1, 2 * chunk - 1, 3 * chunk + 1)):
        return None
    return Refusal(
        "lengths",
        f"the forward runs at multiples of {chunk} positions only: there is no next position to decode",
        hint=f"pad to whole chunks of {chunk} in the forward, and cut what is returned",
    )
