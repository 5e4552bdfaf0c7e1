"""What this machine is, and where Tandem keeps what it has worked out for it."""

from __future__ import annotations

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
