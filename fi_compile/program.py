"""The one representation every pass reads and writes: a functional ATen graph with a symbolic length."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from .symbolic import evaluate_at


class Rewrite(Protocol):
    """How an interpretation departs from the graph: other arguments, other results."""

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments to call with."""
        ...

    def result(self, value: Any) -> Any:
        """What is kept of a call's result."""
        ...


class Kind(Enum):
    """What a placeholder stands for."""

    SEQUENCE = "sequence"  # the sequence the model reads: ids [B, s] or features [B, s, D]
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # a tensor the trace met that is neither
    DERIVED = "derived"  # computed from the others once per weight version (filters, tables)


@dataclass(frozen=True)
class Input:
    """One placeholder of a program: the node's name, its kind and the attribute path it is read from."""

    name: str
    kind: Kind
    path: str | None = None


@dataclass(frozen=True)
class Lengths:
    """The sequence lengths a program's guards admit.

    ``minimum`` is the shortest length the graph itself may run at (shorter ones are reached by prefix-consistency),
    ``maximum`` the longest any guard admits (``None``: unbounded), ``holes`` single lengths inside that
    range a guard excludes. Of every ``period`` lengths those whose remainder is in ``left_out`` are excluded too
    (``if s % 2``). Below ``fewest`` positions the model computes another function than the graph.
    """

    minimum: int = 1
    maximum: int | None = None
    holes: frozenset[int] = frozenset()
    fewest: int = 1
    period: int = 1
    left_out: frozenset[int] = frozenset()

    @property
    def are_all(self) -> bool:
        """Whether every length from 2 to the longest is admitted."""
        return self.minimum <= 2 and not self.holes and not self.left_out

    def upto(self, capacity: int) -> np.ndarray:
        """All admitted lengths 1…capacity, ascending, as int64."""
        top = capacity if self.maximum is None else min(capacity, self.maximum)
        lengths = np.arange(self.minimum, top + 1, dtype=np.int64)
        if self.left_out:
            lengths = lengths[~np.isin(lengths % self.period, list(self.left_out))]
        return lengths[~np.isin(lengths, list(self.holes))] if self.holes else lengths

    def mask(self, upto: int) -> np.ndarray:
        """Bool [upto + 1]: whether each length 0…upto is admitted."""
        found = np.zeros(upto + 1, dtype=bool)
        found[self.upto(upto)] = True
        return found

    def excluded(self, upto: int) -> list[int]:
        """Lengths inside the range, up to ``upto``, at which the graph may not run."""
        top = upto if self.maximum is None else min(upto, self.maximum)
        single = [h for h in self.holes if h <= top]
        often = range(self.minimum, top + 1) if self.left_out else ()
        return sorted({*single, *(n for n in often if n % self.period in self.left_out)})

    def at_least(self, length: int) -> int | None:
        """The smallest admitted length from ``length`` on, or None."""
        length = max(length, self.minimum)
        while self._is_excluded(length):
            length += 1
        return length if self.admits(length) else None

    def admits(self, length: int) -> bool:
        """Whether the graph may run at this length."""
        return (
            length >= self.minimum
            and (self.maximum is None or length <= self.maximum)
            and not self._is_excluded(length)
        )

    def _is_excluded(self, length: int) -> bool:
        return length in self.holes or length % self.period in self.left_out


