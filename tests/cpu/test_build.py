"""A kept library that is damaged is compiled anew, and kills nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_engines import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are for CPUs")

_LOAD = """
import torch
from tandem.cpu.kernels.build import library
print(library(torch.device("cpu"), torch.float32)._name)
"""


def load(cache_home: Path) -> Path:
    """Where a process of its own has the kernels from."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD],
        env={**os.environ, "XDG_CACHE_HOME": str(cache_home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache home with the library in it."""
    cache_home = tmp_path_factory.mktemp("compiled")
    load(cache_home)
    return cache_home


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda _: b"garbage"])
def test_a_damaged_library_is_compiled_anew(
    compiled: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Half of one would end the process by SIGBUS as soon as it were loaded."""
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    (kept,) = (tmp_path / "tandem").glob("*.so")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    (again,) = {load(tmp_path), *(tmp_path / "tandem").iterdir()}
    assert len(again.read_bytes()) == len(whole)
