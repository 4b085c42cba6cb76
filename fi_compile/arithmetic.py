"""Arithmetic on a length that would pin it, kept symbolic while a model is traced.

Transforms are often as long as the next power of two: ``1 << (n - 1).bit_length()``, ``2 ** math.ceil(math.log2(n))``,
``2 ** int(np.ceil(np.log2(n)))``. Python asks for the number there, and a trace would hold for that number alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._export import verifier

_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sympy", "fi_compile"}) - {"__main__"}
_log2: Callable[[Any], Any] = torch._sym_log2  # type: ignore[attr-defined]


def _log(x: Any, base: Any = math.e) -> Any:
    return _log2(x) if base == 2 else math.log(float(x), base)


def _or_else(symbolic: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``plain`` for plain arguments."""
    return lambda *a, **k: symbolic(*a) if a and isinstance(a[0], _SYMBOLIC) else plain(*a, **k)


# What a model calls, by library and name, and what takes a symbolic length in its place.
STAND_INS: tuple[tuple[str, str, Any], ...] = (
    ("math", "log2", _or_else(_log2, math.log2)),
    ("math", "log", _or_else(_log, math.log)),
    ("numpy", "log2", _or_else(_log2, np.log2)),
    ("numpy", "ceil", _or_else(math.ceil, np.ceil)),
    ("numpy", "floor", _or_else(math.floor, np.floor)),
)


def _bit_length(n: torch.SymInt) -> Any:
    return math.floor(_log2(n)) + 1


@contextlib.contextmanager
def logarithms_kept() -> Iterator[None]:
    """Lengths know how many bits they have, and ``torch.export`` lets a graph compute a logarithm of one."""
    changed: list[tuple[Any, str, Any]] = [(torch.SymInt, "bit_length", _bit_length)]
    for checks in vars(verifier).values():
        if isinstance(checks, type) and "allowed_op_types" in vars(checks):
            allowed = checks.allowed_op_types  # type: ignore[attr-defined]
            more = lambda self, of=allowed: (*of(self), types.FunctionType)  # noqa: E731
            changed.append((checks, "allowed_op_types", more))
    with attributes_changed(changed):
        yield


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)

    def __call__(cls, value: Any = 0, *base: Any) -> Any:
        if isinstance(value, _SYMBOLIC):
            return value if isinstance(value, torch.SymInt) else math.trunc(value)
        return int(value, *base)


class _Int(int, metaclass=_Kind):
    """``int``, but a symbolic length stays what it is."""


@contextlib.contextmanager
def integers_kept(model: nn.Module) -> Iterator[bool]:
    """``int(n)`` of a length is that length, in the modules a model is written in; whether any of them says so."""
    modules = [m for m in _written_in(model) if "int" not in m and any(map(_says_int, m.values()))]
    for module in modules:
        module["int"] = _Int
    try:
        yield bool(modules)
    finally:
        for module in modules:
            del module["int"]


def _written_in(model: nn.Module) -> list[dict[str, Any]]:
    """The names of the modules that define a model's classes and functions, and of those they refer to."""
    held = [value for part in model.modules() for value in (type(part), *vars(part).values())]
    first = _homes(held)
    return list({**first, **_homes(v for names in first.values() for v in list(names.values()))}.values())


def _homes(values: Iterable[Any]) -> dict[str, dict[str, Any]]:
    named = {
        v.__name__ if isinstance(v, types.ModuleType) else getattr(v, "__module__", None) for v in values
    }
    own = [
        n for n in named if isinstance(n, str) and n.partition(".")[0] not in _LIBRARIES and n in sys.modules
    ]
    return {name: vars(sys.modules[name]) for name in own}


def _says_int(value: Any) -> bool:
    if isinstance(value, type):
        return any(
            _says_int(getattr(v, "__func__", v)) for v in vars(value).values() if not isinstance(v, type)
        )
    return isinstance(value, types.FunctionType) and _names_int(value.__code__)


def _names_int(code: types.CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return "int" in code.co_names or any(map(_names_int, inner))


@contextlib.contextmanager
def attributes_changed(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes as (owner, name, value) for a while, and then as they were."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