@dataclass(frozen=True)
class Program:
    """A functional ``torch.fx`` graph of ATen operators with one symbolic sequence length.

    ``graph`` has one placeholder per entry of ``inputs``, in that order, and one output node whose
    argument is the flat tuple of outputs that ``out_spec`` unflattens. Each tensor node carries a fake
    tensor in ``node.meta["val"]`` whose sizes are expressions in ``length`` and ``batch``; integer nodes
    carry a ``SymInt``. ``values`` maps the names of all inputs but the sequence to the live tensors.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    length: sympy.Symbol
    batch: sympy.Symbol | int
    lengths: Lengths
    out_spec: pytree.TreeSpec
    values: Mapping[str, Tensor] = field(repr=False)
    example: Tensor = field(repr=False)  # the sequence it was traced with: [B, s] or [B, s, D]
    guards: tuple[sympy.Basic, ...] = field(
        default=(), repr=False
    )  # relations in length and batch met in tracing
    # What the model's own code asked of its sizes; None where they were numbers.
    questions: tuple[sympy.Basic, ...] | None = field(default=None, repr=False)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by name."""
        return {node.name: node for node in self.graph.nodes}

    @cached_property
    def sequence(self) -> fx.Node:
        """The placeholder of the sequence."""
        (name,) = [i.name for i in self.inputs if i.kind is Kind.SEQUENCE]
        return self.nodes[name]

    @cached_property
    def outputs(self) -> tuple[Any, ...]:
        """The flat outputs: nodes, or constants such as ``None``."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @cached_property
    def input_dependent(self) -> frozenset[fx.Node]:
        """Tensor nodes whose *data* comes from the sequence.

        Sizes carry no data: a path through an integer node, or through an argument that only lends its
        dtype, device or shape, does not count.
        """
        tainted: set[fx.Node] = {self.sequence}
        for node in self.graph.nodes:
            if node.op != "call_function" or is_integer(node):
                continue
            if any(a in tainted for a in data_arguments(node)):
                tainted.add(node)
        return frozenset(tainted)

    def size_values(self, expr: Any, lengths: np.ndarray, batch: int = 3) -> np.ndarray:
        """The value of a size expression at each of ``lengths``, as int64."""
        return evaluate_at(expr, {self.length: lengths, self.batch: batch}, lengths.shape)

    def run(self, sequence: Tensor, values: Mapping[str, Tensor] | None = None) -> Any:
        """Run the graph on ``sequence`` and return the outputs in the model's structure."""
        env = self.evaluate(sequence, values, keep=[o for o in self.outputs if isinstance(o, fx.Node)])
        flat = [env[o] if isinstance(o, fx.Node) else o for o in self.outputs]
        return pytree.tree_unflatten(flat, self.out_spec)

    def evaluate(
        self,
        sequence: Tensor,
        values: Mapping[str, Tensor] | None = None,
        keep: Iterable[fx.Node] | None = None,
        rewrite: Rewrite | None = None,
    ) -> dict[fx.Node, Any]:
        """Interpret the graph; return the values of ``keep`` (default: of every node)."""
        env: dict[fx.Node, Any] = {}
        bound = self.values if values is None else values
        for spec in self.inputs:
            env[self.nodes[spec.name]] = sequence if spec.kind is Kind.SEQUENCE else bound[spec.name]
        wanted = None if keep is None else set(keep)
        nodes = [n for n in self.graph.nodes if n.op == "call_function"]
        if wanted is not None:
            nodes = needed(nodes, wanted)
        interpret(nodes, env, wanted, rewrite)
        return env if wanted is None else {n: env[n] for n in wanted}

    def has_tables_for(self, length: int) -> bool:
        """Whether what depends on the length alone, and has at most one sequence axis, can be evaluated there.

        A table of positions that has fewer rows ends the sequences a model can read, and no guard says so.
        """
        alone = [
            node
            for node in self.graph.nodes
            if node.op == "call_function"
            and is_tensor(node)
            and node not in self.input_dependent
            and sum(self.length in getattr(size, "free_symbols", ()) for size in sizes(node)) <= 1
        ]
        last = set(alone).difference(a for node in alone for a in node.all_input_nodes)
        batch = self.batch if isinstance(self.batch, int) else 1
        shape = (batch, length, *self.example.shape[2:])
        try:
            with torch.no_grad():
                self.evaluate(self.example.new_zeros((1,) * len(shape)).expand(shape), keep=last)
        except (IndexError, RuntimeError):
            return False
        return True

    def with_values(self, values: Mapping[str, Tensor]) -> Program:
        """The same program on other weights; inputs that ``values`` does not name keep theirs."""
        return replace(self, values={**self.values, **values})


