"""Sets up all that `make demo`, `make test` and `make serve` need; does nothing when it is there.

Four stages: the Python packages in `.venv`, the Triton Inference Server in `.triton`, and in
`.models` the default verifier and a chat model. Each is complete or absent, so an interrupted run
just goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tandem_runtime.models import CHAT, GEMMA, MODELS, Model
from tandem_runtime.paths import ROOT
from tandem_runtime.triton import TRITON, in_container, libpython_directory, runtime_key

VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
PACKAGE_LISTS = (
    "requirements.txt",
    "requirements-client.txt",
    "requirements-dev.txt",
    "pyproject.toml",
)
PYTHON_VERSIONS = ((3, 11), (3, 12))
MIN_GLIBC = (2, 35)
MIN_FREE_GB = 6
MIN_FREE_GB_CUDA = 12
PIP_HELP = (
    "Is the network up? pip's settings are honoured, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, "
    "PIP_CONSTRAINT and HTTPS_PROXY among them."
)


class SetUpError(RuntimeError):
    """Why the set-up can't go on, and what to do about it."""


class Stage(NamedTuple):
    """One part of the set-up."""

    title: str
    is_done: Callable[[], bool]
    make: Callable[[], None]


def main() -> int:
    """Runs the stages that are not done and returns the exit status."""
    stages = [
        Stage("Python packages in .venv", venv_is_done, make_venv),
        Stage("Triton Inference Server in .triton", triton_is_done, make_triton),
        *(
            Stage(f"{model.title}, in .models", model.folder.exists, partial(make_model, model))
            for model in (GEMMA, CHAT)
        ),
    ]
    try:
        if not all(stage.is_done() for stage in stages):
            with lock():
                run_stages(stages)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_stages(stages: list[Stage]) -> None:
    """Makes what is missing, in order."""
    for folder in (ROOT, MODELS):
        for leftover in folder.glob(".part-*"):
            shutil.rmtree(leftover)
    for number, stage in enumerate(stages, 1):
        if not stage.is_done():
            print(f"[{number}/{len(stages)}] {stage.title}", flush=True)
            start = time.monotonic()
            stage.make()
            print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


@contextmanager
def lock() -> Iterator[None]:
    """Lets one set-up of this tree run at a time."""
    with (ROOT / ".setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this directory to end ...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def venv_is_done() -> bool:
    """Whether `.venv` holds what the package lists say."""
    return VENV_PYTHON.exists() and read_stamp(VENV) == packages_key()


def make_venv() -> None:
    """Makes or completes `.venv`."""
    if not VENV_PYTHON.exists() or is_broken(VENV):
        check_machine()
        run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "the virtual environment could not be made; Debian and Ubuntu need python3-venv for it",
        )
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    failure = f"the Python packages could not be installed (pip's message is above). {PIP_HELP}"
    # Progress bars on a terminal; in a log only what goes wrong.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    run([*pip, *quiet, "-r", "requirements-dev.txt"], failure)
    run([*pip, "-qq", "--no-deps", "-e", "."], failure)
    if has_gpu():
        warn_without_cuda()
    write_stamp(VENV, packages_key())


def triton_is_done() -> bool:
    """Whether `.triton` is the one for the Python in `.venv`."""
    return read_stamp(TRITON) == runtime_key(venv_python_version())


def make_triton() -> None:
    """Makes `.triton`."""
    run(
        [str(VENV_PYTHON), "-m", "tandem_runtime.triton"],
        f"no Triton could be set up. {PIP_HELP}",
    )


def make_model(model: Model) -> None:
    """Makes one of the models."""
    command = [str(VENV_PYTHON), "scripts/fetch_models.py", model.name]
    run(command, f"the model could not be made. {PIP_HELP}")


