"""The kernels compiled for GPUs that aren't here: they fit, and keep everything in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a program may have: of compute capability 8.6 and 8.9, the smallest.
_SHARED = 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_fit_and_do_not_spill(target: int, tmp_path: Path) -> None:
    """In a process of its own, where the interpreter is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(target)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found = [json.loads(line) for line in output.splitlines()]
    assert len(found) > 40
    assert [each for each in found if each["stack"] > 0] == []
    assert [each for each in found if each["shared"] > _SHARED] == []
    assert max(each["registers"] for each in found) > 64, "what is read is not what it seems"
