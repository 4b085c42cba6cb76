"""chain: the native parts of a step run one after another by one call, without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .extension import between
from .layers import Call, Layers, Run, returned_values
from .native import Native

Step = Callable[[], list[Tensor]]


def bind_linked(layers: Layers, runs: Sequence[Run], inputs: Sequence[Tensor]) -> Step:
    """What ``layers.bind(runs, inputs)`` is, with consecutive calls of native libraries in one.

    Without the extension, or libraries to link, it is just that. Raises RuntimeError where a tensor does not lie in
    memory as a library takes it.
    """
    bare = [isinstance(run, Native) and run.address is not None for run in runs]
    if not any(bare) or between() is None:
        return layers.bind(runs, inputs)
    linked: list[Run] = []
    calls: list[Call] = []
    groups = [(native, list(group)) for native, group in groupby(layers.calls, lambda call: bare[call.part])]
    for place, (native, group) in enumerate(groups):
        if not native:
            calls += [replace(call, part=len(linked) + i) for i, call in enumerate(group)]
            linked += [runs[call.part] for call in group]
            continue
        later = {value for _, rest in groups[place + 1 :] for call in rest for value in call.inputs}
        made = [value for call in group for value in call.outputs]
        leaving = tuple(dict.fromkeys(v for v in made if v in later or v in layers.outputs))
        if len(groups) == 1:
            return _chain(layers, runs, group, inputs, (), layers.outputs)
        fed = {v: None for call in group for v in call.inputs if v >= len(inputs) and v not in made}
        chain = _chain(layers, runs, group, inputs, tuple(fed), leaving)
        calls.append(Call(len(linked), tuple(fed), leaving))
        linked.append(lambda args, chain=chain: chain(*args))
    return replace(layers, calls=tuple(calls)).bind(linked, inputs)


def _chain(
    layers: Layers,
    runs: Sequence[Run],
    calls: Sequence[Call],
    inputs: Sequence[Tensor],
    fed: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Any:
    """Some calls as one, a function of the values ``fed`` that returns the values ``outputs``."""
    used = dict.fromkeys(v for call in calls for v in call.inputs if v < len(inputs))
    made = _made(layers)
    known = [*used, *fed]
    inside = [value for call in calls for value in call.outputs]
    number = {value: i for i, value in enumerate([*known, *inside])}
    tensors = [inputs[v] if v < len(inputs) else made[v] for v in number]
    steps = []
    for call in calls:
        run = runs[call.part]
        assert isinstance(run, Native)
        run.check([tensors[number[v]] for v in call.inputs])
        read, left = (tuple(number[v] for v in values) for values in (call.inputs, call.outputs))
        steps.append((run.address, read, left))
    extension: Any = between()
    return extension.Chain(
        tuple(tensors),
        len(known),
        tuple(range(len(used), len(known))),
        tuple(steps),
        tuple(number[v] for v in outputs),
    )


def _made(layers: Layers) -> dict[int, Tensor]:
    """A tensor of the form of each value that calls make."""
    forms = {}
    with torch.inference_mode(False):
        for call in layers.calls:
            for value, val in zip(call.outputs, returned_values(layers.parts[call.part]), strict=True):
                forms[value] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
    return forms
