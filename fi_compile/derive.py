"""What depends on the weights but not on the sequence: filters, tables and constants, derived once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .costs import BUILTIN, BUILTIN_NATIVE, Costs, Tiling, choose_tiling
from .kernels.channels import Fan
from .mixers.convolution import Convolution
from .mixers.stack import FilterBank, state_dtype
from .options import Options
from .program import Program, Rewrite
from .rates import rates_of_machine
from .schedule import window_size
from .step import StepProgram
from .twin import widen
from .units import ALL


@dataclass(frozen=True)
class Derived:
    """Filters, tables and constants of one weight version at one capacity, shared by all sequences.

    ``bank``: the stack of long filters, or None. ``constants``: step tensors that are the same for every position.
    ``tables``: by step name, tables position-major [capacity, …row], of which a step reads the current block.
    ``references``: per mixer the tensors its full-sequence reference takes.
    """

    step: StepProgram
    values: Mapping[str, Tensor] = field(repr=False)
    dtype: torch.dtype
    tiling: Tiling
    bank: FilterBank | None
    constants: Mapping[str, Tensor] = field(repr=False)
    tables: Mapping[str, Tensor] = field(repr=False)
    references: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    double: bool = False  # the twin's

    @property
    def capacity(self) -> int:
        """Positions the filters and tables reach."""
        return self.step.capacity

    @property
    def block(self) -> int:
        """Rows of tables and of the base block's buffers."""
        return self.tiling.block

    @property
    def nbytes(self) -> int:
        """Bytes of filters and tables; constants that are the model's own tensors are not counted."""
        bank = self.bank.nbytes if self.bank is not None else 0
        return bank + sum(t.nbytes for t in self.tables.values())


def derive(
    step: StepProgram,
    values: Mapping[str, Tensor],
    filters: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    tiling: Tiling,
    batch: int,
    rewrite: Rewrite | None = None,
    kernels: str = "torch",
    precision: str = "float32",
    keep_history: bool = True,
) -> Derived:
    """Evaluate everything that does not depend on the sequence, up to the step's capacity.

    ``values`` are the program's inputs in the model's dtypes; ``filters``, by mixer name, are what each mixer derived
    in double precision, rounded here, once, to ``dtype``. ``kernels``, ``precision``: what runs the tiles, see
    :class:`FilterBank`. ``keep_history``: whether the inputs of all positions stay at hand, see there too.
    """
    constants: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    references: dict[str, dict[str, Tensor]] = {}
    bank = _bank(step, filters, dtype, tiling, kernels, precision, keep_history)
    rows = _rows_of(step, bank)
    for mixer in step.mixers:
        found = filters[mixer.name]
        window = step.windows.get(mixer.name)
        if window is not None:
            weights = window.weights(found, mixer.source, dtype)
            constants |= {f"{key}:{mixer.name}": tensor for key, tensor in weights.items()}
        if not isinstance(mixer, Convolution):
            continue
        kept = found.kernel[:, : mixer.room] if mixer.ends else found.kernel
        # Long filters are many bytes: there is one copy of them.
        kernel = rows[mixer.name] if mixer.name in rows else kept.to(dtype).contiguous()
        reference = {"kernel": kernel}
        if mixer.gather is not None:
            reference["source"] = mixer.gather
            constants[f"source:{mixer.name}"] = mixer.gather
        if found.offset is not None:
            reference["offset"] = found.offset.to(dtype)
            if found.offset.shape[1] == 1 != step.capacity:
                constants[f"offset:{mixer.name}"] = reference["offset"][:, 0].contiguous()
            else:
                tables[f"offset:{mixer.name}"] = reference["offset"].t().contiguous()
        references[mixer.name] = reference
    if bank is not None:
        constants |= step.by_mixer("block_table", bank.block_table) | step.by_mixer("skip", bank.skip)
        if step.kernels == "triton":
            constants |= {} if bank.source is None else {"source": bank.source}
            fan = Fan.of(bank.target)
            constants |= {} if fan is None else {"fan": fan.first}
    _add_tables(step, values, batch, rewrite, constants, tables)
    return Derived(step, values, dtype, tiling, bank, constants, tables, references, rewrite is not None)


