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


_SHARED_OF_AMD = 64 * 1024
# Compute capabilities, and a GPU of AMD's.
_TARGETS = ("80", "90", "100", "gfx942")


@pytest.mark.slow
def test_kernels_fit_and_do_not_spill(tmp_path: Path) -> None:
    """In processes of their own, where the interpreter is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    processes = {
        target: subprocess.Popen(
            [sys.executable, script, target], env=environment, stdout=subprocess.PIPE, text=True
        )
        for target in _TARGETS
    }
    for target, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, target
        found = [json.loads(line) for line in output.splitlines()]
        if target.isdigit():
            assert len(found) > 40, target
            assert [each for each in found if each["stack"] > 0] == []
            assert [each for each in found if each["shared"] > _SHARED] == []
        else:
            # Heads of 256 and 512 use the stack there.
            assert len(found) > 10, target
            assert [each for each in found if each["shared"] > _SHARED_OF_AMD] == []
        assert max(each["registers"] for each in found) > 64, "what is read is not what it seems"