def check_machine() -> None:
    """Looks for what no package can bring.

    Raises:
        SetUpError: naming the first thing that is missing, and the cure.
    """
    check_python(sys.version_info[:2])
    if importlib.util.find_spec("ensurepip") is None:
        raise SetUpError("this Python has no ensurepip: on Debian and Ubuntu install python3-venv")
    if not in_container():
        check_platform(sys.platform, platform.machine(), platform.libc_ver())
        if libpython_directory() is None:
            version = platform.python_version()
            raise SetUpError(
                f"Python {version} ({sys.base_prefix}) has no shared library, which Triton needs: "
                f"on Debian and Ubuntu install libpython{version.rpartition('.')[0]}; with pyenv "
                "build it anew with PYTHON_CONFIGURE_OPTS=--enable-shared"
            )
    check_disk(shutil.disk_usage(ROOT).free, has_gpu())


def check_python(version: tuple[int, ...]) -> None:
    """Raises SetUpError for a Python that the pinned packages don't run on."""
    if version not in PYTHON_VERSIONS:
        raise SetUpError(
            f"Tandem needs Python 3.11 or 3.12, and this is {version[0]}.{version[1]}: "
            "name another, as in `make setup PYTHON=python3.12`"
        )


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> None:
    """Raises SetUpError where the server's wheel doesn't run."""
    if system != "linux" or machine != "x86_64":
        raise SetUpError(
            f"the server runs on x86_64 Linux, and this is {machine} {system}: "
            "use NVIDIA's Triton container, in which this works too"
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")) < MIN_GLIBC:
        raise SetUpError(
            f"the server needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12), and this system has "
            f"{' '.join(libc).strip() or 'another C library'}: use NVIDIA's Triton container"
        )


def check_disk(free_bytes: int, gpu: bool) -> None:
    """Raises SetUpError when the disk is too full."""
    needed = MIN_FREE_GB_CUDA if gpu else MIN_FREE_GB
    if free_bytes < needed * 1e9:
        raise SetUpError(
            f"{free_bytes / 1e9:.1f} GB are free in {ROOT}, and the set-up needs {needed} GB"
        )


def has_gpu() -> bool:
    """Whether this machine has NVIDIA's driver."""
    return shutil.which("nvidia-smi") is not None


def warn_without_cuda() -> None:
    """Says so when torch can't use the GPU; everything works on the CPU too."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    output = subprocess.run([VENV_PYTHON, "-c", code], check=True, capture_output=True, text=True)
    version, cuda, available = output.stdout.split()
    if cuda == "None":
        print(
            f"warning: this machine has a GPU, but pip chose torch {version}, which has no CUDA: "
            "check pip's settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL), remove .venv, run again"
        )
    elif available != "True":
        print(
            f"warning: torch {version} can't use the GPU: does `nvidia-smi` show it, and is the "
            f"driver new enough for CUDA {cuda}?"
        )


def is_broken(venv: Path) -> bool:
    """Whether pip was killed between a package's metadata and its record, and would not notice."""
    return any(not (path / "RECORD").exists() for path in venv.glob("lib/*/*/*.dist-info"))


def venv_python_version() -> str:
    """The version of the Python in `.venv`, such as "3.12"; empty without one."""
    return next((path.name.removeprefix("python") for path in VENV.glob("lib/python3*")), "")


def packages_key() -> str:
    """Changes when the package lists do."""
    lists = b"".join((ROOT / name).read_bytes() for name in PACKAGE_LISTS)
    return hashlib.sha256(lists).hexdigest()


def read_stamp(folder: Path) -> str | None:
    """What the folder was made from, or None while it isn't complete."""
    stamp = folder / ".stamp"
    return stamp.read_text(encoding="utf-8") if stamp.exists() else None


def write_stamp(folder: Path, key: str) -> None:
    """Marks the folder as complete."""
    (folder / ".stamp").write_text(key, encoding="utf-8")


def run(command: list[str], failure: str) -> None:
    """Runs a command in the project's directory; SetUpError with `failure` when it fails."""
    status = subprocess.run(command, cwd=ROOT).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise SetUpError(failure)
