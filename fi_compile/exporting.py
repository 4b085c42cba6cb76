"""exporting: a module through ``torch.export``, as a functional graph of operators that rules know.

What would stop the export, or pin a length, is stood in for meanwhile: helpers that compute on a length in Python, and
flags among the buffers that a forward branches on.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .arithmetic import STAND_INS, attributes_changed, integers_kept, logarithms_kept
from .program import operator_name
from .rules.call import RULES
from .spelled_out import spell_out
from .weights import is_flag

_LOOPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # over positions, which a trace would pin


def export_module(
    model: nn.Module, example: Tensor, dynamic_batch: bool, dynamic_length: bool, general: bool = False
) -> ExportedProgram:
    """Export; where that fails, with the flags among the model's buffers as the numbers they are now.

    ``general``: where torch would choose a shorter way to the same by the sizes it meets, it takes the one that
    serves all sizes, and no guard is left. What the model's own code asks is answered, and guarded, as ever; so is what
    gives its values fewer dimensions. Call it under :func:`attributes_kept`.
    """
    dims = {d: Dim.DYNAMIC for d, dynamic in ((0, dynamic_batch), (1, dynamic_length)) if dynamic}
    asking = _Squeezes() if general else contextlib.nullcontext()
    with symbolic_config.patch(backed_size_oblivious=general), asking:  # type: ignore[attr-defined]
        try:
            return _exported_as_is_or_frozen(model, example, dims)
        except Exception as error:
            if "Constraints violated" not in str(error):
                raise
            with integers_kept(model) as says_int:
                if not says_int:
                    raise
                return _exported_as_is_or_frozen(model, example, dims)


class _Squeezes(TorchFunctionMode):
    """Asks of every dimension that may be squeezed whether it is: no size is there to tell by afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "").partition(".")[0] in ("squeeze", "squeeze_"):
            x, dims = [*args, named.get("input", named.get("self"))][0], [*args[1:], named.get("dim")][0]
            listed = range(x.dim()) if dims is None else dims if isinstance(dims, (list, tuple)) else (dims,)
            for dim in listed:
                bool(x.shape[dim] == 1)  # which leaves a guard
        return func(*args, **named)


def _exported_as_is_or_frozen(model: nn.Module, example: Tensor, dims: Mapping[int, Any]) -> ExportedProgram:
    try:
        return _exported(model, example, dims)
    except Exception as error:
        if not _freeze_flags(model):
            raise
        try:
            return _exported(model, example, dims)
        except Exception:
            raise error from None  # which is about the model as it is


class _Flag(int):
    """What a flag says, for a forward that asks it by ``item()``, by its one index or as a condition."""

    def item(self) -> int:
        return int(self)

    def __getitem__(self, index: object) -> _Flag:
        return self


def _freeze_flags(model: nn.Module) -> bool:
    """Put numbers in the place of flags: no tracer follows a branch on a tensor. Whether there were any."""
    found = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if is_flag(b)]
    for module, name, flag in found:
        del module._buffers[name]
        vars(module)[name] = _Flag(flag.item())
    return bool(found)


def _exported(model: nn.Module, example: Tensor, dims: Mapping[int, Any]) -> ExportedProgram:
    with torch.no_grad(), _traceable_helpers(), logarithms_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):  # where torch prints the graph of a trace that failed
            exported = export(model, (example,), dynamic_shapes=(dims,), strict=False)
        decompositions = {**_composites(exported.graph), **_decompositions()}
        if spell_out(exported, decompositions):
            return exported
        return exported.run_decompositions(decompositions)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators whose meaning on one row needs the row's position, spelled out with aranges; selections as such."""

    def offsets(x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[-2], device=x.device)
        return torch.arange(x.shape[-1], device=x.device) - rows.unsqueeze(-1)

    def tril(x: Tensor, diagonal: int = 0) -> Tensor:
        return torch.where(offsets(x) <= diagonal, x, x.new_zeros(()))

    def triu(x: Tensor, diagonal: int = 0) -> Tensor:
        return torch.where(offsets(x) >= diagonal, x, x.new_zeros(()))

    def index_put(x: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False) -> Any:
        mask = indices[0]
        if accumulate or len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.numel() != 1:
            return NotImplemented
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), values.reshape(()), x)

    aten = torch.ops.aten
    return {aten.tril.default: tril, aten.triu.default: triu, aten.index_put.default: index_put}


def _composites(graph: fx.Graph) -> dict[Any, Callable[..., Any]]:
    """Operators without a rule, and what torch composes them of; not those whose sizes never follow a length here."""
    called = [node for node in graph.nodes if node.op == "call_function"]
    moving = {node.target for node in called if any(map(_moves, (node, *node.all_input_nodes)))}
    fixed = {node.target for node in called} - moving
    return {op: composed for op, composed in _composed_of_others().items() if op not in fixed}


def _moves(node: fx.Node) -> bool:
    """Whether a value has a size that is not a number."""
    values = node.meta.get("val")
    several = values if isinstance(values, (list, tuple)) else [values]
    return any(isinstance(size, torch.SymInt) for v in several if isinstance(v, Tensor) for size in v.shape)


@cache
def _composed_of_others() -> dict[Any, Callable[..., Any]]:
    known = {*RULES, *_LOOPS}
    table = torch.export.default_decompositions().items()
    return {op: composed for op, composed in table if operator_name(op) not in known and _gives_tensors(op)}


def _gives_tensors(op: Any) -> bool:
    returns = op._schema.returns
    return bool(returns) and all(str(r.type) in ("Tensor", "List[Tensor]") for r in returns)


@contextlib.contextmanager
def _traceable_helpers() -> Iterator[None]:
    """Stand-ins for library helpers that compute on a length in Python and would pin it.

    Wherever a loaded module refers to such a helper: models import it by name.
    """
    helpers = {}
    for library, name, stand_in in _STAND_INS:
        helper = getattr(sys.modules.get(library), name, None)
        if helper is not None:
            helpers[id(helper)] = stand_in
    refs = sys.modules.get("torch._refs.fft")
    replaced = [(refs, "math", _SYMBOLIC_MATH)] if refs is not None else []  # norm="ortho"
    for module in list(sys.modules.values()) if helpers else ():
        attributes = list(vars(module).items()) if isinstance(module, types.ModuleType) else []
        replaced += [(module, k, helpers[id(v)]) for k, v in attributes if id(v) in helpers]
    with attributes_changed(replaced):
        yield


def _symbolic_math() -> types.SimpleNamespace:
    """``math`` with a square root that keeps a symbolic length symbolic."""
    functions = {name: value for name, value in vars(math).items() if not name.startswith("__")}
    functions["sqrt"] = lambda n: torch.sym_sqrt(n) if isinstance(n, torch.SymInt) else math.sqrt(n)
    return types.SimpleNamespace(**functions)


_SYMBOLIC_MATH = _symbolic_math()


def _answered(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes truth values alone, of questions about the length too: ``is_causal=n > 1``."""
    return lambda *a, **k: plain(
        *pytree.tree_map_only(torch.SymBool, bool, a), **pytree.tree_map_only(torch.SymBool, bool, k)
    )


_STAND_INS: tuple[tuple[str, str, Any], ...] = (
    *STAND_INS,
    ("opt_einsum", "contract", torch.einsum),
    ("torch.nn.functional", "scaled_dot_product_attention", _answered(F.scaled_dot_product_attention)),
    ("scipy.fft", "next_fast_len", lambda target, real=False: target),
    ("scipy.fftpack", "next_fast_len", lambda target: target),
)
