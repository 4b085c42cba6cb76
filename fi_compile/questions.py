"""What a model asks of its sizes while it is traced: a branch leaves no other sign in the trace."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode
from torch.overrides import TorchFunctionMode

UNKNOWN = sympy.Symbol("unknown")  # in place of a question that nobody can repeat
UNKNOWN_LENGTH = sympy.Symbol("unknown_length")  # the same, of lengths alone
TORCH = str(pathlib.Path(torch.__file__).parent)
_OF_SHAPES = frozenset({"is_same_size", "is_contiguous", "is_nonzero"})


@contextlib.contextmanager
def questions() -> Iterator[list[sympy.Basic]]:
    """What code outside torch asks of sizes while it is traced: a truth value decides what is traced next.

    So does a number, the dimensions that a squeeze leaves, an error that is caught, and what torch says of shapes.
    """
    asked: list[sympy.Basic] = []
    numbers: Any = SymNode
    answers = numbers.bool_, numbers.int_

    def asking(answer: Callable[[SymNode], Any]) -> Callable[[SymNode], Any]:
        def ask(self: SymNode) -> Any:
            frame, decides = sys._getframe(1), True
            while frame.f_code.co_filename == torch.__file__ and frame.f_back is not None:
                decides &= frame.f_code.co_name != "_assert"  # of guards, as code that torch writes
                frame = frame.f_back  # the methods of symbolic numbers themselves
            if decides and not frame.f_code.co_filename.startswith(TORCH):
                asked.append(self.expr)
            return answer(self)

        return ask

    numbers.bool_, numbers.int_ = map(asking, answers)
    try:
        with _Told(asked):
            yield asked
    finally:
        numbers.bool_, numbers.int_ = answers


class _Told(TorchFunctionMode):
    """Notes what calls tell of sizes without a question."""

    def __init__(self, asked: list[sympy.Basic]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            found = func(*args, **(kwargs or {}))
        except Exception:  # which is caught, if the trace goes on
            self.asked.append(UNKNOWN)
            raise
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in ("squeeze", "squeeze_"):
            x = next(iter((*args, *(kwargs or {}).values())))
            self.asked += [sympy.Eq(n.node.expr, 1) for n in x.shape if isinstance(n, torch.SymInt)]
        elif isinstance(found, bool) and name in _OF_SHAPES:
            self.asked.append(UNKNOWN)
        return found


def called(model: nn.Module, sequence: Tensor) -> list[str] | None:
    """The functions that a model calls for a sequence, by name and in order; None where it fails.

    Two ways through a model differ in them, whatever sends it there: an error that is caught, say.
    """
    with torch.no_grad(), warnings.catch_warnings(), _Names() as names:
        warnings.simplefilter("ignore")
        try:
            model(sequence)
        except Exception:
            return None
    return names.found


class _Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found.append(str(getattr(func, "__name__", func)))
        return func(*args, **(kwargs or {}))
