"""Filters that a model keeps as spectra, spelled out as transforms of their taps.

The product of a sequence's spectrum with a buffer is a causal convolution only if the buffer is the spectrum of taps
that end early enough: a property of its values, which no rule can see. Written as ``rfft(irfft(buffer)[:m])`` the cut
is in the graph, and the rules decide whether m taps are few enough. What it drops is below the buffer's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fi_compile.program import Kind, Program, operator_name
from fi_compile.twin import widen

_ROUNDING = 4  # times the epsilon of the buffer's dtype, of the taps' norm
_LAYOUT = frozenset(
    {
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "transpose",
        "permute",
        "t",
        "clone",
        "to",
        "_to_copy",
    }
)
_INVERSE = {"fft_irfft": "fft_rfft", "fft_ifft": "fft_fft"}


@dataclass(frozen=True)
class Taps:
    """A buffer as the spectrum, ``n`` points along ``dim``, of ``count`` taps; ``dropped`` of their norm is cut."""

    n: int
    dim: int
    count: int
    inverse: str
    dropped: float


def with_taps(program: Program) -> tuple[Program, Mapping[str, float]]:
    """The program with every constant spectrum made from its taps, and what that drops, by the buffers' names.

    A buffer counts as a spectrum if it is complex, reaches an inverse transform of one fixed length that a dimension of
    it fits, its taps end before the period does, and it is itself what meets the sequence: what is computed from it,
    such as 1 / (1 + spectrum), may be far more sensitive than the buffer's rounding. Parameters do not count: training
    moves them off any such set.
    """
    found = {
        spec.name: taps
        for spec in program.inputs
        if spec.kind in (Kind.BUFFER, Kind.CONSTANT)
        and _meets_data(program, program.nodes[spec.name])
        and (taps := _taps(program.nodes[spec.name], program.values[spec.name])) is not None
    }
    if not found:
        return program, {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    for name, taps in found.items():
        _spell(graph, copied[program.nodes[name]], taps)
    graph.lint()
    changed = replace(program, module=fx.GraphModule(nn.Module(), graph))
    return changed, {name: taps.dropped for name, taps in found.items()}


def _meets_data(program: Program, node: fx.Node) -> bool:
    """Whether the value, at most laid out differently, only goes where the sequence goes too."""
    if not node.users:
        return False
    return all(
        user in program.input_dependent
        or (operator_name(user.target) in _LAYOUT and _meets_data(program, user))
        for user in node.users
        if user.users or user.op == "output"  # not an assertion
    )


def _taps(node: fx.Node, spectrum: Tensor) -> Taps | None:
    if not spectrum.is_complex() or not bool(torch.isfinite(spectrum).all()):
        return None
    lengths = {t for user in _behind(node) if (t := _transform(user)) is not None}
    if len(lengths) != 1:
        return None
    ((inverse, n),) = lengths
    size = n // 2 + 1 if inverse == "fft_irfft" else n
    dims = [d for d, s in enumerate(spectrum.shape) if s == size]
    if len(dims) != 1:
        return None
    rows = widen(spectrum).movedim(dims[0], -1).reshape(-1, size)  # a channel each
    values = getattr(torch.fft, inverse.removeprefix("fft_"))(rows, n=n)
    tails = values.abs().square().flip(-1).cumsum(-1).flip(-1)  # energy from each lag on
    rounding = _ROUNDING * torch.finfo(spectrum.dtype).eps
    kept = tails > rounding**2 * tails[:, :1]
    count = max(1, int(kept.any(0).sum()))
    if count == n:
        return None
    again = getattr(torch.fft, _INVERSE[inverse].removeprefix("fft_"))(values[:, :count], n=n)
    missed, norms = (torch.linalg.vector_norm(v, dim=-1) for v in (again - rows, rows))
    if bool((missed > 2 * rounding * norms).any()):  # imaginary parts, say, where a real sequence has none
        return None
    return Taps(n, dims[0], count, inverse, float((missed / norms.clamp_min(1e-300)).max()))


def _behind(node: fx.Node) -> list[fx.Node]:
    """All nodes a value reaches without passing an inverse transform."""
    reached, seen = [node], {node}
    for current in reached:
        if operator_name(current.target) in _INVERSE:
            continue
        fresh = [user for user in current.users if user not in seen]
        seen.update(fresh)
        reached += fresh
    return reached


def _transform(node: fx.Node) -> tuple[str, int] | None:
    """The kind and fixed length of an inverse transform, or None."""
    name = operator_name(node.target)
    if name not in _INVERSE:
        return None
    given: dict[str, Any] = {**dict(zip(("self", "n", "dim"), node.args, strict=False)), **node.kwargs}
    dim = given.get("dim", -1)
    n = node.meta["val"].shape[-1 if dim is None else dim]
    return (name, n) if isinstance(n, int) else None


def _spell(graph: fx.Graph, node: fx.Node, taps: Taps) -> None:
    """Let all users of a spectrum read the transform of its taps instead."""
    aten, users = torch.ops.aten, list(node.users)
    fake = node.meta["val"].fake_mode

    def call(target: Callable[..., Any], source: fx.Node, *args: Any) -> fx.Node:
        made = graph.call_function(target, (source, *args))
        with fake:
            made.meta["val"] = target(source.meta["val"], *args)
        return made

    with graph.inserting_after(node):
        whole = call(getattr(aten, taps.inverse).default, node, taps.n, taps.dim)
    with graph.inserting_after(whole):
        cut = call(aten.slice.Tensor, whole, taps.dim, 0, taps.count)
    with graph.inserting_after(cut):
        again = call(getattr(aten, _INVERSE[taps.inverse]).default, cut, taps.n, taps.dim)
    for user in users:
        user.replace_input_with(node, again)
