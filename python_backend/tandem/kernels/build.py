"""Compiles the kernels for this machine when they are first needed.

The library is kept in Tandem's cache directory. Without a C compiler there is none, and everything
runs on torch's own operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from tandem.machine import cache_directory, cpu_name

logger = logging.getLogger("tandem")

# OpenMP's functions are left to be found in torch's own copy: a second one would have a second
# team of threads, which compete with the first.
_COMPILE = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-c")
_LINK = ("-shared",)
_DEFINITIONS = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}


@cache
def library(device: torch.device, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for a device and type, or None if there are none."""
    if device.type != "cpu" or dtype not in _DEFINITIONS:
        return None
    wanted = os.environ.get("CC", "gcc"), "cc"
    compiler = next((found for found in map(shutil.which, wanted) if found), None)
    if compiler is None:
        logger.warning("no C compiler: running on torch's operations alone, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_compile(compiler, _DEFINITIONS[dtype])))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("can't compile, running on torch's operations, which is slower: %s", said)
        return None


def _compile(compiler: str, definition: str) -> Path:
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *folder.glob("*.h"))]
    facts = [compiler, definition, *_COMPILE, cpu_name(), *texts]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    path = cache_directory() / f"kernels-{key[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            objects = []
            for source in sources:
                objects.append(f"{directory}/{source.stem}.o")
                _run(compiler, *_COMPILE, definition, str(source), "-o", objects[-1])
            made = Path(directory) / path.name
            _run(compiler, *_LINK, *objects, "-o", str(made))
            # Another engine may be at the same; the last to end leaves its own.
            made.replace(path)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
