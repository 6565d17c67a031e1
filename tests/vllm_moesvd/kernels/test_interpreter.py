"""Starts the tests of computed numbers in a process whose Triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_equality.py", "test_routing.py", "test_joined.py"])
def test_kernels_pass_in_the_interpreter(name: str) -> None:
    """The interpreter must be chosen before Triton is imported, hence another process."""
    file = Path(__file__).with_name(name)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout[-2000:]
    assert " skipped" not in result.stdout, result.stdout[-2000:]
