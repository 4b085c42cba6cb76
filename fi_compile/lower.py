"""lower: a step program as one function of static shapes, compiled part by part."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .chain import bind_linked
from .errors import FlashinfWarning
from .layers import Layers, Run, is_write, returns_written, split_layers, whole
from .native import INDUCTOR, Native, by_torch_alone, compile_native, generating
from .step import StepProgram

log = logging.getLogger(__name__)

# A part of fewer operators is as fast interpreted, and costs no compilation. Native ones are called without Python.
_FEWEST_NODES = {"aot": 1, "inductor": 3}

_STATE = ("history:", "ring:", "block_inputs", "block_pending")


class CompiledStep:
    """A step program for one batch size, traced to an fx graph and compiled.

    ``graph_module`` is the step graph: ATen operators on static shapes with the position as a tensor. ``layers`` are
    its parts and how they are called. ``how``: ``aot`` (native libraries, else TorchInductor, else uncompiled: the
    first that works for a part), ``inductor``, ``eager``, or ``auto``, which is ``aot`` on the CPU.
    """

    def __init__(self, step: StepProgram, tensors: Mapping[str, Tensor], how: str, block: int = 1) -> None:
        start = time.perf_counter()
        self.names = tuple(tensors)
        self.constant: list[Any] = []
        self.places: list[int] = []
        self.most, self.block = step.length, block
        example = [tensors[name] for name in self.names]
        self.graph_module = self._trace(step, example)
        graph, device = self.graph_module.graph, tensors["position"].device.type
        if how == "auto":
            how = "aot" if device == "cpu" else "inductor"
        # On a GPU launches are what counts, and one graph has the fewest.
        self.layers: Layers = split_layers(graph) if how != "eager" and device == "cpu" else whole(graph)
        self.runs: list[Run] = [_uncompiled(part) for part in self.layers.parts]
        self.linked = False
        if how != "eager":
            if len(self.layers.parts) > 1 and not self._cut_truly(example):
                self.layers = whole(graph)
                self.runs = [_uncompiled(part) for part in self.layers.parts]
            self._compile(example, how)
            self.linked = self._linked_truly(example)
        self.milliseconds = 1e3 * (time.perf_counter() - start)

    def _trace(self, step: StepProgram, example: list[Tensor]) -> fx.GraphModule:
        def flat(*args: Tensor) -> Sequence[Tensor]:
            outputs = step(dict(zip(self.names, args, strict=True)))
            self.places.clear()
            self.constant = [None if isinstance(o, Tensor) else o for o in outputs]
            self.places.extend(i for i, o in enumerate(outputs) if isinstance(o, Tensor))
            rows = zip(outputs, axes, strict=True)
            # never a view of the state
            return [(o if a is None else o.squeeze(a)).clone() for o, a in rows if isinstance(o, Tensor)]

        axes = step.output_axes

        with torch.no_grad():
            module = make_fx(flat, tracing_mode="fake", pre_dispatch=True)(*example)
        graph = module.graph
        for node in graph.nodes:
            if node.op == "call_function" and returns_written(node):
                node.replace_all_uses_with(node.args[0])
        graph.eliminate_dead_code()
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, self.names, strict=True):
            node._rename(name.replace(":", "_").replace(".", "_"))
            node.target = node.name
        module.recompile()
        return module

    # -- compiling -----------------------------------------------------------------------------------------

    def _compile(self, example: list[Tensor], how: str) -> None:
        """Compile each part, and see that it computes what its graph does."""
        with torch.inference_mode(False), torch.no_grad():
            inputs = self._inputs_of_parts(example)
            with only_own_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
                self.runs = list(pool.map(partial(_compiled, how=how), self.layers.parts, inputs))
            wrong = self._wrong_parts(example)
            for i in wrong:
                self.runs[i] = _uncompiled(self.layers.parts[i])
        if wrong:
            warnings.warn(
                "the compiled step disagrees with its own graph; "
                + ("it runs uncompiled" if len(wrong) == len(self.runs) else "a part of it runs uncompiled"),
                FlashinfWarning,
                stacklevel=2,
            )

    def _cut_truly(self, example: list[Tensor]) -> bool:
        """Whether the parts, one after another, compute and write what the whole graph does."""
        with torch.inference_mode(False), torch.no_grad():
            ours, theirs = self._trial(example), self._trial(example)
            tolerance = _tolerance(self.graph_module)
            pairs = [*zip(self.layers.bind(self.runs, ours)(), self.graph_module(*theirs), strict=True)]
            pairs += [(ours[place], theirs[place]) for place in _written(self.graph_module)]
            return all(_agree(a, b, tolerance) for a, b in pairs)

    def _linked_truly(self, example: list[Tensor]) -> bool:
        """Whether the native parts as one call compute and write what the whole graph does, over some steps."""
        if not any(isinstance(run, Native) for run in self.runs):
            return False
        with torch.inference_mode(False), torch.no_grad():
            ours, theirs = self._trial(example), self._trial(example)
            tolerance = _tolerance(self.graph_module)
            try:
                run = bind_linked(self.layers, self.runs, ours)
                for position in self._positions():
                    for state in (ours, theirs):
                        self._go_to(state, position)
                    pairs = [*zip(run(), self.graph_module(*theirs), strict=True)]
                    pairs += [(theirs[place], ours[place]) for place in _written(self.graph_module)]
                    if not all(_agree(a, b, tolerance) for a, b in pairs):
                        raise RuntimeError("it disagrees with the step's graph")
            except RuntimeError as error:
                log.warning("the parts of the step are called one by one: %s", error)
                return False
        return True

    def _positions(self) -> list[int]:
        """Where steps are tried."""
        return sorted({min(position, self.most - 1) for position in (0, 1, 2, self.most - 1)})

    def _go_to(self, state: list[Tensor], position: int) -> None:
        named = dict(zip(self.names, state, strict=True))
        named["position"].fill_(position)
        named["local"].fill_(position % self.block)

    def _inputs_of_parts(self, example: list[Tensor]) -> list[list[Tensor]]:
        """What each part is called with the first time, in memory of its own where it is written to."""
        found: dict[int, list[Tensor]] = {}

        def noting(part: int) -> Run:
            run = _uncompiled(self.layers.parts[part])

            def note(args: list[Tensor]) -> Sequence[Tensor]:
                found.setdefault(part, list(args))
                return run(args)

            return note

        self.layers.bind([noting(i) for i in range(len(self.runs))], self._trial(example))()
        return [found[i] for i in range(len(self.runs))]

    def _wrong_parts(self, example: list[Tensor]) -> set[int]:
        """Parts that do not agree with their graphs on outputs and on every tensor they write, over some steps.

        A compiler that reorders writes to state is silent about it; steps on random state are not.
        """
        wrong: set[int] = set()

        def comparing(i: int) -> Run:
            part, run = _uncompiled(self.layers.parts[i]), self.runs[i]
            written, tolerance = _written(self.layers.parts[i]), _tolerance(self.layers.parts[i])

            def compare(args: list[Tensor]) -> Sequence[Tensor]:
                own = [_copy(a) if place in written else a for place, a in enumerate(args)]
                expected = part(args)
                try:
                    found = run(own)
                except RuntimeError as error:
                    log.warning("a compiled part of the step does not run: %s", str(error).partition("\n")[0])
                    wrong.add(i)
                    return expected
                pairs = [*zip(expected, found, strict=True), *((args[w], own[w]) for w in written)]
                if not all(_agree(a, b, tolerance) for a, b in pairs):
                    wrong.add(i)
                return expected

            return compare

        state = self._trial(example)
        step = self.layers.bind([comparing(i) for i in range(len(self.runs))], state)
        for position in self._positions():
            self._go_to(state, position)
            step()
        return wrong

    def _trial(self, example: list[Tensor]) -> list[Tensor]:
        """The step's tensors with random state; memory of its own for whatever is written."""
        generator = torch.Generator().manual_seed(5)
        written, tensors = _written(self.graph_module), list(example)
        for place, name in enumerate(self.names):
            if place in written or name.startswith(_STATE):
                tensors[place] = _copy(tensors[place])
            if name.startswith(_STATE) and tensors[place].is_floating_point():
                noise = torch.randn(tensors[place].shape, generator=generator, dtype=torch.float32)
                tensors[place].copy_(noise)
        return tensors

    # -- running -------------------------------------------------------------------------------------------

    def on(self, tensors: Mapping[str, Tensor]) -> Callable[[], list[Any]]:
        """The step on one lane's tensors, which it reads and writes in place.

        It returns the outputs' newest rows, without their sequence axis.
        """
        run = self._bound([tensors[name] for name in self.names])
        constant, places = self.constant, tuple(self.places)
        if len(constant) == len(places) == 1:
            return run

        def step() -> list[Any]:
            outputs = list(constant)
            for place, value in zip(places, _apart(run()), strict=True):
                outputs[place] = value
            return outputs

        return step

    def _bound(self, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
        if self.linked:
            try:
                return bind_linked(self.layers, self.runs, inputs)
            except RuntimeError as error:  # weights of a subclass of Tensor
                log.warning("the parts of the step are called one by one: %s", error)
        return self.layers.bind(self.runs, inputs)


def _apart(values: Sequence[Tensor]) -> list[Tensor]:
    """The same values, no two in one memory: a compiler makes equal ones once, and a caller may write to one."""
    held: set[int] = set()
    apart = []
    for value in values:
        place = value.untyped_storage().data_ptr()
        apart.append(value.clone() if place in held else value)
        held.add(place)
    return apart


def _compiled(part: fx.GraphModule, example: list[Tensor], how: str) -> Run:
    """A part compiled, in the first of the ways that works, if it is worth it."""
    if sum(node.op == "call_function" for node in part.graph.nodes) < _FEWEST_NODES[how]:
        return _uncompiled(part)
    reasons = []
    for way in {"aot": (compile_native, _inductor), "inductor": (_inductor,)}[how]:
        try:
            return way(part, example)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}"[:300])
    warnings.warn(
        f"the step runs uncompiled, and slowly: {'; '.join(reasons)}", FlashinfWarning, stacklevel=2
    )
    return _uncompiled(part)


