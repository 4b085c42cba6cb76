"""What a rule sees: one operator call with the facts of its arguments; and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from fi_compile.facts import Axis, Deny, Fact, Quantity, constant, fixed, same, settle, tidy, whole_rows
from fi_compile.program import as_expr, is_integer, is_tensor, operator_name

Result = Fact | list[Fact]


@dataclass(frozen=True)
class Rule:
    """How facts pass through one operator.

    ``scales``: arguments may carry a factor that follows the length (the rule is linear in them);
    ``junk``: arguments may have entries above a diagonal that are not certified. ``lends``: arguments whose
    data is overwritten: they give their shape only. ``magnitude``: how large the result may be for arguments of a
    given magnitude, where that is not the same.
    """

    apply: Callable[[Call], Result]
    scales: bool = False
    junk: bool = False
    lends: tuple[str, ...] = ()
    magnitude: Callable[[Call], int] | None = None


RULES: dict[str, Rule] = {}


def rule(
    *names: str,
    scales: bool = False,
    junk: bool = False,
    lends: tuple[str, ...] = (),
    magnitude: Callable[[Call], int] | None = None,
) -> Callable[[Any], Any]:
    """Register a function ``Call -> Fact`` for the operators called ``names``."""

    def register(function: Callable[[Call], Result]) -> Callable[[Call], Result]:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = Rule(function, scales, junk, lends, magnitude)
        return function

    return register


class Context(Protocol):
    """What the walker offers to rules."""

    length: Quantity

    def evaluate(self, expr: Any) -> Quantity: ...  # noqa: D102
    def follows_batch(self, expr: Any) -> bool: ...  # noqa: D102
    def fact(self, node: fx.Node) -> Result: ...  # noqa: D102
    def is_data(self, node: fx.Node) -> bool: ...  # noqa: D102
    def table(self, node: fx.Node) -> Tensor | None: ...  # noqa: D102
    @property
    def entry_sizes(self) -> Any: ...  # noqa: D102


@dataclass
class Call:
    """One call: arguments by the operator's own names, sizes evaluated at every admitted length.

    A rule must ask for each integer that follows the length (``q``, ``qs``); the walker refuses the call if
    one was left unread: a length used as a value. What the rule notes besides the fact: ``row_local``, ``by_entry``
    (each entry of the result needs only the entries in its place, of arguments aligned at the right),
    ``mixes_rows`` (a row of the batch that the result still has meets other rows),
    ``linear`` (groups of nodes in which the operator is jointly linear, the others fixed), ``invariant``
    (those groups along which it also commutes with shifts) and ``conditions`` for the certificate.
    """

    node: fx.Node
    context: Context
    row_local: bool = False
    by_entry: bool = False
    mixes_rows: bool = False
    linear: list[frozenset[fx.Node]] = field(default_factory=list)
    invariant: list[frozenset[fx.Node]] = field(default_factory=list)
    affine_groups: list[frozenset[fx.Node]] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    read: set[fx.Node] = field(default_factory=set)
    arguments: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        self.name = operator_name(self.node.target)
        schema = getattr(self.node.target, "_schema", None)
        if schema is None:
            self.arguments = {str(i): a for i, a in enumerate(self.node.args)} | dict(self.node.kwargs)
            return
        for i, argument in enumerate(schema.arguments):
            if i < len(self.node.args) and not argument.kwarg_only:
                self.arguments[argument.name] = self.node.args[i]
            elif argument.name in self.node.kwargs:
                self.arguments[argument.name] = self.node.kwargs[argument.name]
            elif argument.has_default_value():
                self.arguments[argument.name] = argument.default_value

    def arg(self, name: str, default: Any = None) -> Any:
        """The raw argument."""
        return self.arguments.get(name, default)

    def number(self, name: str, default: Any = None) -> Any:
        """A Python number (or None); a length here is refused."""
        value = self.arguments.get(name, default)
        if isinstance(value, fx.Node):
            q = self.q(value)
            self.no_batch(value)
            if isinstance(q, np.ndarray):
                raise Deny("length_as_value", f"{name!r} of {self.name} follows the sequence length")
            return q
        return value

    def q(self, value: Any) -> Quantity:
        """An integer argument at every length."""
        if isinstance(value, str):
            value = self.arguments[value]
        if isinstance(value, fx.Node):
            if not is_integer(value):
                raise Deny("data_dependent", f"{self.name} takes a size computed from data")
            self.read.add(value)
        result = self.context.evaluate(as_expr(value))
        return tidy(result) if np.asarray(result).dtype != np.float64 else result

    def qs(self, name: str) -> list[Quantity]:
        """A list of integer arguments."""
        value = self.arguments[name]
        return [self.q(v) for v in (value if isinstance(value, (list, tuple)) else [value])]

    def scalar(self, value: Any) -> Any:
        """A number argument: a float, or an array over all lengths where it follows the length."""
        if isinstance(value, fx.Node):
            self.read.add(value)
            self.no_batch(value)
            result = self.context.evaluate(as_expr(value))
            return float(result) if not isinstance(result, np.ndarray) else result.astype(np.float64)
        return value

    def keep_rows(self, *dims: tuple[Axis, ...]) -> None:
        """Note what is summed, normalised or read over: rows of the batch meet if it is their axis."""
        for axis in (a for dim in dims for a in dim):
            whole_rows(axis, self.name)
            self.mixes_rows = self.mixes_rows or axis.batch

    def no_batch(self, value: Any) -> None:
        """Refuse a number computed from the batch size where it is more than a size."""
        if isinstance(value, fx.Node) and is_integer(value) and self.context.follows_batch(as_expr(value)):
            raise Deny("batch_as_value", f"{self.name} takes a number computed from the batch size")

    def tensors(self) -> list[fx.Node]:
        """The tensor arguments, in order of appearance, each once."""
        return [n for n in self.node.all_input_nodes if is_tensor(n)]

    def fact(self, argument: Any) -> Fact:
        """The fact of a tensor argument (by name or node)."""
        value = self.arguments[argument] if isinstance(argument, str) else argument
        result = self.context.fact(value)
        assert isinstance(result, Fact)
        return result

    def has(self, name: str) -> bool:
        """Whether an optional tensor argument is given."""
        return isinstance(self.arguments.get(name), fx.Node)

    def dim(self, value: int | None, rank: int) -> int:
        """A dimension counted from the front."""
        if value is None:
            raise Deny("unproved", f"{self.name} over all elements")
        return value % max(rank, 1)

    @property
    def out(self) -> tuple[Quantity, ...]:
        """The sizes of the (one) result."""
        return self.shape(self.node.meta["val"])

    def shape(self, value: Tensor) -> tuple[Quantity, ...]:
        """A fake tensor's sizes at every length."""
        return tuple(tidy(self.context.evaluate(as_expr(d))) for d in value.shape)

    def is_complex(self, node: fx.Node | None = None) -> bool:
        """Whether the node's value is complex."""
        return (self.node if node is None else node).meta["val"].is_complex()

    def note_linear(self, *groups: Iterable[fx.Node], invariant: bool = True) -> None:
        """Record that the operator is jointly linear in each group."""
        for group in groups:
            chosen = frozenset(n for n in group if isinstance(n, fx.Node))
            if chosen:
                self.linear.append(chosen)
                if invariant:
                    self.invariant.append(chosen)

    def note_ignored(self, node: fx.Node, template: Any) -> None:
        """Record that an operator linear in ``node`` takes nothing but a shape or a type from ``template``."""
        if isinstance(template, fx.Node):
            self.affine_groups.append(frozenset({node, template}))


