"""The decoder: prefill, step, extend, rewind, fork, reorder over the state of one batch of sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .capture import trace_module
from .engine import Engine
from .errors import CapacityError, DecoderBroken, InputError, Refusal, Unsupported, WeightsChanged
from .extension import between, prepare
from .lane import Lane
from .mixers.convolution import FilterGrew
from .options import Options, read_options
from .outright import refuse_outright
from .report import Report
from .twin import vocabulary

# From here on one forward over the whole sequence is preferred to single steps.
_LEAST_BY_FORWARD = 64
_FORWARD_SHARE = 16


def decoder(
    model: nn.Module,
    example: Tensor,
    *,
    max_length: int | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Decoder:
    """Derive an exact incremental decoder from a causal model's full-sequence ``forward``.

    ``example``: ids [B, s] or features [B, s, D], sequence axis 1, of the kind the model reads; its values do not
    matter. ``max_length``: most positions a sequence may have (default: what the model's tables admit, growing).

    Raises :class:`Unsupported` when the model cannot be decoded exactly (which node, which source line, why, what
    to change), :class:`CapacityError` when ``max_length`` exceeds what its tables hold, :class:`InputError` on
    unknown options or an example of the wrong form.
    """
    chosen = read_options(options, max_length=max_length)
    engine = build_engine(model, example, chosen)
    return Decoder(engine, model, example.shape[0])


def build_engine(model: nn.Module, example: Tensor, options: Options) -> Engine:
    """Check the arguments, trace and analyse a model."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(example, Tensor) or example.dim() not in (2, 3) or 0 in example.shape:
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise InputError(f"example: expected ids [B, s] or features [B, s, D], found {shape}")
    if example.is_meta:
        raise InputError("example: expected a tensor with data, found one on the meta device")
    if example.is_complex():
        raise InputError(f"example: expected ids or real features, found {example.dtype}")
    refusals = _active_dropout(model)
    if refusals:
        raise Unsupported(*refusals)
    if options.step != "eager" and example.device.type == "cpu":
        prepare()
    program = trace_module(model, example, length=options.max_length, look=refuse_outright)
    return Engine(program, options, model)


def _active_dropout(model: nn.Module) -> list[Refusal]:
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return [
                Refusal(
                    "training",
                    f"{name!r} drops activations at random: the model is in training mode",
                    hint="call model.eval() first",
                )
            ]
    return []


class Decoder:
    """Sequences being decoded, and everything kept of them.

    Rows may be at different positions; rows at the same position run in lockstep. A tensor that was returned never
    changes later. Outputs keep the model's structure; an output with a sequence axis is returned without it (one
    position) or with it (``extend``).
    """

    def __init__(self, engine: Engine, model: nn.Module | None, batch: int) -> None:
        self.engine, self.model = engine, model
        self._watch = engine.watch(model)
        self._lanes: list[tuple[Lane, list[int]]] = []
        self._batch = batch
        self.reset()

    # -- what is there -------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What was found in the model and how it runs."""
        return self.engine.report

    @property
    def batch(self) -> int:
        """Number of sequences B."""
        return self._batch

    @property
    def capacity(self) -> int:
        """Positions there is room for without growing."""
        return min(lane.derived.capacity for lane, _ in self._lanes)

    @property
    def position(self) -> Tensor:
        """Positions done, per row: int64 [B]."""
        position = torch.zeros(self._batch, dtype=torch.int64)
        for lane, rows in self._lanes:
            position[rows] = lane.position
        return position

    @property
    def inputs(self) -> Tensor:
        """A copy of the sequences so far, [B, longest position(, D)]: what the state was computed from."""
        return self._kept_inputs.clone()

    @property
    def _kept_inputs(self) -> Tensor:
        """The same without a copy: to be read only, and until the next call."""
        return self._sequence[:, : self._longest]

    @property
    def _longest(self) -> int:
        """Positions done of the row that has most."""
        return max(lane.position for lane, _ in self._lanes)

    @property
    def weights_unchanged(self) -> bool:
        """Whether every weight is the tensor, at the version, that the state was computed with."""
        return self._watch.unchanged()

    def _weights_same(self) -> bool:
        """The same by their contents too: as costly as reading every weight once."""
        return not self._watch.changed()

    @property
    def state_bytes(self) -> int:
        """Bytes of state of these sequences (weights, filters and tables are shared and not counted)."""
        return sum(lane.state_bytes for lane, _ in self._lanes) + self._sequence.nbytes

    # -- whole sequences -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the sequences: position 0, weights as they are now."""
        self._renew_weights()
        self._start(self._batch)

    def refresh(self) -> None:
        """Take notice of weights written behind autograd's back, and recompute the state from the inputs kept."""
        sequence, position = self._sequence, self.position
        self._renew_weights()
        self._prefill(sequence[:, : int(position.max())], position.tolist())

    def prefill(self, prompt: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Any:
        """Start new sequences from a prompt [B, P(, D)]; return the outputs at each row's last position.

        ``lengths``: positions of each row that count (ragged prompts, padded at the end), each 1 … P. Raises
        :class:`InputError` for a prompt of the wrong kind, :class:`CapacityError` for one that is too long.
        """
        self._check_sequence(prompt, "prompt")
        wanted = [prompt.shape[1]] * prompt.shape[0] if lengths is None else [int(n) for n in lengths]
        if len(wanted) != prompt.shape[0] or not all(1 <= n <= prompt.shape[1] for n in wanted):
            raise InputError(f"lengths: expected {prompt.shape[0]} of 1 … {prompt.shape[1]}, found {wanted}")
        if len(set(wanted)) > 1:
            self._check_independent("prompts of different lengths")
        if isinstance(self.engine.program.batch, int) and prompt.shape[0] != self.engine.program.batch:
            raise InputError(
                f"prompt: this model was traced for a batch of {self.engine.program.batch}, "
                f"found {prompt.shape[0]}"
            )
        fewest = self.engine.program.lengths.fewest
        if min(wanted) < fewest:
            raise InputError(
                f"prompt: below {fewest} positions this model computes another function; give at least {fewest}"
            )
        self._renew_weights()
        return self._prefill(prompt, wanted)

    def _prefill(self, prompt: Tensor, lengths: list[int]) -> Any:
        try:
            lanes, parts = self._filled(prompt, lengths)
        except FilterGrew:
            with self._enlarged(self.engine.capacity_for(max(lengths) + 1)):
                lanes, parts = self._filled(prompt, lengths)
        self._start(prompt.shape[0], lanes)
        used = max(lengths)  # beyond it is padding
        self._sequence[:, :used] = prompt[:, :used]
        return self._assemble(parts) if min(lengths) else None

    def _filled(self, prompt: Tensor, lengths: list[int]) -> tuple[list[tuple[Lane, list[int]]], list[Any]]:
        """New lanes brought to the end of each row's prompt, and the newest outputs of each."""
        parts = []
        lanes: list[tuple[Lane, list[int]]] = []
        for length in sorted(set(lengths)):
            rows = [i for i, n in enumerate(lengths) if n == length]
            lane = Lane(self._derived(len(rows), length + 1), len(rows))
            lanes.append((lane, rows))
            sequence = prompt[rows, :length]
            parts.append(self._advance(lane, sequence) if length else [])
        return lanes, parts

    # -- new positions -------------------------------------------------------------------------------------

    def step(self, token: Tensor) -> Any:
        """Append one position, ids [B] or features [B, D]; return the outputs there."""
        if self._placed(token):
            self._check_running()
            flat = self._step_placed()
            return flat[0] if self.engine.bare_output else self._assemble([flat])
        self._check_token(token)
        self._check_running()
        row = token.unsqueeze(1)
        self._ready(row)
        parts = []
        for lane, rows in self._lanes:
            part = row if len(rows) == self._batch else row[rows]
            parts.append(lane.step(part, self.engine.step(lane)))
        return self._assemble(parts)

    def _placed(self, token: Any) -> bool:
        """Whether a token passed all checks and is where a step reads it; nearly always, where it can be at all.

        One lane, our own, with room, and a token [B, …] that needs no conversion: all others take the longer way.
        """
        extension = between() if self.engine.is_native else None
        if extension is None or len(self._lanes) != 1:
            return False
        lane, end = self._lanes[0][0], self._lanes[0][0].position + 1
        if lane.owners != 1 or not self.engine.program.lengths.fewest <= end <= lane.derived.capacity:
            return False
        ids = -1 if self._vocabulary is None else self._vocabulary
        return extension.place(token, lane.tensors["row"], self._sequence, lane.position, ids)

    def _step_placed(self) -> Sequence[Any]:
        self._check_unbroken()
        lane = self._lanes[0][0]
        return lane.step_placed(self.engine.step(lane))

    def extend(self, tokens: Tensor) -> Any:
        """Append m positions, ids [B, m] or features [B, m, D]; return the outputs at them, [B, m, …]."""
        self._check_running()
        return self._extend_unwatched(tokens)

    def _extend_unwatched(self, tokens: Tensor) -> Any:
        """The same for a caller that has seen to it that the weights are unchanged."""
        one = isinstance(tokens, Tensor) and tokens.dim() > 1 and tokens.shape[1] == 1
        if one and self._placed(tokens[:, 0]):
            return self._assemble([self._stacked([self._step_placed()])])
        self._check_sequence(tokens, "tokens")
        self._check_batch(tokens)
        self._ready(tokens)
        whole = len(self._lanes) == 1  # indexing by rows copies
        return self._assemble(
            [self._extend_lane(lane, rows, tokens if whole else tokens[rows]) for lane, rows in self._lanes]
        )

    def _extend_lane(self, lane: Lane, rows: list[int], tokens: Tensor) -> list[Any]:
        many = tokens.shape[1]
        total = lane.position + many
        if many >= _LEAST_BY_FORWARD and many * _FORWARD_SHARE >= total and self.engine.runs_at(total):
            flat = self._fill(lane, self._sequence[rows, :total])
            return self._span(flat, total - many, many)
        steps = [lane.step(tokens[:, i : i + 1], self.engine.step(lane)) for i in range(many)]
        return self._stacked(steps)

    # -- moving about --------------------------------------------------------------------------------------

    def rewind(self, position: int | Sequence[int] | Tensor) -> None:
        """Go back to ``position`` positions (one for all rows, or one a row)."""
        wanted = [position] * self._batch if isinstance(position, int) else [int(p) for p in position]
        now = self.position.tolist()
        if len(wanted) != self._batch or not all(0 <= w <= n for w, n in zip(wanted, now, strict=True)):
            raise InputError(f"rewind: expected positions between 0 and {now}, found {wanted}")
        self._check_running()
        if len(set(wanted)) > 1:
            self._check_independent("rows at different positions")
        lanes: list[tuple[Lane, list[int]]] = []
        for index, (_, rows) in enumerate(self._lanes):
            targets = sorted({wanted[row] for row in rows})
            for target in targets:
                part = [row for row in rows if wanted[row] == target]
                lane = self._writable(index, 0)
                if len(targets) > 1:
                    picks = torch.tensor([rows.index(row) for row in part])
                    lane = lane.select(picks, self._derived(len(part), lane.derived.capacity))
                if not lane.rewind(target):
                    lane = self._refilled(lane.derived, part, target)
                lanes.append((lane, part))
        self._lanes = lanes

    def fork(self) -> Decoder:
        """An independent copy that shares weights, filters and, until one of both is written, the state."""
        self._check_running()
        twin = object.__new__(Decoder)
        twin.__dict__.update(self.__dict__)
        twin._watch = self._watch.copy()
        twin._lanes = [(lane, list(rows)) for lane, rows in self._lanes]
        with torch.inference_mode(False):
            twin._sequence = self._sequence.clone()
        for lane, _ in self._lanes:
            lane.owners += 1
        return twin

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Make row i the sequence that was row ``index[i]`` (beam search); the batch may change size."""
        chosen = [int(i) for i in index]
        if not chosen or not all(0 <= i < self._batch for i in chosen):
            raise InputError(f"reorder: expected row numbers 0 … {self._batch - 1}, found {chosen}")
        self._check_independent("reorder")
        self._check_running()
        lanes = []
        for lane, rows in self._lanes:
            new_rows = [i for i, old in enumerate(chosen) if old in rows]
            if new_rows:
                picks = torch.tensor([rows.index(chosen[i]) for i in new_rows])
                derived = self._derived(len(new_rows), lane.derived.capacity)
                lanes.append((lane.select(picks, derived), new_rows))
        with torch.inference_mode(False):
            self._sequence = self._sequence[chosen]
        self._lanes, self._batch = lanes, len(chosen)

    # -- inside --------------------------------------------------------------------------------------------

    def _start(self, batch: int, lanes: list[tuple[Lane, list[int]]] | None = None) -> None:
        """Take over new lanes; without any, one that is empty."""
        lanes = lanes or [(Lane(self._derived(batch, 1), batch), list(range(batch)))]
        room = max(lane.derived.capacity for lane, _ in lanes)
        example = self.engine.program.example
        with torch.inference_mode(False):  # later calls may run outside of it
            self._sequence = example.new_zeros((batch, room, *example.shape[2:]))
        self._lanes, self._batch = lanes, batch
        self._vocabulary = vocabulary(self.engine.program) if self.engine.reads_ids else None

    def _derived(self, batch: int, needed: int) -> Any:
        return self.engine.derived(batch, self.engine.capacity_for(needed))

    def _advance(self, lane: Lane, sequence: Tensor) -> list[Any]:
        """Bring an empty lane to the end of a sequence; return the newest outputs."""
        length = sequence.shape[1]
        whole = next((n for n in range(length, 0, -1) if self.engine.runs_at(n)), 0)
        newest: list[Any] = []
        if whole:
            newest = self._newest_of(self._fill(lane, sequence[:, :whole]), whole)
        for t in range(whole, length):
            newest = list(lane.step(sequence[:, t : t + 1], self.engine.step(lane)))
        return newest

    def _refilled(self, derived: Any, rows: list[int], position: int) -> Lane:
        """A new lane for some rows, brought to a position by a forward over the inputs kept."""
        lane = Lane(derived, len(rows))
        self._advance(lane, self._sequence[rows, :position])
        return lane

    def _fill(self, lane: Lane, sequence: Tensor) -> list[Any]:
        flat, taps = self.engine.forward(sequence, lane.derived)
        with torch.no_grad():
            lane.fill(sequence.shape[1], taps)
        return flat

    def _ready(self, tokens: Tensor) -> None:
        """Make every lane our own, with room for tokens [B, m(, D)], and keep those."""
        self._check_unbroken()
        many, fewest = tokens.shape[1], self.engine.program.lengths.fewest
        if len(self._lanes) == 1:  # nearly always: one lane, our own, with room
            lane = self._lanes[0][0]
            start, end = lane.position, lane.position + many
            if lane.owners == 1 and fewest <= end <= min(lane.derived.capacity, self._sequence.shape[1]):
                self._sequence[:, start:end] = tokens
                return
        if min(lane.position for lane, _ in self._lanes) + many < fewest:
            raise InputError(
                f"below {fewest} positions this model computes another function; prefill at least {fewest}"
            )
        for index in range(len(self._lanes)):
            self._writable(index, many)
        for lane, rows in self._lanes:
            self._reserve(lane.position + many)
            part = self._sequence[:, lane.position : lane.position + many]
            if len(rows) == self._batch:
                part.copy_(tokens)
            else:
                part[rows] = tokens[rows]

    def _writable(self, index: int, more: int) -> Lane:
        """Lane ``index``, our own and with room for ``more`` positions."""
        old, rows = self._lanes[index]
        lane, needed = old, old.position + more
        if needed > old.derived.capacity:
            lane = self._grown(old, rows, self.engine.capacity_for(needed, grow=True))
        elif old.owners > 1:
            lane = old.moved(old.derived)
        if lane is not old:
            old.owners -= 1
        self._lanes[index] = (lane, rows)
        return lane

    def _grown(self, lane: Lane, rows: list[int], capacity: int) -> Lane:
        """A lane with more room; where a filter leaves its class there, everything is derived anew."""
        try:
            derived = self.engine.derived(lane.batch, capacity)
            if lane.keeps_inputs:
                return lane.moved(derived)
            return self._refilled(derived, rows, lane.position)
        except FilterGrew:
            with self._enlarged(capacity):
                lanes = [
                    (self._refilled(self._derived(other.batch, capacity), members, other.position), members)
                    for other, members in self._lanes
                ]
        self._lanes = lanes
        return next(own for own, members in lanes if members == rows)

    @contextlib.contextmanager
    def _enlarged(self, capacity: int) -> Iterator[None]:
        """Go over to the engine for a capacity at which a filter leaves its class; back if that fails."""
        former, self.engine = self.engine, self.engine.enlarged(capacity)
        try:
            yield
        except BaseException:
            self.engine = former
            raise

    def _renew_weights(self) -> None:
        if self.model is not None and self._watch.restructured():
            engine = build_engine(self.model, self.engine.program.example, self.engine.options)
            self.engine, self._watch = engine, engine.watch(self.model)
            self._start(self._batch)
            return
        changed = self._watch.changed()
        if changed:
            current = self._watch.current()
            for name, value in current.items():
                known = self.engine.program.nodes[name].meta[
                    "val"
                ]  # a live tensor may have changed its dtype
                if (value.shape, value.dtype, value.device) != (known.shape, known.dtype, known.device):
                    raise InputError(
                        f"{name!r} was {known.dtype} {list(known.shape)} and now is {value.dtype} "
                        f"{list(value.shape)}: make a new decoder"
                    )
            self.engine = self.engine.renewed(current, changed)
            self._watch.remember()
            self._start(self._batch)  # whatever comes next, the old state is of the old weights

    # outputs: flat lists in the order of the program's outputs

    def _axis(self, node: Any) -> int | None:
        axes = self.engine.plan.axes.get(node, ()) if isinstance(node, fx.Node) else ()
        return axes[0] if axes else None

    def _newest_of(self, flat: Sequence[Any], length: int) -> list[Any]:
        return [
            _fresh(value if (axis := self._axis(node)) is None else value.select(axis, length - 1))
            for node, value in zip(self.engine.program.outputs, flat, strict=True)
        ]

    def _span(self, flat: Sequence[Any], start: int, count: int) -> list[Any]:
        return [
            _fresh(value if (axis := self._axis(node)) is None else value.narrow(axis, start, count))
            for node, value in zip(self.engine.program.outputs, flat, strict=True)
        ]

    def _stacked(self, steps: Sequence[Sequence[Any]]) -> list[Any]:
        joined = []
        for place, node in enumerate(self.engine.program.outputs):
            axis = self._axis(node)
            values = [step[place] for step in steps]
            if axis is None:
                joined.append(values[-1])
            else:
                joined.append(values[0].unsqueeze(axis) if len(values) == 1 else torch.stack(values, axis))
        return joined

    def _assemble(self, parts: Sequence[Sequence[Any]]) -> Any:
        """The lanes' outputs as one batch, in the model's structure."""
        if len(parts) == 1:
            flat = list(parts[0])
        else:
            order = torch.tensor([row for _, rows in self._lanes for row in rows]).argsort()
            flat = [
                self._joined(node, [part[place] for part in parts], order)
                for place, node in enumerate(self.engine.program.outputs)
            ]
        return pytree.tree_unflatten(flat, self.engine.program.out_spec)

    def _joined(self, node: Any, values: list[Any], order: Tensor) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        axes = self.engine.plan.batch_axes[node]
        if not axes:
            if any(value.shape != values[0].shape or not torch.equal(value, values[0]) for value in values):
                raise InputError(
                    f"the output {node.name!r} has no batch axis: rows at different positions give different ones"
                )
            return values[0]
        batch, axis = axes[0], self._axis(node)
        if axis is not None and axis < batch and values[0].dim() < node.meta["val"].dim():
            batch -= 1
        return torch.cat(values, batch).index_select(batch, order.to(values[0].device))

    # inputs

    def _reserve(self, length: int) -> None:
        short = length - self._sequence.shape[1]
        if short > 0:
            with torch.inference_mode(False):
                extra = self._sequence.new_zeros((self._batch, max(short, length), *self._sequence.shape[2:]))
                self._sequence = torch.cat([self._sequence, extra], 1)

    def _check_unbroken(self) -> None:
        for lane, _ in self._lanes:
            if lane.broken:
                raise DecoderBroken("an earlier call was interrupted half way; call reset() or prefill()")

    def _check_running(self) -> None:
        self._check_unbroken()
        if not self._watch.unchanged():
            raise WeightsChanged(
                "a parameter or buffer changed since the sequence began; call reset(), prefill() or refresh()"
            )

    def _check_independent(self, what: str) -> None:
        if isinstance(self.engine.program.batch, int) and self._batch > 1:
            raise InputError(
                f"{what}: this model was traced for a batch of {self._batch}: rows cannot be told apart"
            )
        if not self.engine.rows_independent:
            raise InputError(f"{what}: this model mixes the rows of a batch, so rows cannot be told apart")

    def _check_batch(self, tokens: Tensor) -> None:
        if tokens.shape[0] != self._batch:
            raise InputError(f"tokens: expected a batch of {self._batch}, found {tokens.shape[0]}")

    def _check_token(self, token: Any) -> None:
        expected = [self._batch, *self.engine.program.example.shape[2:]]
        found = list(token.shape) if isinstance(token, Tensor) else type(token).__name__
        if found != expected:
            raise InputError(f"token: expected shape {expected}, found {found}")
        self._check_kind(token, "token")

    def _check_sequence(self, value: Any, what: str) -> None:
        example = self.engine.program.example
        if not isinstance(value, Tensor) or value.dim() != example.dim():
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{what}: expected {_form(example)}, found {found}")
        if value.shape[2:] != example.shape[2:]:
            raise InputError(f"{what}: expected {_form(example)}, found {list(value.shape)}")
        if value.shape[0] == 0 or value.shape[1] == 0:
            raise InputError(f"{what}: is empty, {list(value.shape)}; give at least one position")
        self._check_kind(value, what)

    def _check_kind(self, value: Tensor, what: str) -> None:
        example = self.engine.program.example
        if value.dtype != example.dtype or value.device != example.device:
            raise InputError(
                f"{what}: expected {example.dtype} on {example.device}, found {value.dtype} on {value.device}"
            )
        if self._vocabulary is not None and value.device.type == "cpu":
            ids = value.flatten().tolist() if value.numel() < 64 else torch.aminmax(value)
            low, high = int(min(ids)), int(max(ids))
            if low < 0 or high >= self._vocabulary:
                raise InputError(
                    f"{what}: ids must be 0 … {self._vocabulary - 1}, found {low if low < 0 else high}"
                )


def _form(example: Tensor) -> str:
    return "ids [B, n]" if example.dim() == 2 else f"features [B, n, {example.shape[2]}]"


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


__all__ = ["CapacityError", "Decoder", "build_engine", "decoder"]
