"""How large entries may be: a softmax forgives a very low score only beside one of ordinary size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from fi_compile.facts import EXTREME, LARGE, LOW, ORDINARY, is_number

from .call import Call

# Of ordinary size whatever comes in.
BOUNDED = frozenset((
    "softmax", "_softmax", "scaled_dot_product_attention", "sigmoid", "tanh", "erf", "hardtanh", "relu6",
    "hardsigmoid", "sign", "sgn", "sin", "cos", "softsign", "layer_norm", "native_layer_norm", "rms_norm",
    "one_hot", "zeros_like", "ones_like", "new_zeros", "new_ones", "arange", "eye",
))  # fmt: skip
# What is very low becomes of ordinary size.
LIFTING = frozenset(("exp", "exp2", "relu", "softplus", "elu", "celu", "selu"))
# What is very low stays so: these never change a sign.
KEEPING = frozenset((
    "add", "where", "masked_fill", "maximum", "minimum", "amax", "amin", "max", "min", "clone", "contiguous", "alias",
    "detach", "detach_", "to", "_to_copy", "type_as", "lift_fresh_copy", "view", "reshape", "_unsafe_view", "flatten",
    "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "slice", "select",
    "narrow", "index", "index_select", "embedding", "gather", "cat", "stack", "repeat", "split", "chunk",
    "unbind", "getitem", "constant_pad_nd", "pad", "full", "scalar_tensor", "fill", "copy", "full_like",
    "new_full", "sum", "cumsum", "movedim", "t", "log_softmax", "_log_softmax", "logsumexp", "log_sigmoid",
))  # fmt: skip
LOGARITHMS = frozenset(("log", "log2", "log10", "logit", "atanh", "xlogy", "log1p"))
# Infinite at 0.
POLES = LOGARITHMS | frozenset(
    ("div", "true_divide", "reciprocal", "rsqrt", "pow", "float_power", "tan", "atan2")
)


def magnitude(c: Call, levels: Sequence[int], own: bool = True) -> int:
    """How large the result may be for tensor arguments of these magnitudes; ``own``: they are those of ``c``."""
    dtype = _dtype(c.node)
    # An integer of 64 bits is below LARGE, whatever was cast to it.
    if c.name in BOUNDED or (dtype is not None and not (dtype.is_floating_point or dtype.is_complex)):
        return ORDINARY
    numbers = [_level(v) for v in _numbers(c)]
    level = max([*levels, *numbers], default=ORDINARY)
    if c.name in POLES and level == ORDINARY:
        if c.context.is_data(c.node):
            return LOW if c.name in LOGARITHMS else ORDINARY
        return of_table(c.context.table(c.node)) if own and _by_tensor(c) else ORDINARY
    if level == LOW:
        if c.name in LIFTING:
            return ORDINARY
        positive = c.name in ("mul", "div") and not any(numbers) and _positive(c)
        lowered = c.name == "sub" and len(levels) > 0 and _minuend_only(c, levels, numbers)
        return LOW if c.name in KEEPING or positive or lowered else EXTREME
    return level


def of_table(table: Tensor | None) -> int:
    """The magnitude of known values."""
    if table is None:
        return EXTREME
    if not (table.is_floating_point() or table.is_complex()) or table.numel() == 0:
        return ORDINARY
    if bool((table.abs() <= LARGE).all()):
        return ORDINARY
    return LOW if not table.is_complex() and bool((table <= LARGE).all()) else EXTREME


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta["val"], "dtype", None)


def _numbers(c: Call) -> Iterator[Any]:
    for value in c.arguments.values():
        for v in value if isinstance(value, (list, tuple)) else [value]:
            if is_number(v) or isinstance(v, complex):
                yield v


def _level(number: Any) -> int:
    if isinstance(number, complex):
        return ORDINARY if abs(number) <= LARGE else EXTREME
    if abs(number) <= LARGE or c_max(number):
        return ORDINARY
    return LOW if number < 0 else EXTREME


def c_max(number: Any) -> bool:
    """The greatest 64-bit integer: how an open slice is written."""
    return isinstance(number, int) and number == 2**63 - 1


def _by_tensor(c: Call) -> bool:
    return c.name not in ("div", "true_divide") or isinstance(c.arg("other"), fx.Node)


def _positive(c: Call) -> bool:
    return any(is_number(c.arg(k)) and c.arg(k) > 0 for k in ("self", "other"))


def _minuend_only(c: Call, levels: Sequence[int], numbers: Sequence[int]) -> bool:
    nodes = c.tensors()
    if len(nodes) != len(levels) or any(numbers) or not (is_number(c.arg("alpha")) and c.arg("alpha") == 1):
        return False
    return all(
        level == ORDINARY or node is c.arg("self") for node, level in zip(nodes, levels, strict=True)
    ) and (c.arg("self") is not c.arg("other"))