def one(dim: tuple[Axis, ...]) -> Axis:
    """The axis of a dimension that is not a merged one."""
    if len(dim) != 1:
        raise Deny("merged", "works along a dimension that merges positions with another dimension")
    return dim[0]


def need_fixed(fact: Fact, dim: int, doing: str) -> None:
    """Refuse to mix the elements of a dimension that is not constant in the length."""
    for axis in fact.dims[dim]:
        whole_rows(axis, doing)
        if not axis.fixed:
            raise Deny(
                "mixes_positions",
                f"{doing} runs over all positions: every position would see later ones, and the length",
                "work over features, or use a causal form (cumulative sum, masked scores)",
            )


def mixed(dim: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """A dimension whose elements were mixed: its batch rows are no longer independent."""
    return tuple(replace(a, batch=False, flat=False) if a.batch or a.flat else a for a in dim)


def table_axis(size: Quantity) -> Axis:
    """The axis along which one value repeats ``size`` times."""
    return fixed(size) if constant(size) else settle(Axis(size, size, 0, tidy(np.subtract(size, 1))))


def is_one(dim: tuple[Axis, ...]) -> bool:
    """Whether a dimension has size 1 at every length (and so broadcasts)."""
    return len(dim) == 1 and same(dim[0].size, 1)


def half_precision(dtype: torch.dtype) -> bool:
    """Whether integers beyond 2¹¹ are no longer exact in this type."""
    return dtype in (torch.float16, torch.bfloat16)
