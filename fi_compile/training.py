"""Training graphs: long convolutions spelled with transforms become one operator, and the rest stays as it is.

Before::

    %u_f  = fft_rfft(%u, n=2*s)
    %k_f  = fft_rfft(%k, n=2*s)
    %p    = mul(%u_f, %k_f)
    %full = fft_irfft(%p, n=2*s)
    %y    = getitem(%full, (..., slice(None, s)))

After::

    %full = causal(%u, %k, -1, -1, 'float32')  # kernels.long_conv: no spectra are kept for the backward pass
    %y    = getitem(%full, (..., slice(None, s)))

A product of spectra is rewritten only where it is that convolution at every length the graph admits: both transforms
and the inverse have one length n >= len(u) + len(k) - 1, so that nothing wraps around, no more than len(u) positions
are read, and nothing writes into u, k or their spectra. What cannot be shown so is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .kernels.long_conv import long_conv

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul")
_QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div")
# The power of n by which a forward transform, then an inverse one, differs from torch's default.
_FORWARD = {None: 0, "backward": 0, "ortho": Fraction(-1, 2), "forward": -1}
_INVERSE = {None: 0, "backward": 0, "ortho": Fraction(1, 2), "forward": 1}


@dataclass(frozen=True)
class _Spectrum:
    """The transform of length `n` of `signal` along `dim`, with factors: (multiplied or divided by, a number)."""

    signal: fx.Node
    n: Any
    dim: int
    power: Fraction
    factors: tuple[tuple[Any, Any], ...]


def use_long_conv(gm: fx.GraphModule, precision: str = "float32") -> int:
    """Rewrite a Dynamo graph in place; return how many convolutions were found.

    Requires ``meta["example_value"]`` on its nodes. Ensures: the same function up to rounding, with gradients.
    ``precision``: of products on matrix units, see :class:`Options`.
    """
    found = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is torch.fft.irfft:
            found += _rewrite(gm.graph, node, precision)
    if found:
        gm.graph.lint()
        gm.recompile()
    return found


def _rewrite(graph: fx.Graph, inverse: fx.Node, precision: str) -> bool:
    bound = _bind(inverse, ("input", "n", "dim", "norm"), {"n": None, "dim": -1, "norm": None})
    product, out, n = bound["input"], _value(inverse), _value(bound["n"])
    if not isinstance(out, Tensor) or n is None or not isinstance(bound["dim"], int):
        return False
    if bound["norm"] not in _INVERSE or not _is_call(product, _PRODUCTS) or len(product.args) != 2:
        return False
    if _written(product):
        return False
    u, k = (_spectrum(a) for a in product.args)
    if u is None or k is None:
        return False
    # The filter is the one that is the same for all rows: fewer dimensions, or sizes of one.
    if _spread(u.signal) < _spread(k.signal):
        u, k = k, u
    dim = bound["dim"] % out.dim()
    if not _fits(u, k, n, dim, out) or not _reads_at_most(inverse, dim, _value(u.signal).shape[u.dim]):
        return False
    with graph.inserting_before(inverse):
        y = graph.call_function(causal, (u.signal, k.signal, u.dim - out.dim(), k.dim, precision))
        y.meta["example_value"] = out.narrow(dim, 0, _value(u.signal).shape[u.dim])
        power = Fraction(u.power + k.power + _INVERSE[bound["norm"]])
        factors = [*u.factors, *k.factors]
        if power:
            exponent = int(power) if power.denominator == 1 else float(power)
            factors.append((operator.mul, graph.call_function(operator.pow, (bound["n"], exponent))))
        for apply, factor in factors:
            scaled = graph.call_function(apply, (y, factor))
            scaled.meta["example_value"] = y.meta["example_value"]
            y = scaled
    inverse.replace_all_uses_with(y)
    _erase(graph, inverse)
    return True


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a transform that nobody uses any more, and what led to it alone.

    Not all dead code: to fx, an operation in place whose result is not used is dead as well.
    """
    pure = (torch.fft.rfft, torch.fft.irfft, *_PRODUCTS, *_QUOTIENTS)
    waiting, erased = [node], set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or not _is_call(node, pure) or not isinstance(_value(node), Tensor):
            continue
        waiting += node.all_input_nodes
        erased.add(node)
        graph.erase_node(node)