def interpret(
    nodes: Sequence[fx.Node],
    env: dict[fx.Node, Any],
    free: set[fx.Node] | None = None,
    rewrite: Rewrite | None = None,
) -> None:
    """Run ``nodes`` in order, reading and writing ``env``.

    With ``free``, values that are dead and not in it are dropped; ``rewrite(node, args, kwargs)`` may
    change a call's arguments.
    """
    last: dict[fx.Node, fx.Node] = {}
    if free is not None:
        for node in nodes:
            for used in node.all_input_nodes:
                last[used] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        dead.setdefault(user, []).append(used)
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        if rewrite is not None:
            args, kwargs = rewrite(node, args, kwargs)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        env[node] = value if rewrite is None else rewrite.result(value)
        for used in dead.get(node, ()):
            if free is not None and used not in free and used.op != "placeholder":
                env.pop(used, None)


def needed(nodes: Sequence[fx.Node], wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """The subsequence of ``nodes`` that ``wanted`` depends on."""
    live = set(wanted)
    kept = []
    for node in reversed(nodes):
        if node in live:
            kept.append(node)
            live.update(node.all_input_nodes)
    return kept[::-1]


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_integer(node: Any) -> bool:
    """Whether a node's value is a number computed from sizes."""
    return isinstance(node, fx.Node) and isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """A tensor node's sizes as sympy expressions or ints."""
    return tuple(as_expr(size) for size in node.meta["val"].shape)


def as_expr(value: Any) -> Any:
    """A size, ``SymInt`` or integer node as a sympy expression or int."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


# Operators whose first tensor argument lends only its shape, dtype and device.
_SHAPE_ONLY = frozenset(
    {
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
        "new_zeros", "new_ones", "new_full", "new_empty",
    }
)  # fmt: skip
_TEMPLATE = frozenset({"type_as", "expand_as", "view_as", "reshape_as"})


def operator_name(target: Callable[..., Any] | str) -> str:
    """``aten.mul.Tensor`` → ``mul``; other libraries' operators are ``library::name``, functions keep their names."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", str(target))
    library, _, name = packet._qualified_op_name.partition("::")
    return name if library == "aten" else packet._qualified_op_name


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call was given, by the operator's own names."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def add_call(
    graph: fx.Graph,
    origin: fx.Node,
    mode: Any,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """A new call at the end of a graph, in place of ``origin``; ``mode``: the program's fake tensor mode."""
    made = graph.call_function(target, args, dict(kwargs or {}))
    made.meta = {k: v for k, v in origin.meta.items() if k != "val"}
    measure(made, mode)
    return made


def measure(node: fx.Node, mode: Any) -> None:
    """Note what a call returns, without contents, for arguments of which that is known."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode, enable_python_dispatcher():  # for symbolic transform lengths
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def data_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensor nodes (and getitem sources) whose data a node reads."""
    name = operator_name(node.target)
    if name in _SHAPE_ONLY:
        return [a for a in node.all_input_nodes if a is not node.args[0] and not is_integer(a)]
    if name in _TEMPLATE:
        return [a for a in (node.args[0],) if isinstance(a, fx.Node)]
    return [a for a in node.all_input_nodes if not is_integer(a)]


def is_getitem(node: fx.Node) -> bool:
    """Whether a node picks one result of a multi-output operator."""
    return node.op == "call_function" and node.target is operator.getitem


def is_zero(value: Any) -> bool:
    """Whether an argument is zero, or a tensor that is made of zeros."""
    if isinstance(value, (bool, int, float)):
        return value == 0
    name = operator_name(value.target) if is_tensor(value) and value.op == "call_function" else ""
    filled = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "scalar_tensor": "s"}
    return name in ("zeros", "zeros_like", "new_zeros") or (
        name in filled and given_arguments(value)[filled[name]] == 0
    )


def source_of(node: fx.Node) -> str | None:
    """The user's ``file:line`` a node came from: the innermost frame outside torch."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for frame in reversed(frames):
        path, _, rest = frame.removeprefix("File ").partition('", line ')
        path = path.strip('"')
        if "/torch/" not in path:
            return f"{path}:{rest.split(',')[0]}"
    return None
