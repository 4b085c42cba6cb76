"""The certificate's table: how facts pass through each ATen operator, one file per family."""

from . import (  # noqa: F401
    contract,
    convolution,
    create,
    lookup,
    pointwise,
    reduce,
    slices,
    spectra,
    views,
)
from .call import RULES, Call, Context, Rule, rule

__all__ = ["RULES", "Call", "Context", "Rule", "rule"]
