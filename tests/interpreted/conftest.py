"""Tests of this folder run in a process that interprets Triton kernels: see tests/test_triton.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
