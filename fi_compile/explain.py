"""Explain a model: run the pipeline and return what it found, whether it is accepted or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .decoder import build_engine
from .errors import Unsupported
from .options import Options, read_options
from .report import Report


def explain(
    model: nn.Module,
    example: Tensor,
    *,
    max_length: int | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Report:
    """The report on a model: every mixer, its proof, its lowering, its cost; or why it is refused.

    ``example``: ids [B, s] or features [B, s, D]. Unlike :func:`decoder` this does not raise for a model that cannot
    be decoded: the report's ``refusals`` say why. Raises :class:`InputError` and :class:`CapacityError` on misuse.
    """
    chosen = read_options(options, max_length=max_length)
    try:
        return build_engine(model, example, chosen).report
    except Unsupported as refused:
        return Report("refused", refusals=refused.refusals)
