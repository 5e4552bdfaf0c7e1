"""The check of a GPU, on a machine without one: a typo must not cost time on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem_runtime.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is run itself there")
def test_a_dry_run_comes_to_its_end(tmp_path: Path) -> None:
    """It shows each shape as it is measured, and keeps nothing."""
    command = [sys.executable, ROOT / "scripts/gpu_check.py", "--output", tmp_path]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 passed" in found.stdout
    assert "| tiny, full: 2 x 9 tokens at 50 |" in found.stdout
    assert "| tiny Gemma 4 E2B, mtp (acceptance assumed), 2 at a time |" in found.stdout
    assert list(tmp_path.iterdir()) == []
