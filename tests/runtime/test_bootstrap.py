"""The set-up's checks and stages; nothing here downloads or starts a server."""

from __future__ import annotations

import fcntl
import sys
import threading
from pathlib import Path

import pytest

from tandem_runtime import bootstrap
from tandem_runtime.paths import ROOT


def test_check_python_accepts_supported_versions() -> None:
    bootstrap.check_python((3, 11))
    bootstrap.check_python((3, 12))


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_check_python_names_the_version_and_the_cure(version: tuple[int, int]) -> None:
    with pytest.raises(bootstrap.SetUpError, match=rf"this is 3\.{version[1]}.*PYTHON=python3\.12"):
        bootstrap.check_python(version)


def test_supported_pythons_are_those_of_the_package() -> None:
    requires = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    first, last = bootstrap.PYTHON_VERSIONS[0], bootstrap.PYTHON_VERSIONS[-1]
    assert f'requires-python = ">=3.{first[1]},<3.{last[1] + 1}"' in requires


@pytest.mark.parametrize(
    ("system", "machine", "libc", "message"),
    [
        ("darwin", "arm64", ("", ""), "x86_64 Linux, and this is arm64 darwin"),
        ("linux", "aarch64", ("glibc", "2.36"), "this is aarch64 linux"),
        ("linux", "x86_64", ("glibc", "2.31"), "this system has glibc 2.31"),
        ("linux", "x86_64", ("", ""), "another C library"),
    ],
)
def test_check_platform_names_what_is_wrong(
    system: str, machine: str, libc: tuple[str, str], message: str
) -> None:
    with pytest.raises(bootstrap.SetUpError, match=message):
        bootstrap.check_platform(system, machine, libc)


def test_check_disk_wants_more_for_a_cuda_build() -> None:
    bootstrap.check_disk(8 * 10**9, gpu=False)
    with pytest.raises(bootstrap.SetUpError, match=r"8\.0 GB are free .* needs 12 GB"):
        bootstrap.check_disk(8 * 10**9, gpu=True)


def test_stamp_marks_a_folder_complete(tmp_path: Path) -> None:
    assert bootstrap.read_stamp(tmp_path / "absent") is None
    assert bootstrap.read_stamp(tmp_path) is None
    bootstrap.write_stamp(tmp_path, "key")
    assert bootstrap.read_stamp(tmp_path) == "key"


def test_only_missing_stages_run_and_leftovers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "MODELS", tmp_path / ".models")
    (tmp_path / ".part-interrupted").mkdir()
    made = []
    done = bootstrap.Stage("done", lambda: True, lambda: made.append("done"))
    missing = bootstrap.Stage("missing", lambda: False, lambda: made.append("missing"))
    bootstrap.run_stages([done, missing])
    assert made == ["missing"]
    assert list(tmp_path.iterdir()) == []


def test_package_without_record_counts_as_broken(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "example-1.0.dist-info"
    package.mkdir(parents=True)
    assert bootstrap.is_broken(tmp_path)
    (package / "RECORD").touch()
    assert not bootstrap.is_broken(tmp_path)


def test_second_set_up_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    with (tmp_path / ".setup.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.1, fcntl.flock, [other, fcntl.LOCK_UN]).start()
        with bootstrap.lock():
            assert "Waiting for another set-up" in capsys.readouterr().out


def test_failed_command_becomes_one_message() -> None:
    with pytest.raises(bootstrap.SetUpError, match="no network"):
        bootstrap.run([sys.executable, "-c", "raise SystemExit(1)"], "no network")
    with pytest.raises(KeyboardInterrupt):
        bootstrap.run([sys.executable, "-c", "raise SystemExit(130)"], "no network")
