"""Tests of this folder run in a process that interprets Triton kernels: see tests/test_triton.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that nobody wrote is NaN: torch fills what it allocates when it must be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
