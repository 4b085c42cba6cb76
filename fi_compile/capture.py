"""trace: from a module to a :class:`Program`, through ``torch.export`` for both doors.

``decoder`` and ``explain`` hand over the user's module; the backend hands over the module Dynamo made,
whose parameters arrive as arguments. Both are exported with a dynamic length (and batch), functionalised,
and read back as a program with its guards evaluated.
"""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .alike import is_same
from .branches import cover_lengths, follows_one_row, follows_rows, from_where_it_runs, matters_for_one_row
from .compare import attributes_kept, batches_agree, disagreements
from .errors import Refusal, Unsupported
from .exporting import export_module
from .guards import admitted_lengths, from_whole_sizes, rows_left_out
from .outright import Outright, refuse_whole_chunks
from .program import Input, Kind, Lengths, Program, is_tensor, sizes, source_of
from .questions import TORCH, UNKNOWN, UNKNOWN_LENGTH, called, questions
from .spelled_out import shape_env_of

_MOST_CALLED = 1 << 18  # lengths at which the calls of two traces at one length are compared
_FAR = 1 << 12  # lengths at which a model is compared, whatever capacity is wanted
_SOME = 61  # positions of a sequence that is run for what a model calls
_MOST_PAIRS = 2  # of a number of rows and a length that a layout excludes: so many are traced

_KINDS = {
    InputKind.PARAMETER: Kind.PARAMETER,
    InputKind.BUFFER: Kind.BUFFER,
    InputKind.CONSTANT_TENSOR: Kind.CONSTANT,
    InputKind.USER_INPUT: Kind.SEQUENCE,
}


def trace_module(
    model: nn.Module,
    example: Tensor,
    *,
    length: int | None = None,
    look: Callable[[Program, int], None] | None = None,
) -> Program:
    """Export ``model`` on a sequence like ``example`` ([B, s] ids or [B, s, D] features).

    ``length`` is the capacity wanted: the trace is made near it where that agrees with the model at every other
    length, because Python control flow is recorded for the length it met. A trace that leaves lengths out is shown to
    ``look``, with the longest in question, before others are made for these: it may raise :class:`Outright`. Raises
    :class:`Unsupported` when the model cannot be traced.
    """
    failures: list[Exception] = []
    best: Program | None = None
    second_best: tuple[Program, list[int]] | None = None
    tried = _trace_lengths(model, example, length)
    for trace_length in tried:
        if _pins_length(failures[-1:]) and _pinned_at_short(model, example, tried):
            raise Unsupported(_PINNED) from failures[-1]
        near = max(trace_length, example.shape[1], length or 0)
        try:
            program = _before_far_holes(_trace_at(model, example, trace_length), near)
            try:  # which a program whose tables end below its range cannot run
                odd = disagreements(program, model)
            except IndexError:
                program = from_where_it_runs(program)
                odd = disagreements(program, model)
            if not odd:
                program = _covered(program, model, near, look=look)
        except Outright:
            raise
        except Exception as error:
            failures.append(error)
            continue
        if not odd:
            if length is None or program.lengths.at_least(length) is not None:
                return program
            best = best or program
        elif second_best is None and program.lengths.admits(example.shape[1]):
            second_best = program, odd
    if best is None and second_best is not None:
        best = _covered(second_best[0], model, max(example.shape[1], length or 0), second_best[1], look)
    if best is not None:
        return best if length is None else _with_last_position(best, model, length)
    refusals = [error for error in failures if isinstance(error, Unsupported)]
    if refusals and len(refusals) == len(failures):
        raise refusals[-1]
    if failures:
        error = next(e for e in failures if not isinstance(e, Unsupported))
        with attributes_kept(model):
            chunks = refuse_whole_chunks(model, example)
        raise Unsupported(chunks or _trace_refusal(error)) from error
    raise Unsupported(
        Refusal(
            "length_dependent",
            "the model computes different functions at different lengths, none of which covers the example",
            hint="avoid branches on the sequence length",
        )
    )


def _pins_length(errors: Sequence[Exception]) -> bool:
    """Whether an export found one number in the place of the length, and of it alone."""
    found = [str(e).splitlines()[0] for e in errors if str(e)]
    return any("Constraints violated" in s and "size()[1]" in s and "size()[0]" not in s for s in found)


def _pinned_at_short(model: nn.Module, example: Tensor, tried: Sequence[int]) -> bool:
    """Whether that is so at a short length too: the others may have met a dimension of the model by chance."""
    try:
        _trace_at(model, example, next(n for n in (9, 11, 13, 15) if n not in tried))
    except Exception as error:
        return _pins_length([error])
    return False


_PINNED = Refusal(
    "static_length",
    "the trace pins the sequence length: the forward loops over positions in Python, or computes with a number of them",
    hint="spell the loop as operators on whole sequences (cumsum, scores with a mask, a convolution), or register a "
    "mixer; take sizes from x.shape[1] by plain integer arithmetic",
)


