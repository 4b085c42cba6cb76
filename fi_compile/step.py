"""The step program: one new position of every output from what is kept of the others.

Everything a step reads or writes is a named tensor of static shape, the position among them; ``StepProgram`` is
an ordinary function over those tensors, ready for ``make_fx`` and Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .kernels.block import block_sum
from .mixers.convolution import Convolution
from .mixers.increments import Increment, Mixer, increment_of, on_kernels, weights_of
from .mixers.reference import sum_pairs
from .program import Program, Rewrite
from .units import ALL, NEW, Plan, Unit, run_unit, take_row

Tensors = Mapping[str, Tensor]


# What of the stack's channels a tensor of it has: inputs, outputs, or pairs of both.
_CHANNELS: Mapping[str, Callable[[Convolution], int]] = {
    "block_inputs": lambda mixer: mixer.layout_in.count,
    "block_pending": lambda mixer: mixer.layout_out.count,
    "block_table": lambda mixer: mixer.layout_out.count * mixer.fan_in,
    "skip": lambda mixer: mixer.layout_out.count * mixer.fan_in,
}


@dataclass(frozen=True)
class StepProgram:
    """A plan made executable: names for everything a step touches, and the step itself.

    Names: ``row`` the new row of the sequence [B, 1, …]; ``position`` and ``local`` int64 [1], the position in the
    sequence and in the base block; ``history:n`` all rows so far of node n; ``rows:n`` the current block's rows of
    table n, position-major; ``table:n`` a table or constant whole; ``ring:m``, ``source:m``, ``offset:m`` of mixer
    m and the weights its increment needs (``kernel:m``, …);
    ``block_inputs:m``, ``block_pending:m``, ``block_table:m``, ``skip:m`` the channels of mixer m in the stack, or,
    where one launch of a kernel serves them all, ``block_inputs`` … and ``source`` of the whole. Histories are
    read up to ``reach`` rows (None: all there are), which must exceed the position.
    ``kernels``: what sums the base block and steps short convolutions and linear attention, ``torch`` or ``triton``.
    """

    program: Program
    plan: Plan
    capacity: int
    reach: int | None = None
    kernels: str = "torch"

    @property
    def length(self) -> int:
        """The length that stands for all rows so far."""
        return self.capacity if self.reach is None else self.reach

    @cached_property
    def mixers(self) -> tuple[Mixer, ...]:
        """All mixers, in the order they run."""
        return tuple(unit.mixer for unit in self.plan.units if unit.mixer is not None)

    @cached_property
    def stacked(self) -> tuple[Convolution, ...]:
        """The long convolutions in tiles, in the order of their channels in the stack."""
        return tuple(
            m for m in self.mixers if isinstance(m, Convolution) and increment_of(m, self.capacity) is None
        )

    def by_mixer(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        """A tensor of the whole stack, channels last, as the step reads it: a view for each mixer.

        So that the layers of a model are the same program on other tensors. One launch of a Triton kernel serves all
        layers: it reads the whole.
        """
        if self.kernels == "triton":
            return {name: whole}
        views, start = {}, 0
        for mixer in self.stacked:
            count = _CHANNELS[name](mixer)
            views[f"{name}:{mixer.name}"] = whole.narrow(-1, start, count)
            start += count
        return views

    @cached_property
    def windows(self) -> Mapping[str, Increment]:
        """The ring-keeping increments by mixer name."""
        found = ((m.name, increment_of(m, self.capacity)) for m in self.mixers)
        return {name: on_kernels(w, self.kernels) for name, w in found if w is not None}

    @cached_property
    def axes(self) -> Mapping[fx.Node, tuple[int, ...]]:
        """Sequence axes of the nodes a step touches."""
        return self.plan.axes

    @cached_property
    def output_axes(self) -> tuple[int | None, ...]:
        """The sequence axis of each output, None where it has none."""
        found = (self.axes.get(o, ()) if isinstance(o, fx.Node) else () for o in self.plan.outputs)
        return tuple(axes[0] if axes else None for axes in found)

    def __call__(self, t: Tensors, rewrite: Rewrite | None = None) -> list[Any]:
        """Compute the outputs' newest rows; write rings, histories, the block's inputs; advance position."""
        run = _Run(self, t, rewrite)
        for unit in self.plan.units:
            run.unit(unit)
        outputs = [run.output(node) for node in self.plan.outputs]
        run.finish()
        return outputs


class _Run:
    """One step: the rows known so far."""

    def __init__(self, step: StepProgram, t: Tensors, rewrite: Rewrite | None) -> None:
        self.step, self.t, self.rewrite = step, t, rewrite
        self.program = step.program
        self.position, self.local = t["position"], t["local"]
        self.rows: dict[tuple[fx.Node, tuple[str, ...]], Any] = {}
        self.batch = t["row"].shape[0]
        self.inputs: list[Tensor] = []
        self.pending: Tensor | None = None
        self.channel_out = self.pair = 0
        self.put(self.program.sequence, (NEW,), t["row"])

    def put(self, node: fx.Node, demand: tuple[str, ...], value: Any) -> None:
        self.rows[node, demand] = value
        history = self.t.get(f"history:{node.name}")
        if history is not None and demand == (NEW,):
            history.index_copy_(self.step.axes[node][0], self.position, value)

    def get(self, node: fx.Node, demand: tuple[str, ...]) -> Any:
        found = self.rows.get((node, demand))
        if found is not None:
            return found
        if demand == (ALL,) and f"history:{node.name}" in self.t:
            return self.reached(node, self.t[f"history:{node.name}"])
        if demand == (NEW,) and f"rows:{node.name}" in self.t:
            value = torch.index_select(self.t[f"rows:{node.name}"], 0, self.local)
            value = value.squeeze(0)
            self.rows[node, demand] = value
            return value
        return self.reached(node, self.t[f"table:{node.name}"])

    def reached(self, node: fx.Node, value: Tensor) -> Tensor:
        """The rows of a whole value that a step may look at."""
        axes = self.step.axes.get(node, ())
        if not axes or self.step.reach is None:
            return value
        return value.narrow(axes[0], 0, self.step.reach)

    def unit(self, unit: Unit) -> None:
        if unit.mixer is not None:
            self.put(unit.exit, unit.demand, self.mix(unit.mixer))
            return
        env = {node: self.get(node, demand) for node, demand in unit.reads.items()}
        axes = self.step.axes[unit.exit]
        lists = None
        if unit.binding == "axis":
            reach = self.step.length
            lists = {a: 1 if kind == NEW else reach for a, kind in zip(axes, unit.demand, strict=True)}
        length = 1 if unit.binding == "row" else self.step.length
        value = run_unit(
            self.program,
            unit.nodes,
            env,
            length=length,
            batch=self.batch,
            lists=lists,
            rewrite=self.rewrite,
        )
        if unit.binding == "region":
            for axis, kind in zip(axes, unit.demand, strict=True):
                if kind == NEW:
                    value = take_row(value, axis, self.position)
        self.put(unit.exit, unit.demand, value)

    def mix(self, mixer: Mixer) -> Tensor:
        flat = mixer.flatten([self.get(x, (NEW,)) for x in mixer.inputs])[..., 0]
        window = self.step.windows.get(mixer.name)
        if window is not None:
            weights = weights_of(window, mixer.name, self.t)
            z = window.step(self.t[f"ring:{mixer.name}"], self.position, flat, weights)
        else:
            assert isinstance(mixer, Convolution)
            z = self.stack(mixer, flat)
        offset = self.t.get(f"offset:{mixer.name}")
        if offset is not None:
            row = offset if offset.dim() == 1 else torch.index_select(offset, 0, self.local)[0]
            z = z + row
        value = mixer.layout_out.unflatten(z.unsqueeze(-1))
        dtype = mixer.unit.exit.meta["val"].dtype
        widened = self.rewrite is not None and (dtype.is_floating_point or dtype.is_complex)
        return value if widened else value.to(dtype)

    def stack(self, mixer: Convolution, x: Tensor) -> Tensor:
        if self.step.kernels == "triton":
            return self.stack_at_once(mixer, x)
        inputs, pending, table, skip = (self.t[f"{name}:{mixer.name}"] for name in _CHANNELS)
        source = self.t.get(f"source:{mixer.name}")
        x = x.to(pending.dtype)
        now = x if source is None else x.index_select(1, source)
        terms = now * skip + block_sum(inputs, table, self.local, source)
        value = torch.index_select(pending, 0, self.local)[0] + sum_pairs(terms, mixer.fan_in)
        inputs.index_copy_(0, self.local, x.unsqueeze(0))
        return value

    def stack_at_once(self, mixer: Convolution, x: Tensor) -> Tensor:
        t = self.t
        if self.pending is None:
            from .kernels.block_step import block_step  # only here: who stays with torch needs no Triton

            block = t["block_inputs"], t["block_table"], self.local, t.get("source")
            most = max(m.fan_in for m in self.step.stacked)
            self.pending = block_step(t["block_pending"], *block, t.get("fan"), most)
        x = x.to(self.pending.dtype)
        self.inputs.append(x)
        count = mixer.layout_out.count
        channels = slice(self.channel_out, self.channel_out + count)
        pairs = slice(self.pair, self.pair + count * mixer.fan_in)
        self.channel_out, self.pair = channels.stop, pairs.stop
        source = t.get(f"source:{mixer.name}")
        now = x if source is None else x.index_select(1, source)
        return self.pending[:, channels] + sum_pairs(now * t["skip"][pairs], mixer.fan_in)

    def output(self, node: Any) -> Any:
        if not isinstance(node, fx.Node) or node not in self.step.axes:
            return node
        return self.get(node, (NEW,) * len(self.step.axes[node]))

    def finish(self) -> None:
        t = self.t
        if self.inputs:
            t["block_inputs"].index_copy_(0, self.local, torch.cat(self.inputs, 1).unsqueeze(0))
        t["position"].add_(1)
        t["local"].add_(1)
