"""Helpers for tests of the transparent mode: compiled models, and how often a graph was run as given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fi_compile import backend

OPTIONS = {"step": "eager", "fallback": "eager", "block": 8}


def compiled(model: Callable[..., Any], *, dynamic: bool | None = True, **options: Any) -> Callable[..., Any]:
    """A model under `torch.compile` whose steps and fallback are interpreted."""
    return torch.compile(model, backend="flashinf", dynamic=dynamic, options={**OPTIONS, **options})


def assert_like(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal in shape, dtype and strides, and in value up to a share of the largest."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


class Runs:
    """How often a model's graph is run as given: every other answer came from a session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain = 0
        original = backend._Plain.__call__

        def call(this, *args):
            self.plain += 1
            return original(this, *args)

        monkeypatch.setattr(backend._Plain, "__call__", call)
