"""What a user may choose, the same for ``torch.compile(options={...})`` and ``decoder(options=...)``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import InputError

_CHOICES = {
    "kernels": ("auto", "torch", "native", "triton"),
    "fallback": ("inductor", "eager"),
    "step": ("auto", "aot", "inductor", "eager"),
    "latency": ("throughput", "bounded"),
    "precision": ("float32", "tf32", "bfloat16"),
}

_INTEGERS = {"capacity": 1, "block": 1, "radix": 2, "memory_limit": 1, "max_length": 1}
_AUTOMATIC = ("block", "radix")


@dataclass(frozen=True)
class Options:
    """Choices with their defaults.

    ``max_length``: most positions a sequence may have (None: what the model's guards admit, growing).
    ``growth``: whether capacity doubles when it is used up. ``capacity``: positions to make room for at first.
    ``block``: the base block K, positions summed directly in the step before tiles take over; ``auto``: by cost.
    ``radix``: how many blocks of one size make a block of the next, 2 or more; ``auto``: by cost.
    ``latency``: ``throughput``, or ``bounded``: every step does its share of the tiles, so that none takes long.
    ``keep_history``: False halves the state of long convolutions where ``max_length`` is known, and makes going back
    cost a forward.
    ``kernels``: what runs the convolutions, ``torch``, ``native`` (tiles compiled for this CPU) or ``triton``;
    ``auto``: Triton on a GPU, ``native`` on a CPU where there is a compiler.
    ``precision``: what Triton kernels round operands of products on matrix units to; ``float32`` keeps all of float32's
    accuracy, ``tf32`` and ``bfloat16`` are faster, and off by about 2⁻¹¹ and 2⁻⁹ of ‖u‖₂·‖k‖₂. Sums stay float32.
    ``step``: how a step runs, ``aot`` (native libraries kept on disk), ``inductor`` or ``eager`` (no compiler, slow,
    for tests); ``auto``: ``aot`` on the CPU, ``inductor`` elsewhere.
    ``fallback``: what runs a model that is refused under ``torch.compile``.
    ``memory_limit``: bytes of state all sessions of the transparent mode may hold together.
    """

    max_length: int | None = None
    growth: bool = True
    capacity: int = 1024
    block: int | str = "auto"
    radix: int | str = "auto"
    latency: str = "throughput"
    keep_history: bool = True
    kernels: str = "auto"
    precision: str = "float32"
    step: str = "auto"
    fallback: str = "inductor"
    memory_limit: int = 4 << 30

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"option {name}={value!r}: expected one of {', '.join(allowed)}")
        if not isinstance(self.keep_history, bool):
            raise InputError(f"option keep_history={self.keep_history!r}: expected True or False")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None or (name in _AUTOMATIC and value == "auto"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                wanted = "a positive integer" if least == 1 else f"an integer of {least} or more"
                other = " or 'auto'" if name in _AUTOMATIC else ""
                raise InputError(f"option {name}={value!r}: expected {wanted}{other}")


def read_options(given: Mapping[str, Any] | Options | None, **overrides: Any) -> Options:
    """Options from a mapping; raises :class:`InputError` on an unknown name, naming the nearest one."""
    if isinstance(given, Options):
        given = {f.name: getattr(given, f.name) for f in fields(given)}
    known = [f.name for f in fields(Options)]
    merged = {**(given or {}), **{k: v for k, v in overrides.items() if v is not None}}
    for name in merged:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise InputError(f"unknown option {name!r}; did you mean {near[0]!r}? Known: {', '.join(known)}")
    return Options(**merged)
