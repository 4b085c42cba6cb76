"""What the outputs of a graph look like: sizes and strides as expressions in the batch and the length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .program import as_expr
from .symbolic import evaluate

# One pair of symbols for all graphs, so that the forms of two graphs can be compared.
BATCH, LENGTH = sympy.symbols("batch length", integer=True, positive=True)


@dataclass(frozen=True)
class Form:
    """What one output of the graph looks like: sizes and strides as expressions in the batch and the length.

    An output that is a size itself has ``dtype`` None and itself as its only size.
    """

    dtype: torch.dtype | None
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]

    def at(self, batch: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides for ``batch`` rows of ``length`` positions."""
        symbols = {LENGTH: length, BATCH: batch}
        return _values(self.shape, symbols), _values(self.strides, symbols)

    def bytes_at(self, batch: int, length: int) -> int:
        """Bytes of an output of this form."""
        return math.prod(self.at(batch, length)[0]) * (self.dtype or torch.int64).itemsize

    def bound(self, values: dict[Any, int]) -> Form:
        """The form with symbols replaced by their values."""
        shape, strides = (
            tuple(e.xreplace(values) if isinstance(e, sympy.Basic) else e for e in sizes)
            for sizes in (self.shape, self.strides)
        )
        return Form(self.dtype, shape, strides)

    @property
    def symbols(self) -> set[Any]:
        """The symbols the sizes and strides depend on."""
        return {s for e in (*self.shape, *self.strides) if isinstance(e, sympy.Basic) for s in e.free_symbols}


def form_of(node: Any, symbols: dict[Any, sympy.Symbol]) -> Any:
    """The form of one output of a graph, in canonical symbols; a constant is returned as it is."""

    def canonical(size: Any) -> Any:
        size = as_expr(size)
        return size.xreplace(symbols) if isinstance(size, sympy.Basic) else size

    value: Any = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if isinstance(value, torch.SymInt):
        return Form(None, (canonical(value),), ())
    if not isinstance(value, Tensor):
        return node
    shape, strides = (tuple(canonical(v) for v in sizes) for sizes in (value.shape, value.stride()))
    return Form(value.dtype, shape, strides)


def _values(expressions: tuple[Any, ...], symbols: dict[Any, int]) -> tuple[int, ...]:
    return tuple(e if isinstance(e, int) else evaluate(e, symbols) for e in expressions)
