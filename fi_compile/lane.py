"""The state of sequences that are at the same position: what a step reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .derive import Derived
from .mixers.increments import weights_of
from .mixers.relaxed import RelaxedProduct
from .mixers.stack import ConvState
from .mixers.window import drop_rows
from .program import as_expr
from .twin import widen


class Lane:
    """Rows of a batch in lockstep, with everything kept of their past.

    ``position`` positions are done. ``tensors`` are the step's, by name (see :class:`StepProgram`). Interrupted in
    the middle of a change a lane reports ``broken`` until it is filled again.
    """

    def __init__(self, derived: Derived, batch: int) -> None:
        self.derived, self.batch = derived, batch
        self.position = 0
        self.highest = 0  # the most positions the rings have seen: rows further back than their size are gone
        self.broken = False
        self.owners = 1  # decoders that share this lane until one of them writes
        self.run: Callable[[], Sequence[Any]] | None = None  # the compiled step on this lane's tensors
        self.reach = 0  # how many rows of histories it reads
        program, step = derived.step.program, derived.step
        # A batch that is written into the model is no axis apart: its rows are channels like others.
        rows = self.rows = 1 if isinstance(program.batch, int) else batch
        device = program.example.device
        with torch.inference_mode(False):
            self.conv = ConvState(derived.bank, rows) if derived.bank is not None else None
            self.tensors: dict[str, Tensor] = dict(derived.constants)
            for name in ("position", "local"):
                self.tensors[name] = torch.zeros(1, dtype=torch.int64, device=device)
            dtype = widen(program.example.dtype) if derived.double else program.example.dtype
            self.tensors["row"] = program.example.new_zeros(
                (batch, 1, *program.example.shape[2:]), dtype=dtype
            )
            for node in step.plan.histories:
                self.tensors[f"history:{node.name}"] = self._history(node)
            for name, window in step.windows.items():
                self.tensors[f"ring:{name}"] = window.ring(rows, weights_of(window, name, self.tensors))
            for name, table in derived.tables.items():
                self.tensors[name] = table.new_zeros((derived.block, *table.shape[1:]))
        self._products = [
            (f"ring:{name}", window)
            for name, window in step.windows.items()
            if isinstance(window, RelaxedProduct)
        ]
        self._view_block()
        self._begin_block(0)

    def _history(self, node: fx.Node) -> Tensor:
        program = self.derived.step.program
        at = np.asarray([self.derived.capacity])
        sizes = [as_expr(size) for size in node.meta["val"].shape]
        shape = [int(program.size_values(size, at, self.batch)[0]) for size in sizes]
        dtype = node.meta["val"].dtype
        if self.derived.double:
            dtype = widen(dtype)
        return torch.zeros(shape, dtype=dtype, device=program.example.device)

    @property
    def state_bytes(self) -> int:
        """Bytes this lane keeps, without what it shares with others."""
        own = [t for name, t in self.tensors.items() if name not in self.derived.constants]
        held = sum(t.nbytes for t in own if t is not None)
        if self.conv is not None:
            held += self.conv.large_bytes
        return held

    @property
    def keeps_inputs(self) -> bool:
        """Whether what went into long convolutions is at hand, as a move to another capacity needs it."""
        return self.conv is None or not (self.conv.bank.halved and self.conv.dropped)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Names, shapes, strides and dtypes of the step's tensors: what a compiled step is specialised to."""
        return tuple((name, tuple(t.shape), t.stride(), t.dtype) for name, t in self.tensors.items())

    def _view_block(self) -> None:
        """Name the stack's current block as the step reads it."""
        if self.conv is not None:
            by_mixer = self.derived.step.by_mixer
            self.tensors |= by_mixer("block_inputs", self.conv.block_inputs)
            self.tensors |= by_mixer("block_pending", self.conv.block_pending)

    def _begin_block(self, start: int) -> None:
        """Load the tables' rows of the base block that begins at ``start``."""
        self.block_start = start
        stop = min(start + self.derived.block, self.derived.capacity)
        for name, table in self.derived.tables.items():
            self.tensors[name][: stop - start] = table[start:stop]

    def _place(self, position: int) -> None:
        self.position = position
        self.tensors["position"].fill_(position)
        self.tensors["local"].fill_(position - self.block_start)

    def step(self, row: Tensor, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """One new position from ``row`` [B, 1, …]; ``run`` computes the outputs' rows from the tensors."""
        with torch.no_grad():
            self.tensors["row"].copy_(row)
            return self.step_placed(run)

    def step_placed(self, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """The same where the row is in its place already; ``run`` sees to it that no gradients are recorded."""
        self.broken = True
        outputs = run()
        self.position += 1
        self.highest = max(self.highest, self.position)
        start = self.block_start
        if self.conv is not None:
            self.conv.advance()
            start = self.position - self.conv.local
        elif self.position - start == self.derived.block:
            start = self.position
        for name, product in self._products:
            product.advance(self.tensors[name], self.position)
        if start != self.block_start:
            self._begin_block(start)
            self.tensors["local"].fill_(self.position - start)
        self.broken = False
        return outputs

    def fill(self, length: int, values: Mapping[str, Tensor]) -> None:
        """Take over positions 0 … length-1: ``values`` maps node names (mixer inputs, histories) to full values."""
        self.broken = True
        step = self.derived.step
        for node in step.plan.histories:
            buffer, axis = self.tensors[f"history:{node.name}"], step.axes[node][0]
            buffer.zero_()
            buffer.narrow(axis, 0, length).copy_(values[node.name])
        for mixer in step.mixers:
            window = step.windows.get(mixer.name)
            if window is not None:
                flat = mixer.flatten([values[x.name] for x in mixer.inputs])
                if flat.is_floating_point():  # integers are kept as they are
                    flat = flat.to(self.derived.dtype)
                weights = weights_of(window, mixer.name, self.tensors)
                window.fill(self.tensors[f"ring:{mixer.name}"], flat, weights)
        if self.conv is not None:
            flat = [m.layout_in.flatten(values[m.x.name]).to(self.derived.dtype) for m in step.stacked]
            self.conv.fill(torch.cat(flat, 1))
        self._begin_block(length)
        self._place(length)
        self.highest = length
        self.broken = False

    def rewind(self, position: int) -> bool:
        """Go back to ``position``; False (and unchanged) where what that needs is no longer kept."""
        step = self.derived.step
        for window in step.windows.values():
            oldest = position - min(window.reads, position)
            if position and oldest < self.highest - window.rows:
                return False
        if self.conv is not None and not self.conv.can_rewind(position):
            return False
        self.broken = True
        self.highest = self.highest if position else 0
        for name, window in step.windows.items():
            if not isinstance(window, RelaxedProduct):
                drop_rows(self.tensors[f"ring:{name}"], self.position, position)
        for name, product in self._products:
            product.restart(self.tensors[name], position)
        for node in step.plan.histories:
            buffer, axis = self.tensors[f"history:{node.name}"], step.axes[node][0]
            buffer.narrow(axis, position, self.position - position).zero_()
        start = position
        if self.conv is not None:
            self.conv.rewind_sequence(position)
            start = position - self.conv.local
        elif self.block_start <= position:
            start = self.block_start
        if start != self.block_start:
            self._begin_block(start)
        self._place(position)
        self.broken = False
        return True

    def select(self, index: Tensor, derived: Derived | None = None) -> Lane:
        """A new lane of rows ``index`` (int64 [B'], repeats allowed)."""
        return self._copied(index, derived or self.derived, int(index.numel()))

    def moved(self, derived: Derived) -> Lane:
        """The same rows at another capacity, at the same position."""
        index = torch.arange(self.rows, device=self.tensors["position"].device)
        return self._copied(index, derived, self.batch)

    @torch.no_grad()
    def _copied(self, index: Tensor, derived: Derived, batch: int) -> Lane:
        new = Lane(derived, batch)
        step = derived.step
        for node in step.plan.histories:
            name, axes = f"history:{node.name}", step.axes[node]
            source = self.tensors[name].narrow(axes[0], 0, self.position)
            for axis in step.plan.batch_axes[node]:
                source = source.index_select(axis, index)
            new.tensors[name].narrow(axes[0], 0, self.position).copy_(source)
        for name in step.windows:
            rows, ring = self.tensors[f"ring:{name}"].index_select(1, index), new.tensors[f"ring:{name}"]
            kept = min(len(rows), len(ring))  # all of them, but for products at another capacity
            ring[:kept] = rows[:kept]
        if derived is not self.derived:
            for name, product in new._products:
                product.restart(new.tensors[name], self.position)
        start = self.block_start
        if self.conv is not None:
            assert derived.bank is not None
            new.conv = self.conv.select_rows(index)
            if derived.capacity != self.derived.capacity:
                new.conv = new.conv.grow(derived.bank)
            new.conv.bank = derived.bank
            new._view_block()
            start = self.position - new.conv.local
        new._begin_block(start)
        new._place(self.position)
        new.highest = self.highest
        return new
