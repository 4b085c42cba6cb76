"""What can go wrong, as types: each message says what was found, what was expected, where, and the fix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a program, or a part of it, was left alone.

    ``kind`` is a short stable word (``non_causal``, ``length_dependent``, ``unproved``, ``trace``,
    ``lengths``…), ``reason`` one sentence a person can act on, ``nodes`` the names of the graph nodes it
    is about, ``source`` the user's ``file:line`` and ``hint`` what to change.
    """

    kind: str
    reason: str
    nodes: tuple[str, ...] = ()
    source: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.reason}"]
        if self.nodes:
            lines.append(f"  node:   {', '.join(self.nodes)}")
        if self.source:
            lines.append(f"  source: {self.source}")
        if self.hint:
            lines.append(f"  hint:   {self.hint}")
        return "\n".join(lines)


class FlashinfError(Exception):
    """Base of every error this package raises on purpose."""


class Unsupported(FlashinfError):
    """The model cannot be decoded exactly; ``refusals`` say which node, where, why and what to change."""

    def __init__(self, *refusals: Refusal) -> None:
        self.refusals = refusals
        super().__init__("\n".join(str(refusal) for refusal in refusals))


class WeightsChanged(FlashinfError):
    """A parameter or buffer changed in mid-sequence; call ``reset()`` or ``prefill()``."""


class CapacityError(FlashinfError, ValueError):
    """A sequence would grow beyond what the decoder, the model's tables or its guards can hold."""


class InputError(FlashinfError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class DecoderBroken(FlashinfError):
    """A step was interrupted half way; call ``reset()`` or ``prefill()`` before going on."""


class FlashinfWarning(UserWarning):
    """A model, or a step, runs otherwise than it was asked to; the message says how and why."""
