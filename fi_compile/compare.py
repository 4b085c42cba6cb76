"""A model and its graph compared, at the lengths a trace says nothing of.

There the graph is never run by itself: positions are reached through a longer run, cut by prefix-consistency.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .passes.propose_consistency import agrees, axes_of, sample_lengths
from .program import Kind, Program
from .twin import MovedValues, random_sequence, widen, widen_call

_SCALES = (1, 8)  # of features: what is cut off at large values shows
_MOST_COMPARED = 512  # lengths below the traced range at which model and graph are compared


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Leave on the model's modules what was there before.

    A forward that keeps what it computed would keep a tracer's fake tensor, or a filter made of the moved weights
    that model and graph are compared with.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def batches_agree(program: Program, model: nn.Module) -> bool:
    """Whether graph and model agree at batches of 1, of 2 and of the example's size, at the shortest good length.

    A branch on the size of the batch is recorded for the size it met, like one on the length, but no guard is read.
    """
    length = program.lengths.at_least(max(program.example.shape[1], 3))
    if length is None:
        return True
    nodes = [o for o in program.outputs if isinstance(o, fx.Node)]
    with torch.no_grad(), attributes_kept(model):
        for batch in sorted({1, 2, program.example.shape[0]}):
            sequence = random_sequence(program, batch, length, seed=4, double=False)
            try:
                whole = program.evaluate(sequence, keep=nodes)
            except Exception:
                return False
            if not _equal_prefix(program, model, sequence, whole):
                return False
    return True


def same_function(found: Program, program: Program) -> bool:
    """Whether a program that was written anew computes what it did, in double precision on random input."""
    n = sample_lengths(program)[0]
    sequence = random_sequence(program, 3 if not isinstance(program.batch, int) else program.batch, n, seed=0)
    values = MovedValues(program, seed=0)
    results = []
    for each in (found, program):
        outputs = [o for o in each.outputs if isinstance(o, fx.Node)]
        try:
            with torch.no_grad():
                env = each.evaluate(sequence, values, keep=outputs, rewrite=widen_call)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        results.append([env[o] for o in outputs if isinstance(env[o], Tensor)])
    return all(agrees(a, b, 1e-9) for a, b in zip(*results, strict=True))


def _scales(sequence: Tensor) -> tuple[int, ...]:
    return _SCALES if sequence.is_floating_point() else (1,)


def _probe(program: Program, length: int) -> Tensor:
    """A random sequence for comparing the graph with the model, in the example's dtype."""
    sequence = random_sequence(program, max(program.example.shape[0], 2), length, seed=3, double=False)
    return sequence[: program.batch] if isinstance(program.batch, int) else sequence


