"""The float64 twin: the same graph, interpreted in double precision on random input and parameters.

Numeric proposals and filters are taken from the twin, so that a property of the program is not mistaken
for a rounding error, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .program import Kind, Program, operator_name

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def widen(value: Any) -> Any:
    """A floating or complex tensor, or dtype, in double precision; anything else as it is."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, Tensor) and value.dtype in _WIDER:
        return value.detach().to(_WIDER[value.dtype])
    return value.detach() if isinstance(value, Tensor) else value


class _WidenCall:
    """A call in double precision: dtypes widened, factories given one, integers that become floating numbers too."""

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        args = tuple(widen(a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: widen(a) if isinstance(a, torch.dtype) else a for k, a in kwargs.items()}
        result = node.meta.get("val")
        if isinstance(result, Tensor) and result.dtype in _WIDER and kwargs.get("dtype") is None:
            schema = getattr(node.target, "_schema", None)
            from_nothing = not any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
            if from_nothing and schema and any(a.name == "dtype" for a in schema.arguments):
                kwargs = {**kwargs, "dtype": _WIDER[result.dtype]}
            tensors = [a for a in args if isinstance(a, Tensor)]
            if tensors and all(
                t.dtype in _INTEGERS for t in tensors
            ):  # else it is computed in the default dtype
                args = tuple(a.to(_WIDER[result.dtype]) if isinstance(a, Tensor) else a for a in args)
        return args, kwargs

    def result(self, value: Any) -> Any:
        """Integers times a Python float, say, come out in the default dtype."""
        if isinstance(value, Tensor):
            return widen(value) if value.dtype in _WIDER else value
        return pytree.tree_map_only(Tensor, widen, value) if isinstance(value, (list, tuple)) else value


widen_call = _WidenCall()


class TwinValues(Mapping[str, Tensor]):
    """The program's inputs in double precision, without the sequence, each made where it is first asked for.

    ``forget`` lets go of what was made; asked for again, it is made from what the program's inputs are then.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        value = self._made.get(name)  # another thread may forget it meanwhile
        if value is None:
            value = self._made[name] = self._make(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.program.values)

    def __len__(self) -> int:
        return len(self.program.values)

    def _make(self, name: str) -> Tensor:
        return widen(self.program.values[name])

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()


class MovedValues(TwinValues):
    """The same with floating parameters moved by a ``share`` of their size.

    So a parameter that happens to be zero, one or symmetric cannot hide what the program does with it. ``wide``: those
    that are not moved, which the others are shared with.
    """

    def __init__(self, program: Program, *, seed: int, share: float = 0.3) -> None:
        super().__init__(program)
        self.wide, self.seed, self.share = TwinValues(program), seed, share
        self._places = {i.name: place for place, i in enumerate(program.inputs) if i.kind is Kind.PARAMETER}

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name) if self._moves(name) else self.wide[name]

    def _moves(self, name: str) -> bool:
        value = self.program.values[name]
        return name in self._places and (value.is_floating_point() or value.is_complex())

    def _make(self, name: str) -> Tensor:
        value = super()._make(name)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self._places[name])
        size = value.abs().square().mean().sqrt().clamp_min(0.05).item()
        noise = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        return value + self.share * size * noise.to(value.device)

    def forget(self) -> None:
        """Let go of what was made, moved or not."""
        super().forget()
        self.wide.forget()


def random_sequence(program: Program, batch: int, length: int, *, seed: int, double: bool = True) -> Tensor:
    """Random ids or features a program may read, [batch, length(, D)]; equal seeds share prefixes."""
    example = program.example
    columns = []
    limit = vocabulary(program) or 0
    if not limit and example.dtype in _INTEGERS:
        limit = int(example.max()) + 1
    for position in range(length):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        shape = (batch, 1, *example.shape[2:])
        if example.dtype in _INTEGERS:
            column = torch.randint(0, limit, shape, generator=generator, dtype=example.dtype)
        elif example.dtype is torch.bool:
            column = torch.randint(0, 2, shape, generator=generator).bool()
        else:
            dtype = widen(example.dtype) if double else example.dtype
            column = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        columns.append(column)
    return torch.cat(columns, dim=1).to(example.device)


def vocabulary(program: Program) -> int | None:
    """How many ids the model knows: the rows of the tables its ids index directly; None where none do."""
    rows, carriers = [], [program.sequence]
    for carrier in carriers:
        for user in carrier.users:
            name = operator_name(user.target)
            if name == "embedding" and user.args[1] is carrier and isinstance(user.args[0], fx.Node):
                rows.append(int(user.args[0].meta["val"].shape[0]))
            elif name in _CARRIES_IDS:
                carriers.append(user)
    return min(rows, default=None)


_CARRIES_IDS = frozenset(
    {"to", "_to_copy", "clone", "alias", "contiguous", "view", "reshape", "unsqueeze", "squeeze"}
)
