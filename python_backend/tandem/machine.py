"""What this machine is, and where Tandem keeps what it has worked out for it."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def cache_directory() -> Path:
    """`tandem` in `$XDG_CACHE_HOME` or `~/.cache`; it may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tandem"


def cpu_name() -> str:
    """The processor's name, as exactly as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def code_hash() -> str:
    """Changes with Tandem itself, which may have become faster or do something else."""
    kinds = (".py", ".c", ".cpp", ".h")
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in kinds)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
