"""Programs in the form the analysis knows best: the same function, in other operators."""

from __future__ import annotations

from collections.abc import Mapping

from .heads import with_heads_apart
from .latest import with_latest_delayed
from .mixers.attention import with_masks, with_operands_apart
from .mixers.spectra import with_taps
from .pieces import with_pieces_apart
from .program import Program
from .quotients import with_quotients_masked
from .softmaxes import with_softmaxes_bare
from .sums import with_sums_plain
from .written import with_writes_resolved

_FIRST = (
    with_writes_resolved,
    with_sums_plain,
    with_heads_apart,
    with_quotients_masked,
    with_softmaxes_bare,
    with_latest_delayed,
    with_pieces_apart,
)


def rewritten(program: Program) -> tuple[Program, Mapping[str, float]]:
    """The program after all rewrites, and what was left out of which spectrum: a share of its norm."""
    for rewrite in _FIRST:
        program = rewrite(program)
    program, dropped = with_taps(program)
    return with_operands_apart(with_masks(program)), dropped
