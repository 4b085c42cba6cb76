"""Recognise a causal convolution of two values that both depend on the sequence: a filter computed from the data.

The unit is a function f(a, b), affine in each by the operators' own rules at every length. Both it and the reference
``scale·(a ∗ b)`` are then bilinear, and one random pair of inputs over the whole capacity settles their equality, as
for :func:`fi_compile.mixers.convolution.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import is_tensor
from fi_compile.proof import Proof
from fi_compile.units import Unit

from .convolution import layout_of, parameters_behind
from .groups import Group, Operand, noise_of
from .layout import Layout
from .pairs import close_by_channel

_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Product:
    """A unit that is, channel by channel, the causal convolution of two values that depend on the sequence.

    ``source``: int64 [2·C], the channel of the first value each output channel reads, and then that of the second, of
    both values' channels in turn.
    """

    analysis: Consistency = field(repr=False)
    unit: Unit = field(repr=False)
    operands: tuple[Operand, Operand] = field(repr=False)
    layout_out: Layout
    source: Tensor = field(repr=False)
    depends_on: tuple[str, ...]

    kind = "data_conv"
    lowering = "two_tiles"
    support = reference = None

    @property
    def name(self) -> str:
        """The name of the node whose value the convolution makes."""
        return self.unit.exit.name

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values it reads."""
        return tuple(o.node for o in self.operands)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """Whole values of the inputs as [B, Ca + Cb, n]."""
        return torch.cat([o.layout.flatten(v) for o, v in zip(self.operands, values, strict=True)], 1)

    def derive(self, values: Mapping[str, Tensor], length: int) -> Tensor:
        """The factor of each channel, float64 [C], from double-precision weights."""
        group = Group(self.analysis, self.unit, values, self.analysis.lengths[0], self.inputs)
        return _scale(group, self.operands, self.layout_out)

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether the unit equals its reference on random inputs over ``capacity`` positions.

        And is nothing, exactly, where either input is: what is added to the convolution, however small beside random
        inputs, may be all there is of others.
        """
        group = Group(self.analysis, self.unit, values, capacity, self.inputs)
        generator = torch.Generator().manual_seed(17)
        inputs = [noise_of(group, o, generator) - 1.0 for o in self.operands]
        for given in inputs:
            alone = [torch.zeros_like(x) if x is given else x for x in inputs]
            if bool(group.run(self.operands, alone).any()):
                return False
        a, b = self.flatten(inputs).index_select(1, self.source).chunk(2, 1)
        expected = convolve_rows(a, b) * self.derive(values, capacity).unsqueeze(-1)
        return close_by_channel(
            self.layout_out.flatten(group.run(self.operands, inputs)), expected, _TOLERANCE
        )


def convolve_rows(a: Tensor, b: Tensor) -> Tensor:
    """Σ_{i≤t} a[i]·b[t-i], row by row: a, b and the result [B, C, n]."""
    n = a.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(a, n=2 * n) * torch.fft.rfft(b, n=2 * n), n=2 * n)[..., :n]


def recognise_product(
    analysis: Consistency, unit: Unit, inputs: Sequence[fx.Node], is_affine: Callable[[Unit, fx.Node], bool]
) -> Product | None:
    """The convolution of two values a unit is, as far as trials at a sampled length can say, or None.

    Requires: ``inputs``, two values of one sequence axis, are all the unit reads of the sequence.
    """
    a, b = inputs
    data = analysis.program.input_dependent
    if not all(is_affine(unit, x) for x in (a, b)) or any(n in data for n in unit.reads if n not in (a, b)):
        return None
    layouts = [layout for node in (a, b, unit.exit) if (layout := layout_of(analysis, node)) is not None]
    if len(layouts) < 3 or any(layout.complex for layout in layouts):
        return None
    if len({layout.batch is None for layout in layouts}) > 1:
        return None
    of_a, of_b, layout_out = layouts
    operands = Operand(a, of_a, False), Operand(b, of_b, False)
    try:
        group = Group(analysis, unit, analysis.parameters, analysis.lengths[0], (a, b))
        source = _source(group, operands, layout_out)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    if source is None:
        return None
    behind = parameters_behind(analysis.program, [n for n in unit.reads if is_tensor(n) and n not in (a, b)])
    return Product(analysis, unit, operands, layout_out, source, behind)


def _at_first(group: Group, operand: Operand, values: Tensor) -> Tensor:
    """An input [B, C, n] that is ``values`` [C] at position 0, and zero after it."""
    rows = group.batch if operand.layout.batch is not None else 1
    flat = torch.zeros(rows, operand.layout.count, group.length, dtype=torch.float64, device=values.device)
    flat[:, :, 0] = values
    return operand.layout.unflatten(flat)


def _respond(group: Group, operands: Sequence[Operand], out: Layout, values: Sequence[Tensor]) -> Tensor:
    """The unit's output [C] at position 0 for inputs that are ``values`` there."""
    inputs = [_at_first(group, o, v) for o, v in zip(operands, values, strict=True)]
    return out.flatten(group.run(operands, inputs))[0, :, 0]


def _ones(operand: Operand, device: torch.device) -> Tensor:
    return torch.ones(operand.layout.count, dtype=torch.float64, device=device)


def _scale(group: Group, operands: Sequence[Operand], out: Layout) -> Tensor:
    device = group.program.example.device
    return _respond(group, operands, out, [_ones(o, device) for o in operands])


def _source(group: Group, operands: Sequence[Operand], out: Layout) -> Tensor | None:
    """The one channel of each input that each output channel reads, int64 [2·C]; None where it reads others too."""
    device = group.program.example.device
    generator = torch.Generator().manual_seed(19)
    found, before = [], 0
    for place, operand in enumerate(operands):
        values = [
            0.5 + torch.rand(o.layout.count, dtype=torch.float64, generator=generator) for o in operands
        ]
        live = []
        for channel in range(operand.layout.count):
            only = torch.zeros(operand.layout.count, dtype=torch.float64)
            only[channel] = 1.0
            trial = [(only if i == place else v).to(device) for i, v in enumerate(values)]
            live.append(_respond(group, operands, out, trial))
        reads = torch.stack(live)
        norm = reads.abs().amax(0)
        if not bool((norm > 0).all()) or bool(((reads.abs() > 1e-9 * norm).sum(0) != 1).any()):
            return None
        found.append(before + reads.abs().argmax(0))
        before += operand.layout.count
    return torch.cat(found)
