"""The Triton Inference Server in `.triton`: where its files lie, and how they get there.

The server comes from the `nvidia-pytriton` wheel and `perf_analyzer` from a `tritonclient`
wheel; only the files are used. In NVIDIA's Triton container `.triton` holds links to its server.
Run by `make setup` with the virtual environment's Python, whose version picks the stub.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

from tandem_runtime.paths import ROOT

TRITON = ROOT / ".triton"
CONTAINER = Path("/opt/tritonserver")
SERVER_WHEEL = "nvidia-pytriton==0.7.0"
PERF_ANALYZER_WHEEL = "tritonclient==2.51.0"
# Newer tritonclient wheels, those for manylinux2014, need a newer C library.
PERF_ANALYZER_PLATFORM = "manylinux1_x86_64"

# The library path is perf_analyzer's alone: torch would take its CUDA runtime from there too.
_PERF_ANALYZER_SCRIPT = """\
#!/bin/sh
directory=$(dirname -- "$0")/../lib/perf_analyzer
LD_LIBRARY_PATH=$directory:$LD_LIBRARY_PATH exec "$directory/perf_analyzer" "$@"
"""


def main() -> int:
    """Makes `.triton` anew and returns the exit status."""
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=ROOT) as scratch:
            runtime = Path(scratch, "triton")
            if in_container():
                link_container(runtime)
            else:
                unpack_wheels(runtime, Path(scratch))
            link(runtime / "backends" / "tandem", Path("..", "..", "python_backend"))
            (runtime / ".stamp").write_text(runtime_key(python_version()), encoding="utf-8")
            if TRITON.exists():
                TRITON.rename(Path(scratch, "old"))
            runtime.rename(TRITON)
    except KeyboardInterrupt:
        return 130
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"  {error}", file=sys.stderr)
        return 1
    return 0


def in_container() -> bool:
    """Whether this is NVIDIA's Triton container."""
    return (CONTAINER / "bin" / "tritonserver").exists()


def python_version() -> str:
    """The running Python's version as the stubs are named, such as "3.12"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def runtime_key(version: str) -> str:
    """What `.triton` is made from, for a virtual environment of this Python version."""
    source = str(CONTAINER) if in_container() else f"{SERVER_WHEEL} {PERF_ANALYZER_WHEEL}"
    return f"{source} python{version}"


def libpython_directory() -> Path | None:
    """Where the running Python's shared library lies, or None if it was built without one.

    The stub is linked against it, and any other of the same version fails late.
    """
    library = f"libpython{python_version()}.so.1.0"
    folders = (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix, "lib"))
    return next((Path(folder) for folder in folders if Path(folder, library).exists()), None)


def link_container(runtime: Path) -> None:
    """Links to the container's server and Python backend."""
    link(runtime / "bin" / "tritonserver", CONTAINER / "bin" / "tritonserver")
    link(runtime / "backends" / "python", CONTAINER / "backends" / "python")


def link(path: Path, target: Path) -> None:
    """Makes a symbolic link and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def unpack_wheels(runtime: Path, scratch: Path) -> None:
    """Downloads the two wheels and takes the server's files and perf_analyzer out of them."""
    print("  downloading the server (55 MB) and perf_analyzer (14 MB)", flush=True)
    server = download(SERVER_WHEEL, scratch / "server")
    package, python_backend = "pytriton/tritonserver", runtime / "backends" / "python"
    libraries = runtime / "lib"
    unpack(
        server,
        {
            f"{package}/bin/": runtime / "bin",
            f"{package}/backends/python/": python_backend,
            f"{package}/python_backend_stubs/{python_version()}/": python_backend,
            "nvidia_pytriton.libs/": libraries,
        },
    )
    perf_analyzer = download(
        PERF_ANALYZER_WHEEL, scratch / "perf", "--platform", PERF_ANALYZER_PLATFORM
    )
    data = f"{'-'.join(PERF_ANALYZER_WHEEL.split('=='))}.data/data"
    folder = libraries / "perf_analyzer"
    unpack(perf_analyzer, {f"{data}/bin/perf_analyzer": folder / "perf_analyzer"})
    for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
        link(folder / name, Path("..", next(libraries.glob(pattern)).name))
    script = runtime / "bin" / "perf_analyzer"
    script.write_text(_PERF_ANALYZER_SCRIPT, encoding="utf-8")
    script.chmod(0o755)


def download(requirement: str, folder: Path, *options: str) -> Path:
    """Downloads one wheel with pip, whose configuration says from where."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*pip, *only, *options, requirement], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folders: Mapping[str, Path]) -> None:
    """Copies the files under each of the wheel's `folders` to a folder of ours, executable."""
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            for folder, target in folders.items():
                if name.startswith(folder) and not name.endswith("/"):
                    path = target / name.removeprefix(folder)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, path.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
                    path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
