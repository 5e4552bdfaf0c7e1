"""Tools are fetched with stand-ins for apt-get and dpkg-deb; nothing here downloads."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem_runtime import tools

SAMPLE = tools.Tool(
    "sample", ("sample", "sample-driver"), {"tandem-one": "bin/one", "tandem-two": "bin/two"}
)
# Downloads one package, and notes what it was asked.
APT = """\
echo "$@" >> "{calls}"
for argument; do
  case $argument in --option=Dir::Cache::Archives=*) archives=${{argument#*Archives=}} ;; esac
done
case "$*" in
  *--print-uris*) echo "'http://127.0.0.1/sample.deb' sample.deb 3000000 SHA256:0" ;;
  *--download-only*) touch "$archives/sample.deb" ;;
esac
"""
# The package: two programs that print where they find libraries, and a library.
DPKG = """\
mkdir -p "$3/bin" "$3/lib"
touch "$3/lib/libsample.so.1"
for name in one two; do
  printf '#!/bin/sh\\necho "$LD_LIBRARY_PATH"\\n' > "$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, with the stand-ins; the one tool is SAMPLE."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tools, "ALL", (SAMPLE,))
    monkeypatch.setattr(tools, "FOLDER", tmp_path / ".tools")
    monkeypatch.setattr(tools, "BIN", tmp_path / ".tools/bin")
    put(programs, "apt-get", APT.format(calls=tmp_path / "calls"))
    put(programs, "dpkg-deb", DPKG)
    return programs


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}")
    (folder / name).chmod(0o755)


def output(program: str) -> str:
    path = tools.find(program)
    assert path is not None
    return subprocess.run([path], check=True, capture_output=True, text=True).stdout.strip()


def test_a_tool_on_path_is_not_fetched(machine: Path, tmp_path: Path) -> None:
    for name in SAMPLE.programs:
        put(machine, name, "echo mine")
    tools.fetch_all()
    assert output("tandem-one") == "mine"
    assert not (tmp_path / "calls").exists()
    assert not tools.FOLDER.exists()


def test_a_missing_tool_is_fetched_once_with_its_libraries(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One of a pair would be another version than the other.
    put(machine, "tandem-one", "echo mine")
    tools.fetch_all()
    for name in SAMPLE.programs:
        assert output(name).split(":")[0] == str(tools.FOLDER / "sample/lib")
    assert sorted(path.name for path in tools.FOLDER.iterdir()) == ["bin", "sample"]
    printed = capsys.readouterr().out
    assert printed.startswith("[1/1] tandem-one and tandem-two in .tools\n")
    assert "downloading 1 packages (3 MB)" in printed
    assert "done in" in printed
    calls = (tmp_path / "calls").read_text()
    tools.fetch_all()
    assert (tmp_path / "calls").read_text() == calls
    assert capsys.readouterr().out == ""


def test_fetched_programs_find_fonts_that_came_along(machine: Path) -> None:
    fonts = 'mkdir -p "$3/etc/fonts" && touch "$3/etc/fonts/fonts.conf"\n'
    put(machine, "dpkg-deb", DPKG.replace("$LD_LIBRARY_PATH", "$FONTCONFIG_FILE") + fonts)
    tools.fetch_all()
    assert output("tandem-one") == str(tools.FOLDER / "sample/etc/fonts/fonts.conf")


@pytest.mark.parametrize(
    ("broken", "script", "reason"),
    [
        ("apt-get", "echo 'E: Unable to locate package sample' >&2; exit 100", "E: Unable to loc"),
        ("dpkg-deb", f"{DPKG}echo 'not a package' >&2; exit 2", "dpkg-deb: not a package"),
        ("dpkg-deb", DPKG.replace("echo", "nowhere"), "tandem-one: .*nowhere"),
    ],
)
def test_what_fails_leaves_nothing_half(
    machine: Path, capsys: pytest.CaptureFixture[str], broken: str, script: str, reason: str
) -> None:
    put(machine, broken, script)
    tools.fetch_all()
    assert [path.name for path in tools.FOLDER.iterdir()] == ["apt"]
    assert tools.find("tandem-one") is None
    printed = capsys.readouterr().out
    assert "done in" not in printed
    assert re.search(reason, printed), printed
    assert "Debian's packages: sample, sample-driver" in printed


def test_apt_says_why_its_lists_are_missing(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(
        machine,
        "apt-get",
        """case "$*" in
  *update) echo "W: Failed to fetch http://127.0.0.1/InRelease  Connection failed" >&2 ;;
  *) echo "E: Unable to locate package sample" >&2; exit 100 ;;
esac""",
    )
    tools.fetch_all()
    assert re.search("Unable to locate.*Failed to fetch http.*failed", capsys.readouterr().out)


def test_a_system_without_apt_is_told_what_to_install(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    tools.fetch_all()
    printed = capsys.readouterr().out
    assert "can't be had: this system has no apt-get" in printed
    assert "Debian's packages: sample, sample-driver" in printed


def test_leftovers_of_a_killed_run_go(machine: Path) -> None:
    (tools.FOLDER / ".part-killed/sample").mkdir(parents=True)
    tools.fetch_all()
    assert sorted(path.name for path in tools.FOLDER.iterdir()) == ["bin", "sample"]


def test_chrome_does_for_chromium(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, "google-chrome", "echo mine")
    monkeypatch.setenv("PATH", str(machine))
    assert tools.find("chromium") == str(machine / "google-chrome")


def test_a_test_without_its_tool_is_skipped_or_fails_on_request(
    find_tool: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    monkeypatch.setattr(tools, "find", lambda _: None)
    reason = "promtool is missing: `make tools` fetches it .* packages: prometheus"
    monkeypatch.setattr(pytestconfig.option, "require_tools", False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        find_tool("promtool")
    monkeypatch.setattr(pytestconfig.option, "require_tools", True)
    with pytest.raises(pytest.fail.Exception, match=reason):
        find_tool("promtool")