def tile_step(
    step: StepProgram, options: Options, *, device: torch.device, dtype: torch.dtype, block: int | None
) -> Tiling:
    """The tiling of a step's long convolutions that its options and, where they leave a choice, costs say.

    ``block``: the base block where it is settled. The machine is measured for models on the CPU alone; where Triton
    runs the tiles, a datasheet predicts what they take.
    """
    channels = sum(m.layout_out.count * m.fan_in for m in step.stacked)
    measured = channels and device.type == "cpu" and "auto" in (options.block, options.radix)
    native = step.kernels == "native" and all(m.fan_in == 1 for m in step.stacked)
    builtin = BUILTIN_NATIVE if native else BUILTIN
    return choose_tiling(
        _costs(step, device, dtype, options.precision) or (rates_of_machine(native) if measured else builtin),
        step.capacity,
        channels,
        block=options.block if block is None else block,
        radix=options.radix,
        latency=options.latency,
        double=dtype == torch.float64,
    )


def _costs(step: StepProgram, device: torch.device, dtype: torch.dtype, precision: str) -> Costs | None:
    """What tiles by Triton take; None where torch runs them."""
    if step.kernels != "triton":
        return None
    from .gpu_costs import GpuCosts
    from .kernels.gpu import H100

    outputs = sum(m.layout_out.count for m in step.stacked)
    pairs = sum(m.layout_out.count * m.fan_in for m in step.stacked)
    return GpuCosts(state_dtype(dtype), device, H100.at(precision), fan=pairs / max(1, outputs))


def _bank(
    step: StepProgram,
    filters: Mapping[str, Any],
    dtype: torch.dtype,
    tiling: Tiling,
    kernels: str,
    precision: str,
    keep_history: bool,
) -> FilterBank | None:
    if not step.stacked:
        return None
    stacked = [filters[m.name].kernel.to(dtype) for m in step.stacked]
    sources, targets, channels_in, channels_out = [], [], 0, 0
    for mixer in step.stacked:
        sources.append(mixer.source + channels_in)
        outputs = torch.arange(mixer.layout_out.count, device=mixer.source.device)
        targets.append(channels_out + outputs.repeat_interleave(mixer.fan_in))
        channels_in += mixer.layout_in.count
        channels_out += mixer.layout_out.count
    source = None if all(m.gather is None for m in step.stacked) else torch.cat(sources)
    target = None if all(m.fan_in == 1 for m in step.stacked) else torch.cat(targets)
    reach = max(m.room for m in step.stacked) if all(m.ends for m in step.stacked) else None
    if reach is not None and window_size(reach, tiling.block) <= step.capacity // 2:
        stacked = [kernel[:, : window_size(reach, tiling.block)] for kernel in stacked]
    else:
        reach = None
    return FilterBank(
        stacked,
        source,
        target=target,
        channels_in=channels_in,
        block=tiling.block,
        reach=reach,
        kernels=kernels,
        precision=precision,
        radix=tiling.radix,
        deferred=tiling.deferred,
        keep_history=keep_history or reach is not None,
    )


def _rows_of(step: StepProgram, bank: FilterBank | None) -> dict[str, Tensor]:
    """Each mixer's filters in the bank's own memory, where it has all of their lags."""
    if bank is None or bank.reach is not None:
        return {}
    counts = [m.layout_out.count * m.fan_in for m in step.stacked]
    return dict(zip((m.name for m in step.stacked), bank.filters.split(counts), strict=True))


def _add_tables(
    step: StepProgram,
    values: Mapping[str, Tensor],
    batch: int,
    rewrite: Rewrite | None,
    constants: dict[str, Tensor],
    tables: dict[str, Tensor],
) -> None:
    program: Program = step.program
    example = program.example
    shape = (batch, step.capacity, *example.shape[2:])
    dtype = example.dtype if rewrite is None else widen(example.dtype)
    sequence = example.new_zeros((1,) * len(shape), dtype=dtype).expand(shape)
    nodes: list[fx.Node] = list(step.plan.tables)
    with torch.no_grad():
        found = program.evaluate(sequence, values, keep=nodes, rewrite=rewrite)
    for node, demands in step.plan.tables.items():
        axes, value = step.axes[node], found[node].detach()
        if not axes or (ALL,) in demands:
            constants[f"table:{node.name}"] = value
        if any(d != (ALL,) for d in demands) and axes:
            rows = value.movedim(axes[0], 0).unsqueeze(axes[0] + 1)
            tables[f"rows:{node.name}"] = rows.contiguous()