def disagreements(program: Program, model: nn.Module, lengths: Sequence[int] | None = None) -> list[int]:
    """Lengths the graph is not meant for (below its range, and its holes) where it differs from the model.

    There the graph is never run by itself: positions are reached through a longer run, cut by prefix-consistency.
    Without ``lengths``, those below 512 and single holes are all compared, longer ranges at an even sample; parameters
    are moved from where they are, so that one that happens to be zero hides nothing.
    """
    low = program.lengths.minimum
    stride = max(1, low // _MOST_COMPARED)
    below = [n for n in range(1, low) if n < 64 or n >= low - 2 or n & (n - 1) == 0 or n % stride == 0]
    some = {*below, *program.lengths.excluded(_MOST_COMPARED), *program.lengths.holes}
    wanted = sorted(some if lengths is None else lengths)
    last = next((n for n in reversed(wanted) if program.lengths.at_least(n + 1) is not None), 0)
    tested = [n for n in wanted if n <= last]
    beyond = [] if lengths is None else wanted[len(tested) :]  # of the sample, a trace there says more
    if not tested:
        return beyond
    longer = program.lengths.at_least(last + 1)
    assert longer is not None
    sequence = _probe(program, longer)
    odd: list[int] = []
    for share in (0.3, 0.02):
        odd, ill = _moved_disagreements(program, model, sequence, tested, share)
        if not ill:  # moved so far that rounding decides: poles beyond 1, say
            break
    return odd + beyond


def _moved_disagreements(
    program: Program, model: nn.Module, sequence: Tensor, tested: list[int], share: float
) -> tuple[list[int], bool]:
    """The lengths at which moved parameters show a difference; whether the graph's own rounding there shows one."""
    nodes = [o for o in program.outputs if isinstance(o, fx.Node)]
    moved = {
        name: value.to(program.values[name].dtype)
        for name, value in MovedValues(program, seed=1, share=share).items()
    }
    named = {str(i.path): moved[i.name] for i in program.inputs if i.kind is Kind.PARAMETER}

    def perturbed(prefix: Tensor) -> Any:
        return torch.func.functional_call(model, named, (prefix,))

    wide = {name: widen(value) for name, value in moved.items()}
    found: set[int] = set()
    ill = False
    with torch.no_grad(), attributes_kept(model):
        for scale in _scales(sequence):
            scaled = sequence * scale
            whole = program.evaluate(scaled, moved, keep=nodes)
            exact = program.evaluate(widen(scaled), wide, keep=nodes, rewrite=widen_call)
            # Parts in a narrower type round more than the model's own: allow for what that comes to.
            slack = {o: _own_rounding(long, exact[o].to(long.dtype)) for o, long in whole.items()}
            single = _of_one_position(program, scaled, moved) if 1 in tested else {}
            odd = [
                n
                for n in tested
                if not _equal_prefix(
                    program, perturbed, scaled[:, :n], whole, slack, single if n == 1 else None
                )
            ]
            doubtful = _rounds_too_much(program, whole, exact, odd)
            if scale == 1 or not doubtful:
                found |= set(odd)
            ill |= scale == 1 and doubtful
    return sorted(found), ill


def _of_one_position(program: Program, sequence: Tensor, values: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """The outputs without a sequence axis at a length of 1, which no trace is made for; none if it cannot run there."""
    newest = [o for o in program.outputs if isinstance(o, fx.Node) and len(_row_axes(program, o)) != 1]
    try:
        return program.evaluate(sequence[:, :1], values, keep=newest) if newest else {}
    except Exception:
        return {}


def _own_rounding(found: Tensor, exact: Tensor) -> float:
    """A few times the rounding of float32 parts; 0 where the error is more than that."""
    if not found.is_floating_point() or not found.numel():
        return 0.0
    error, scale = float((found - exact).abs().max()), float(exact.abs().max())
    return 10 * error if error <= 1e-5 * scale else 0.0


def _rounds_too_much(
    program: Program, whole: dict[fx.Node, Any], exact: dict[fx.Node, Any], lengths: list[int]
) -> bool:
    """Whether the graph's own rounding, at one of these lengths, is as large as a difference that counts."""
    for output, long in whole.items():
        axes, truth = _row_axes(program, output), exact[output].to(long.dtype)
        if len(axes) == 1:
            for n in lengths:
                if not _roughly_equal(long.narrow(axes[0], 0, n), truth.narrow(axes[0], 0, n)):
                    return True
    return False


def _row_axes(program: Program, output: fx.Node) -> list[int]:
    """The dimensions of an output that are the sequence's length, however that is written."""
    return list(axes_of(program, output).rows)


def _equal_prefix(
    program: Program,
    model: Callable[[Tensor], Any],
    sequence: Tensor,
    whole: dict[fx.Node, Any],
    slack: dict[fx.Node, float] | None = None,
    newest: Mapping[fx.Node, Any] | None = None,
) -> bool:
    """Whether the model on a prefix gives the first rows of every output of a longer run.

    ``newest``: outputs without a sequence axis, which no longer run shows, where they are known.
    """
    try:
        found = [leaf for leaf in pytree.tree_leaves(model(sequence)) if leaf is not None]
    except Exception:
        return True  # the model itself does not run there: there is nothing to differ from
    outputs = [o for o in program.outputs if o is not None]
    if len(found) != len(outputs):
        return False
    for short, node in zip(found, outputs, strict=True):
        if not isinstance(node, fx.Node):
            continue
        long = whole[node]
        axes = _row_axes(program, node)
        if len(axes) == 1:
            long = long.narrow(axes[0], 0, sequence.shape[1])
        elif newest is None or node not in newest:
            continue  # an output without a sequence axis is of the newest row: another row at each length
        else:
            long = newest[node]
        if short.shape != long.shape or not _roughly_equal(
            short, long, whole[node], 0.0 if slack is None else slack[node]
        ):
            return False
    return True


def _roughly_equal(short: Tensor, long: Tensor, whole: Tensor | None = None, slack: float = 0.0) -> bool:
    """Equal up to rounding at the scale of ``long``, or a hundredth of the ``whole`` it is a part of."""
    if not short.is_floating_point():
        return bool(torch.equal(short, long))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(short.dtype, 0.1)
    scale = float(long.abs().max()) if long.numel() else 0.0
    if whole is not None and whole.numel():
        scale = max(scale, 0.01 * float(whole.abs().max()))
    return bool(((short - long).abs() <= slack + tolerance * max(scale, 1e-30)).all())