def _before_far_holes(program: Program, near: int) -> Program:
    """Ended before a single length left out so far off that comparing there takes more than anybody asked for."""
    far = min((n for n in program.lengths.holes if n > max(near, _FAR)), default=None)
    if far is None:
        return program
    holes = frozenset(n for n in program.lengths.holes if n < far)
    return replace(program, lengths=replace(program.lengths, maximum=far - 1, holes=holes))


def _covered(
    program: Program,
    model: nn.Module,
    near: int,
    odd: Sequence[int] = (),
    look: Callable[[Program, int], None] | None = None,
) -> Program:
    """The program with the lengths at which traces made there show what it does; it does not at the ``odd`` ones."""
    return cover_lengths(
        program,
        partial(_trace_like, program, model),
        lambda found, lengths: disagreements(found, model, lengths),
        near,
        odd,
        look,
    )


def _with_last_position(program: Program, model: nn.Module, length: int) -> Program:
    """Admit the length wanted where the guards end just below it: ``min(s, 4096)`` splits what is one function."""
    lengths = program.lengths
    if lengths.maximum is None or length != lengths.maximum + 1:
        return program
    try:
        other = _trace_like(program, model, length, pinned=True)
    except Exception:
        return program  # a table ends here
    longer = replace(program, lengths=replace(lengths, maximum=length))
    return longer if is_same(program, other, np.asarray([length])) else program


def _trace_at(model: nn.Module, example: Tensor, length: int) -> Program:
    """Export at one length, with a symbolic batch where the model allows it."""
    try:
        program = _trace_general(model, example, length, rows=None)
        if batches_agree(program, model):
            return program
    except Exception as error:
        if _pins_length([error]):
            raise  # whatever the batch
        # a batch that is written into the model, as in a graph made for one batch
    return _trace_general(model, example, length, rows=example.shape[0])


def _trace_general(model: nn.Module, example: Tensor, length: int, rows: int | None) -> Program:
    """Export at one length; again without the guards of torch's own where these leave lengths out.

    Torch lays out an axis of one entry, say, unlike one of more, and so leaves out the lengths that make one. The
    second trace is taken where it makes the very calls of the first at all lengths of that.
    """
    try:
        program = _trace(model, example, length, rows)
    except Unsupported as refused:
        if refused.refusals[0].kind != "lengths":
            raise
        return _trace(model, example, length, rows, general=True)
    if program.lengths.are_all:
        return program
    try:
        general = _trace(model, example, length, rows, general=True)
    except Exception:
        return program
    # Where the ordinary trace ends, a table does, or the model cuts its input off.
    ends = [p.lengths.maximum for p in (program, general) if p.lengths.maximum is not None]
    general = replace(general, lengths=replace(general.lengths, maximum=min(ends, default=None)))
    ours, theirs = (p.lengths.mask(_MOST_CALLED) for p in (program, general))
    if (ours & ~theirs).any() or not (theirs & ~ours).any():
        return program
    return general if is_same(program, general, ours.nonzero()[0]) else program


def _trace_like(
    program: Program, model: nn.Module, length: int, pinned: bool = False, general: bool = False
) -> Program:
    """Another trace of the model, with its batch as in ``program``; ``pinned``: for one length only."""
    rows = program.batch if isinstance(program.batch, int) else None
    return _trace(model, program.example, length, rows, pinned, general)


def _trace(
    model: nn.Module,
    example: Tensor,
    length: int,
    rows: int | None,
    pinned: bool = False,
    general: bool = False,
) -> Program:
    """Export at one length for ``rows`` of a batch, or (None) for any number of them.

    ``general``: see :func:`export_module`. Raises :class:`Unsupported` where the model does not do the same to every
    number of rows.
    """
    traced_rows = max(example.shape[0], 3 + (length == 3)) if rows is None else rows
    with attributes_kept(model), questions() as asked:
        exported = export_module(
            model, _resized(example, traced_rows, length), rows is None, not pinned, general
        )
        program = _read(exported, model, example, pinned)
        if not pinned:
            some = program.lengths.at_least(min(length, _SOME)) or length
            one_position, one_row, several = (
                called(model, _resized(example, *shape))
                for shape in ((traced_rows, 1), (1, some), (traced_rows, some))
            )
            asked += [UNKNOWN_LENGTH] * (one_position not in (several, None))
            asked += [UNKNOWN] * (one_row not in (several, None))
    if not pinned:
        program = replace(program, questions=tuple(dict.fromkeys(asked)))
    if rows is None:
        if isinstance(program.batch, int):
            raise Unsupported(
                Refusal("trace", "the model takes the number of rows in the batch for a number")
            )
        ranges = shape_env_of(exported.graph).var_to_range[program.batch]
        trace = partial(_trace, model, example)
        left_out = rows_left_out(program.guards, program.length, program.batch, ranges, program.lengths)
        if (
            left_out is None
            or not all(follows_rows(program, trace, *pair) for pair in left_out[:_MOST_PAIRS])
            or (
                matters_for_one_row(asked, program)
                and not follows_one_row(program, partial(trace, length, 1, pinned, general))
            )
        ):
            raise Unsupported(Refusal("trace", "the model branches on the number of rows in the batch"))
    return program


