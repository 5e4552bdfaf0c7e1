"""Programs that the tests run and no Python package carries: Prometheus, and Chromium.

They come as Debian packages, with the libraries that this machine lacks, and are unpacked into
`.tools`: nothing is installed, and no root is needed. A program that is on PATH is used as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tandem_runtime.bootstrap import lock
from tandem_runtime.paths import ROOT

FOLDER = ROOT / ".tools"
BIN = FOLDER / "bin"

_SCRIPT = """\
#!/bin/sh
root=$(cd -- "$(dirname -- "$0")/.." && pwd)
{exports}exec "{program}" "$@"
"""
_FONTS = "etc/fonts/fonts.conf"
_LIBRARY = re.compile(r"\.so(\.\d+)*$")


class FetchError(RuntimeError):
    """Why a tool can't be had here."""


class Tool(NamedTuple):
    """Programs that come together: each with its place in the packages."""

    name: str
    packages: tuple[str, ...]
    programs: Mapping[str, str]


ALL = (
    Tool(
        "prometheus",
        ("prometheus",),
        {"promtool": "usr/bin/promtool", "prometheus": "usr/bin/prometheus"},
    ),
    Tool(
        "chromium",
        ("chromium", "chromium-driver"),
        {"chromium": "usr/lib/chromium/chromium", "chromedriver": "usr/bin/chromedriver"},
    ),
)


def find(program: str) -> str | None:
    """Where a program lies, in `.tools` or on PATH; None where it is missing."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    found = shutil.which(program, path=path)
    if found is None and program == "chromium":
        found = shutil.which("google-chrome", path=path)
    return found


def cure(program: str) -> str:
    """What to tell who misses a program."""
    (tool,) = [tool for tool in ALL if program in tool.programs]
    return (
        f"{program} is missing: `make tools` fetches it where apt-get works; "
        f"elsewhere put it on PATH (Debian's packages: {', '.join(tool.packages)})"
    )


def fetch_all() -> None:
    """Fetches what is missing, and says what can't be had."""
    missing = [tool for tool in ALL if not _is_here(tool)]
    for leftover in FOLDER.glob(".part-*"):
        shutil.rmtree(leftover)
    for number, tool in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {' and '.join(tool.programs)} in .tools", flush=True)
        start = time.monotonic()
        try:
            fetch(tool)
            print(f"  done in {time.monotonic() - start:.0f} s", flush=True)
        except (FetchError, OSError) as error:
            print(
                f"  can't be had: {error}\n  their tests will be skipped; to run them put both on "
                f"PATH (Debian's packages: {', '.join(tool.packages)})",
                flush=True,
            )
    # Downloads stay for the next try.
    if all(map(_is_here, missing)):
        shutil.rmtree(FOLDER / "apt", ignore_errors=True)


def fetch(tool: Tool) -> None:
    """Puts a tool's programs into `.tools/bin`.

    Raises:
        FetchError: it can't be had here; `.tools` holds nothing of it but downloads.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FetchError("this system has no apt-get")
    packages = _download(tool)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=FOLDER) as scratch:
        made = Path(scratch)
        for package in packages:
            _run(["dpkg-deb", "-x", str(package), str(made / tool.name)])
        scripts = _write_scripts(tool, made)
        for script in scripts:
            _run([str(script), "--version"])
        shutil.rmtree(FOLDER / tool.name, ignore_errors=True)
        (made / tool.name).rename(FOLDER / tool.name)
        BIN.mkdir(exist_ok=True)
        # The scripts come last: with them the tool counts as complete.
        for script in scripts:
            script.rename(BIN / script.name)


def _is_here(tool: Tool) -> bool:
    return all(map(find, tool.programs))


def _download(tool: Tool) -> list[Path]:
    """The tool's packages and those that they need and this system hasn't got, in a folder."""
    archives = FOLDER / "apt" / tool.name
    lists = FOLDER / "apt" / "lists"
    for folder in (archives, lists):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
    # Lists and packages of our own, so that no root is needed; downloads go on where they ended.
    options = {
        "Dir::State::Lists": lists,
        "Dir::Cache": FOLDER / "apt",
        "Dir::Cache::Archives": archives,
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"--option={name}={value}" for name, value in options.items())]
    complaint = _update([*apt, "update"])
    install = [*apt, "install", "--yes", "--no-install-recommends", *tool.packages]
    try:
        _run([*apt, "autoclean"])
        sizes = [int(line.split()[2]) for line in _run([*install, "--print-uris"]).splitlines()]
        if sizes:
            megabytes = sum(sizes) / 1e6
            print(f"  downloading {len(sizes)} packages ({megabytes:.0f} MB)", flush=True)
        _run([*install, "--download-only"])
    except FetchError as error:
        raise FetchError(f"{error} {complaint}".strip()) from None
    return sorted(archives.glob("*.deb"))


def _write_scripts(tool: Tool, made: Path) -> list[Path]:
    """Scripts in `made/bin` that start the programs unpacked in `made` with their libraries."""
    exports = "".join(f"export {line}\n" for line in _environment(made, made / tool.name))
    (made / "bin").mkdir()
    scripts = []
    for name, place in tool.programs.items():
        # A program that was installed already, and lies elsewhere, is on PATH.
        if (made / tool.name / place).exists():
            script = made / "bin" / name
            program = f"$root/{tool.name}/{place}"
            script.write_text(_SCRIPT.format(exports=exports, program=program), "utf-8")
            script.chmod(0o755)
            scripts.append(script)
    return scripts


def _environment(made: Path, unpacked: Path) -> Iterator[str]:
    """What programs must be told about the libraries and the fonts that came with them."""
    files = [path for path in unpacked.rglob("*") if _LIBRARY.search(path.name)]
    folders = sorted({f"$root/{path.parent.relative_to(made)}" for path in files})
    if folders:
        yield f'LD_LIBRARY_PATH="{":".join(folders)}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"'
    if (unpacked / _FONTS).exists():
        yield f'FONTCONFIG_FILE="$root/{unpacked.name}/{_FONTS}"'
        # Its folder `fonts` is the one place that this configuration lets us choose.
        yield f'XDG_DATA_HOME="$root/{unpacked.name}/usr/share"'


def _update(command: list[str]) -> str:
    """Fetches the package lists; returns what apt complains of, which need not matter."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return _complaint(result.stderr)


def _run(command: list[str]) -> str:
    """Runs a command; its output, or FetchError with its complaint."""
    try:
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        complaint = _complaint(error.stderr) or f"exit status {error.returncode}"
        raise FetchError(f"{Path(command[0]).name}: {complaint}") from error
    return result.stdout


def _complaint(errors: str) -> str:
    """The first error that apt names, or else the first line."""
    lines = [*errors.strip().splitlines(), ""]
    return next((line for line in lines if line.startswith("E: ")), lines[0])


def main() -> int:
    """Fetches what is missing and returns the exit status, 0 also where a tool can't be had."""
    try:
        with lock():
            fetch_all()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0
