"""Size expressions evaluated at many lengths at once: conditions are checked, never decided symbolically."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from sympy.printing.numpy import NumPyPrinter

_NUMPY = [
    {
        "FloorDiv": lambda a, b: np.floor_divide(a, b),
        "CleanDiv": lambda a, b: np.floor_divide(a, b),
        "ModularIndexing": lambda a, b, c: (a // b) % c,
        "PythonMod": lambda a, b: np.mod(a, b),
        "Mod": lambda a, b: np.mod(a, b),
        "CeilToInt": lambda a: np.ceil(a).astype(np.int64),
        "FloorToInt": lambda a: np.floor(a).astype(np.int64),
        "TruncToInt": lambda a: np.trunc(a).astype(np.int64),
        "RoundToInt": lambda a: np.rint(a).astype(np.int64),
        "ToFloat": lambda a: np.asarray(a, dtype=np.float64),
        "IntTrueDiv": lambda a, b: np.true_divide(a, b),
        "FloatTrueDiv": lambda a, b: np.true_divide(a, b),
        "PowByNatural": lambda a, b: np.power(a, b),
        "FloatPow": lambda a, b: np.power(np.asarray(a, dtype=np.float64), b),
        "LShift": lambda a, b: np.left_shift(a, b),
        "RShift": lambda a, b: np.right_shift(a, b),
        "BitwiseFn_bitwise_and": lambda a, b: np.bitwise_and(a, b),
        "BitwiseFn_bitwise_or": lambda a, b: np.bitwise_or(a, b),
        "OpaqueUnaryFn_log2": lambda a: _log2(np.asarray(a, dtype=np.float64)),
        "Max": lambda *a: _fold(np.maximum, a),
        "Min": lambda *a: _fold(np.minimum, a),
        "Where": lambda c, a, b: np.where(c, a, b),
        "Identity": lambda a: a,
    },
    "numpy",
]


def _log2(x: np.ndarray) -> np.ndarray:
    """Whole at powers of two, as Python's: the vector form of a logarithm need not be."""
    mantissa, exponent = np.frexp(x)
    return np.where(mantissa == 0.5, exponent - 1.0, np.log2(x))


def _fold(combine: Any, values: tuple[Any, ...]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result


class _Printer(NumPyPrinter):
    """As sympy's, but conjunctions and disjunctions of truth values that follow a length and some that do not."""

    def _print_And(self, expr: Any) -> str:
        return f"({' & '.join(self._print(a) for a in sorted(expr.args, key=str))})"

    def _print_Or(self, expr: Any) -> str:
        return f"({' | '.join(self._print(a) for a in sorted(expr.args, key=str))})"


@lru_cache(maxsize=4096)
def _compiled(expr: sympy.Basic, symbols: tuple[sympy.Symbol, ...]) -> Any:
    settings = {
        "fully_qualified_modules": False,
        "inline": True,
        "allow_unknown_functions": True,
        "user_functions": {name: name for name in _NUMPY[0]},
    }
    return sympy.lambdify(symbols, expr, modules=_NUMPY, printer=_Printer(settings))


@lru_cache(maxsize=4096)
def _symbols(expr: sympy.Basic) -> tuple[Any, ...]:
    return tuple(sorted(expr.free_symbols, key=str))


def evaluate(expr: Any, at: Mapping[Any, int]) -> int:
    """``expr`` (sympy or number) at one value of each of its symbols."""
    if not isinstance(expr, sympy.Basic):
        return int(expr)
    symbols = _symbols(expr)
    return int(_compiled(expr, symbols)(*[at[s] for s in symbols]))


def evaluate_at(expr: Any, at: Mapping[Any, Any], shape: tuple[int, ...]) -> np.ndarray:
    """``expr`` (sympy or number) at the given values of its symbols, broadcast to ``shape``.

    Raises ``KeyError`` where the expression has a symbol ``at`` does not name.
    """
    if not isinstance(expr, sympy.Basic):
        return np.broadcast_to(np.asarray(expr), shape)
    symbols = _symbols(expr)
    unknown = [s for s in symbols if s not in at]
    if unknown:
        raise KeyError(f"{expr} depends on {unknown[0]}, which is not a length of this program")
    return np.broadcast_to(np.asarray(_compiled(expr, symbols)(*[at[s] for s in symbols])), shape)


def one_array(value: np.ndarray) -> np.ndarray:
    """The array of these entries that is in use already: there are few, and each has an entry for every length."""
    key = value.shape, value.dtype, value.flat[:: max(1, value.size // 16)].tobytes()
    known = _in_use.get(key)
    if known is not None and (known is value or np.array_equal(known, value)):
        return known
    value = value.copy() if value.base is not None else value
    value.flags.writeable = False
    _in_use[key] = value
    return value


_in_use: weakref.WeakValueDictionary[Any, np.ndarray] = weakref.WeakValueDictionary()