@contextlib.contextmanager
def only_own_warnings() -> Iterator[None]:
    """Without warnings about torch's own insides, of whatever thread."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, FlashinfWarning):
            warnings.warn(warning.message, stacklevel=4)


def _inductor(part: fx.GraphModule, example: list[Tensor]) -> Run:
    from torch._inductor.compile_fx import compile_fx

    with generating(INDUCTOR):
        function: Any = compile_fx(by_torch_alone(part, example), example)
    return lambda args: function(*args)


def _uncompiled(part: fx.GraphModule) -> Run:
    return lambda args: part(*args)


def _written(module: fx.GraphModule) -> tuple[int, ...]:
    """The places of the inputs that a graph writes to."""
    targets = {node.args[0] for node in module.graph.nodes if is_write(node)}
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    return tuple(i for i, node in enumerate(inputs) if node in targets)


def _copy(value: Tensor) -> Tensor:
    """The same contents and strides in memory of their own."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(
        value
    )


_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest entry; narrower ones: a tenth


def _tolerance(module: fx.GraphModule) -> float:
    """What a graph's compiled form may differ by: that of the narrowest numbers in it, whatever it returns."""
    dtypes = {val.dtype for node in module.graph.nodes for val in _tensors(node.meta.get("val"))}
    narrow = {dtype.to_real() if dtype.is_complex else dtype for dtype in dtypes}
    return max((_TOLERANCES.get(dtype, 0.1) for dtype in narrow if dtype.is_floating_point), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    if not a.numel():
        return True
    scale = float(a.abs().max())
    return bool(((a - b).abs() <= tolerance * max(scale, 1e-30)).all())
