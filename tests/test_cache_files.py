"""Kept files are checked before they are used, and lie where nobody else can write."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.cache_files import find_file, keep_file

NAME = "thing-0123.bin"
TEXT = b"as it was made"

Damage = Callable[[Path], object]


def write(path: Path) -> None:
    path.write_bytes(TEXT)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory, which isn't there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tandem"


def test_a_file_is_found_again(directory: Path) -> None:
    assert find_file(NAME) is None
    kept = keep_file(NAME, write)
    assert kept.parent == directory
    assert find_file(NAME) == kept
    assert kept.read_bytes() == TEXT
    assert find_file("thing-012.bin") is None
    # Nothing else is left.
    assert list(directory.iterdir()) == [kept]


def test_only_the_user_can_read_and_write(directory: Path) -> None:
    before = os.umask(0)
    try:
        kept = keep_file(NAME, write)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_directory_that_others_can_read_is_made_private(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    assert keep_file(NAME, write).parent == directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def cut(path: Path) -> None:
    os.truncate(path, 3)


def link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(TEXT + b"."), "is damaged"),
        (lambda path: path.chmod(0o620), "can be written by others"),
        (lambda path: path.chmod(0o602), "can be written by others"),
        (link, "is no file"),
        pytest.param(
            lambda path: os.chown(path, 12345, -1),
            "belongs to another user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_a_file_that_is_wrong_is_made_anew(
    damage: Damage, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep_file(NAME, write)
    damage(kept)
    assert find_file(NAME) is None
    assert f"{kept} {said}" in caplog.text
    assert not kept.exists()
    again = keep_file(NAME, write)
    assert find_file(NAME) == again
    assert again.read_bytes() == TEXT


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.chmod(0o770), "can be written by others (mode 770): remove it"),
        (lambda path: path.chmod(0o707), "can be written by others (mode 707)"),
        (lambda path: [path.rmdir(), path.write_bytes(b"")], "can't be used (File exists)"),
        pytest.param(
            lambda path: os.chown(path, 12345, -1),
            "belongs to another user (12345): remove it, or set XDG_CACHE_HOME",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_a_directory_that_is_not_to_be_trusted_is_left_alone(
    directory: Path, damage: Damage, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is in it; files are kept for this process alone."""
    planted = keep_file(NAME, write)
    if "File exists" in said:
        planted.unlink()
    damage(directory)
    before = directory.lstat()
    assert find_file(NAME) is None
    kept = keep_file(NAME, write)
    assert find_file(NAME) == kept
    assert directory not in kept.parents
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert caplog.text.count(f"{directory} {said}") == 1
    assert directory.lstat() == before
    kept.unlink()


def test_somebody_elses_link_is_not_followed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    directory.symlink_to(tmp_path / "home")
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(directory, 12345, -1, follow_symlinks=False)
    assert tmp_path not in keep_file(NAME, write).parents
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_what_was_kept_for_one_process_ends_with_it(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    code = (
        "from tandem.cache_files import keep_file\n"
        "print(keep_file('a-1.txt', lambda path: path.write_text('text')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.name.startswith("a-1-")
    assert not path.parent.exists()


def test_a_failure_leaves_nothing(directory: Path) -> None:
    def fail(path: Path) -> None:
        write(path)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        keep_file(NAME, fail)
    assert list(directory.iterdir()) == []


def test_a_file_is_whole_before_it_has_its_name(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is on the disk before its name is, and its name before anybody hears of it."""
    synced: list[str] = []

    def fsync(file: object) -> None:
        names = [path.name for path in directory.iterdir() if path.is_file()]
        synced.append(f"directory with {len(names)}" if isinstance(file, int) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    keep_file(NAME, write)
    assert synced == ["file", "directory with 1"]


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_file(NAME, write).parent == tmp_path / ".cache" / "tandem"