_HERE = str(pathlib.Path(__file__).parent)


def _trace_lengths(model: nn.Module, example: Tensor, length: int | None) -> list[int]:
    """Lengths to trace at, best first: near the capacity, beyond it, near the example, the example's own."""
    taken = {d + e for t in _tensors(model) for d in t.shape for e in (-1, 0, 1)}
    taken |= {d // 2 + e for d in set(taken) for e in (0, 1)} | {example.shape[-1], 3}

    def near(target: int, floor: int) -> int | None:
        free = (n for n in range(target, max(floor, target // 2) - 1, -1) if n not in taken)
        return next(free, None)

    own = example.shape[1]
    wanted = [near(max(own, 61), 5), near(own, 2), own]
    if length is not None:
        beyond = next(n for n in range(length, length + len(taken) + 1) if n not in taken)
        wanted = [near(length - 2, 5), beyond, *wanted]
    return list(dict.fromkeys(n for n in wanted if n is not None and n >= 2)) or [own]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _resized(example: Tensor, batch: int, length: int) -> Tensor:
    """A sequence of the example's kind with another batch and length, its values repeated."""
    rows = torch.arange(batch, device=example.device) % example.shape[0]
    columns = torch.arange(length, device=example.device) % example.shape[1]
    return example.detach()[rows][:, columns].clone()


def _read(exported: ExportedProgram, model: nn.Module, example: Tensor, pinned: bool) -> Program:
    signature = exported.graph_signature
    written = [o.target for o in signature.output_specs if o.kind not in (OutputKind.USER_OUTPUT,)]
    if written:
        raise Unsupported(
            Refusal(
                "mutation",
                f"the forward writes to {written[0]!r}, which outlives the call",
                hint="keep no state in forward: compute it, or register it once before decoding",
            )
        )
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))  # names that shadow a builtin (``input``) change here
    module = fx.GraphModule(torch.nn.Module(), graph)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    inputs, values = [], {}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        kind = _KINDS[spec.kind]
        inputs.append(Input(node.name, kind, spec.target))
        if kind is Kind.CONSTANT:
            values[node.name] = exported.constants[str(spec.target)]
        elif kind is not Kind.SEQUENCE:
            values[node.name] = _attribute(model, str(spec.target))
    (sequence,) = [n for n in placeholders if n.name not in values]
    shape = sequence.meta["val"].shape
    batch, length = (_symbol(size) for size in shape[:2])
    shape_env = shape_env_of(exported.graph)
    guards = tuple(guard.expr for guard in getattr(shape_env, "guards", ()))
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    if pinned:
        lengths, length = Lengths(int(length), int(length)), sympy.Symbol("pinned_length", integer=True)
        return Program(
            module, tuple(inputs), length, batch, lengths, out_spec, values, example.detach(), guards
        )
    if not isinstance(length, sympy.Symbol):
        raise Unsupported(
            Refusal(
                "static_length",
                f"the trace pins the sequence length to {length}: the model runs at one length only",
                hint="compute length-dependent sizes from x.shape[1] with plain integer arithmetic",
            )
        )
    _refuse_counted(graph, {length, batch})
    ranges = shape_env.var_to_range[length]
    lengths = from_whole_sizes(admitted_lengths(guards, length, batch, ranges), graph.nodes, length, batch)
    return Program(module, tuple(inputs), length, batch, lengths, out_spec, values, example.detach(), guards)


def _refuse_counted(graph: fx.Graph, known: set[Any]) -> None:
    """Refuse a tensor with as many entries as something else has nonzero ones: no length says how many."""
    for node in graph.nodes:
        if is_tensor(node) and any(getattr(size, "free_symbols", set()) - known for size in sizes(node)):
            raise Unsupported(
                Refusal(
                    "data_dependent",
                    f"{node.name!r} has a size that is counted from values, not computed from the length",
                    (node.name,),
                    source_of(node),
                    "nonzero(), unique() and boolean indexing count; use arange, torch.where or a mask",
                )
            )


def _symbol(size: Any) -> sympy.Symbol | int:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _attribute(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _trace_refusal(error: Exception) -> Refusal:
    if isinstance(error, GuardOnDataDependentSymNode):
        own = [
            f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((TORCH, _HERE))
        ]
        return Refusal(
            "data_dependent",
            f"the forward branches on a number computed from data, {error.cond}, which a trace cannot follow",
            source=f"{own[-1].filename}:{own[-1].lineno}" if own else None,
            hint="compute both branches and choose by torch.where; keep .item() and bool() of tensors out of forward",
        )
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    return Refusal(
        "trace",
        f"torch.export could not trace the model with a dynamic sequence length: {first[:300]}",
        hint="no data-dependent Python control flow, no float or math.* of a length, no external kernels",
    )
