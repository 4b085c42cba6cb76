"""lower: a step program as one compiled function of static shapes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import FlashinfWarning
from .step import StepProgram

# Above this many rows a product with a weight is a matrix product; below, reading the weight is all it costs.
_MOST_ROWS_BY_SUM = 2

_STATE = ("history:", "ring:", "block_inputs", "block_pending")
_CHECKED_STEPS = 3

_INDUCTOR = {
    "realize_opcount_threshold": 0,  # else a norm is recomputed for every row of the product that follows
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
}


def _small_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if rows > _MOST_ROWS_BY_SUM or x.dtype in (torch.bfloat16, torch.float16):
        return NotImplemented
    out = (weight * x.unsqueeze(-2)).sum(-1)
    return out if bias is None else out + bias


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    if not a.numel():
        return True
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(a.dtype, 0.1)
    scale = float(a.abs().max())
    return bool(((a - b).abs() <= tolerance * max(scale, 1e-30)).all())


class CompiledStep:
    """A step program for one batch size, traced to an fx graph and compiled.

    ``graph_module`` is the step graph: ATen operators on static shapes with the position as a tensor.
    """

    def __init__(self, step: StepProgram, tensors: Mapping[str, Tensor], how: str) -> None:
        start = time.perf_counter()
        self.names = tuple(tensors)
        self.constant: list[Any] = []
        self.places: list[int] = []

        def flat(*args: Tensor) -> Sequence[Tensor]:
            outputs = step(dict(zip(self.names, args, strict=True)))
            self.places.clear()
            self.constant = [None if isinstance(o, Tensor) else o for o in outputs]
            self.places.extend(i for i, o in enumerate(outputs) if isinstance(o, Tensor))
            return [o.clone() for o in outputs if isinstance(o, Tensor)]  # never a view of the state

        example = [tensors[name] for name in self.names]
        with torch.no_grad():
            self.graph_module: fx.GraphModule = make_fx(
                flat,
                tracing_mode="fake",
                decomposition_table={torch.ops.aten.linear.default: _small_linear},
                pre_dispatch=True,
            )(*example)
        self._name_placeholders()
        self.run = self.graph_module if how == "eager" else self._inductor(example)
        if how != "eager" and not self._compiles_truly(example):
            warnings.warn(
                "the compiled step disagrees with its own graph; it runs uncompiled",
                FlashinfWarning,
                stacklevel=2,
            )
            self.run = self.graph_module
        self.milliseconds = 1e3 * (time.perf_counter() - start)

    def _name_placeholders(self) -> None:
        """Give the step graph's inputs the names the step program knows them by."""
        graph = self.graph_module.graph
        graph.eliminate_dead_code()
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, self.names, strict=True):
            node._rename(name.replace(":", "_").replace(".", "_"))
            node.target = node.name
        self.graph_module.recompile()

    def _inductor(self, example: list[Tensor]) -> Any:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        with torch.no_grad(), config.patch(_INDUCTOR), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own insides
            return compile_fx(self.graph_module, example)

    def _compiles_truly(self, example: list[Tensor]) -> bool:
        """Whether the compiled step and its graph agree on outputs and on every tensor they write, over some steps.

        A compiler that reorders writes to state is silent about it; three steps on random state are not.
        """
        generator = torch.Generator().manual_seed(5)
        graph, compiled = ([t.detach().clone() for t in example] for _ in range(2))
        for name, a, b in zip(self.names, graph, compiled, strict=True):
            if name.startswith(_STATE) and a.is_floating_point():
                a.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float32))
                b.copy_(a)
            elif name in ("position", "local"):
                a.zero_()
                b.zero_()
        with torch.no_grad():
            for _ in range(_CHECKED_STEPS):
                pairs = zip(self.graph_module(*graph), self.run(*compiled), strict=True)
                if not all(_agree(a, b) for a, b in pairs):
                    return False
        return all(_agree(a, b) for a, b in zip(graph, compiled, strict=True))

    def on(self, tensors: Mapping[str, Tensor]) -> Callable[[], list[Any]]:
        """The step on one lane's tensors, which it reads and writes in place."""
        run, constant, places = self.run, self.constant, tuple(self.places)
        args = [tensors[name] for name in self.names]

        def step() -> list[Any]:
            outputs = list(constant)
            for place, value in zip(places, run(*args), strict=True):
                outputs[place] = value
            return outputs

        return step
