"""What Tandem has compiled and measured on this machine, kept from one start to the next.

Files lie in `$XDG_CACHE_HOME/tandem` or `~/.cache/tandem`. They are code that runs here, so nobody
else may write there; and since a full disk or a lost machine leaves halves of files, each is
compared with the hash in its name before it is used. A library that is cut off would otherwise end
the process by a signal.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger("tandem")

_PRIVATE_DIRECTORY = 0o700
_PRIVATE_FILE = 0o600
_OTHERS_WRITE = 0o022
_NUM_DIGITS = 32


def find_file(name: str) -> Path | None:
    """The file that was kept under this name; None if there is none that is sound.

    Raises:
        OSError: there is no place for files, not even for this process alone.
    """
    wanted = Path(name)
    for path in sorted(_directory().glob(f"{wanted.stem}-*{wanted.suffix}")):
        # Another engine may find the same fault.
        with suppress(FileNotFoundError):
            wrong = _fault(path)
            if not wrong:
                return path
            logger.warning("%s %s: making it anew", path, wrong)
            path.unlink()
    return None


def keep_file(name: str, write: Callable[[Path], object]) -> Path:
    """Keeps a file under this name.

    Another engine may be at the same: then there are two, of which either will do.

    Args:
        name: what the file is and all that it depends on.
        write: makes the file at a path, beside which it may leave others.

    Returns:
        Where it is now.

    Raises:
        OSError: it can't be written.
    """
    wanted = Path(name)
    directory = _directory()
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = Path(temporary, name)
        write(made)
        made.chmod(_PRIVATE_FILE)
        with made.open("r+b") as file:
            os.fsync(file)
        path = directory / f"{wanted.stem}-{_digest(made)}{wanted.suffix}"
        made.replace(path)
    _sync_directory(directory)
    return path


def _directory() -> Path:
    """The cache directory, or one for this process alone where that can't be trusted or written."""
    try:
        # A relative path is to be ignored, says the specification.
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        path = (given if given.is_absolute() else Path.home() / ".cache") / "tandem"
    except RuntimeError as error:
        return _own_directory(f"there is no cache directory ({error}): set XDG_CACHE_HOME")
    try:
        path.mkdir(_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        if wrong := _mistrust(path):
            return _own_directory(f"{path} {wrong}: remove it, or set XDG_CACHE_HOME to another")
        path.chmod(_PRIVATE_DIRECTORY)
        if not os.access(path, os.W_OK):
            return _own_directory(f"{path} can't be written: set XDG_CACHE_HOME to another")
    except OSError as error:
        return _own_directory(f"{path} can't be used ({error.strerror}): set XDG_CACHE_HOME")
    return path


@cache
def _own_directory(reason: str) -> Path:
    logger.warning("%s. Until then everything is compiled and measured at each start", reason)
    path = tempfile.mkdtemp(prefix="tandem-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _mistrust(path: Path) -> str:
    """Why somebody else may have written what is there; empty if nobody can have."""
    # Of a link, who made it, and where it leads.
    for found in (path.lstat(), path.stat()):
        if found.st_uid != os.geteuid():
            return f"belongs to another user ({found.st_uid})"
    if found.st_mode & _OTHERS_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _fault(path: Path) -> str:
    """Why a file of the directory is not to be used; empty if it is."""
    if not path.is_file() or path.is_symlink():
        return "is no file"
    if wrong := _mistrust(path):
        return wrong
    return "" if path.stem.endswith(f"-{_digest(path)}") else "is damaged"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_NUM_DIGITS]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
