"""Compiles kernels and operators for this machine when they are first needed.

The libraries are kept in Tandem's cache directory. Without a compiler there are none, and
everything runs on torch's own operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from tandem.cache_files import find_file, keep_file
from tandem.machine import cpu_name

logger = logging.getLogger("tandem")

# OpenMP's functions are left to be found in torch's own copy: a second one would have a second
# team of threads, which compete with the first.
_COMPILE = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-c")
_COMPILE_OPERATORS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-c")
_LINK = ("-shared",)
_DEFINITIONS = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}
_FOLDER = Path(__file__).parent


@cache
def library(device: torch.device, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for a device and type, or None if there are none."""
    if device.type != "cpu" or dtype not in _DEFINITIONS:
        return None
    sources = sorted(_FOLDER.glob("*.c"))
    compiler = _first(os.environ.get("CC", "gcc"), "cc")
    path = _built("kernels", compiler, (*_COMPILE, _DEFINITIONS[dtype]), sources)
    if path is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("can't load %s, running on torch's operations, which is slower", error)
        path.unlink(missing_ok=True)
        return None


@cache
def operator_library() -> Path | None:
    """The operators for torch, or None."""
    # Here, because it looks for CUDA's tools.
    from torch.utils import cpp_extension

    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    return _built(
        "operators",
        _first(os.environ.get("CXX", "g++"), "c++"),
        (*_COMPILE_OPERATORS, *headers),
        sorted(_FOLDER.glob("*.cpp")),
        link=(*libraries, "-ltorch_cpu", "-lc10"),
        version=torch.__version__,
    )


def _first(*names: str) -> str | None:
    return next((found for found in map(shutil.which, names) if found), None)


def _built(
    name: str,
    compiler: str | None,
    options: tuple[str, ...],
    sources: list[Path],
    *,
    link: tuple[str, ...] = (),
    version: str = "",
) -> Path | None:
    """The library of these sources, compiled unless it was before; None, and a warning, if not."""
    if compiler is None:
        logger.warning("no compiler for %s: running on torch's operations, which is slower", name)
        return None
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *_FOLDER.glob("*.h"))]
    wanted = [compiler, *options, *link, version, cpu_name(), *texts]
    key = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    file = f"{name}-{key[:16]}.so"

    def compile_and_link(path: Path) -> None:
        objects = [str(path.with_name(f"{source.stem}.o")) for source in sources]
        with ThreadPoolExecutor() as threads:
            jobs = zip(sources, objects, strict=True)
            list(threads.map(lambda job: _run(compiler, *options, str(job[0]), "-o", job[1]), jobs))
        _run(compiler, *_LINK, *objects, *link, "-o", str(path))

    try:
        return find_file(file) or keep_file(file, compile_and_link)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("can't compile, running on torch's operations, which is slower: %s", said)
        return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