def causal(u: Tensor, k: Tensor, dim: int, filter_dim: int, precision: str = "float32") -> Tensor:
    """u convolved along ``dim`` (negative) with k along ``filter_dim``, other dimensions broadcast: the shape of u."""
    x = u.movedim(dim, -1)
    lags = k.movedim(filter_dim, -1)
    lags = lags[(None,) * (x.dim() - lags.dim())]
    rows = [d for d in range(x.dim() - 1) if lags.shape[d] == 1]
    channels = [d for d in range(x.dim() - 1) if lags.shape[d] != 1]
    order = [*rows, *channels, x.dim() - 1]
    x = x.permute(order)
    shape = x.shape
    filters = lags.permute(order).reshape(-1, lags.shape[-1])
    x = x.reshape(-1, filters.shape[0], shape[-1])
    y = long_conv(x, filters, precision=precision).reshape(shape)
    return y.permute([order.index(d) for d in range(len(order))]).movedim(-1, dim)


def _spectrum(node: Any) -> _Spectrum | None:
    """What is known of a node as a transform of something real, scaled by numbers."""
    factors: list[tuple[Any, Any]] = []
    while _is_call(node, (*_PRODUCTS, *_QUOTIENTS)) and len(node.args) == 2 and not node.kwargs:
        if _written(node):
            return None
        apply = operator.mul if node.target in _PRODUCTS else operator.truediv
        left, right = cast(Any, node.args)
        if apply is operator.mul and _is_number(left):
            left, right = right, left
        if not _is_number(right) or not isinstance(left, fx.Node):
            return None
        factors.append((apply, right))
        node = left
    if not _is_call(node, (torch.fft.rfft,)) or _written(node):
        return None
    bound = _bind(node, ("input", "n", "dim", "norm"), {"n": None, "dim": -1, "norm": None})
    signal, value = bound["input"], _value(bound["input"])
    if not isinstance(signal, fx.Node) or not isinstance(value, Tensor) or not isinstance(bound["dim"], int):
        return None
    if not value.is_floating_point() or bound["norm"] not in _FORWARD:
        return None
    dim = bound["dim"] % value.dim()
    n = value.shape[dim] if bound["n"] is None else _value(bound["n"])
    power = Fraction(_FORWARD[bound["norm"]])
    return _Spectrum(signal, n, dim, power, tuple(reversed(factors)))


def _fits(u: _Spectrum, k: _Spectrum, n: Any, dim: int, out: Tensor) -> bool:
    """Whether one transform length serves all three, nothing wraps around, and k is broadcast over u."""
    x, lags = _value(u.signal), _value(k.signal)
    known = statically_known_true
    if (
        _written(u.signal)
        or _written(k.signal)
        or x.dtype != lags.dtype
        or not (known(u.n == n) and known(k.n == n))
    ):
        return False
    if not known(x.shape[u.dim] + lags.shape[k.dim] - 1 <= n):
        return False
    if x.dim() != out.dim() or u.dim != dim or k.dim - lags.dim() != dim - out.dim():
        return False
    others = [d for d in range(-lags.dim(), 0) if d != k.dim - lags.dim()]
    return all(known(lags.shape[d] == 1) or known(lags.shape[d] == x.shape[d]) for d in others)


def _written(node: fx.Node) -> bool:
    """Whether anything in the graph writes into a node's value, be it through a view: Dynamo's fakes count that."""
    value = _value(node)
    return not isinstance(value, Tensor) or value.is_inference() or value._version > 0


def _reads_at_most(inverse: fx.Node, dim: int, length: Any) -> bool:
    """Whether every use of the inverse transform is a slice that begins at 0 and ends by ``length``."""
    value = inverse.meta["example_value"]
    for user in inverse.users:
        if user.target is not operator.getitem or user.args[0] is not inverse:
            return False
        index: Any = user.args[1]
        index = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(i, slice) and i is not Ellipsis for i in index):
            return False
        if Ellipsis in index:
            place = index.index(Ellipsis)
            index = index[:place] + (slice(None),) * (value.dim() - len(index) + 1) + index[place + 1 :]
        taken = index[dim] if dim < len(index) else slice(None)
        stop = _value(taken.stop)
        if _value(taken.start) not in (None, 0) or _value(taken.step) not in (None, 1) or stop is None:
            return False
        if not (statically_known_true(stop >= 0) and statically_known_true(stop <= length)):
            return False
    return bool(inverse.users)


def _bind(node: fx.Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is_call(node: Any, targets: Sequence[Any]) -> bool:
    return (
        isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets
    )


def _value(x: Any) -> Any:
    return x.meta.get("example_value") if isinstance(x, fx.Node) else x


def _is_number(x: Any) -> bool:
    return isinstance(_value(x), (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(
        _value(x), bool
    )


def _spread(node: fx.Node) -> int:
    """The number of dimensions that are not of size one."""
    return sum(not statically_known_true(size == 1) for size in _value(node).shape)
