"""What the figures hold for: the machine, the versions, and the state of the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from tandem_runtime.paths import ROOT

_PACKAGES = ("torch", "transformers", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_SUFFIXES = (".py", ".c", ".h", ".json", ".pbtxt", ".safetensors")
_CODE = ("python_backend/tandem", "drafters", "model_repository")


def conditions() -> dict[str, Any]:
    """Of the machine and of the code that is measured; equal for runs that may be mixed."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = _first(r"^flags\s*: (.*)$", info).split()
    return {
        "cpu": _first(r"^model name\s*: (.*)$", info),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "code": code_hash(),
    }


def code_hash() -> str:
    """Changes with the engine's source, the drafters and the model's configuration."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES:
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else "unknown"
