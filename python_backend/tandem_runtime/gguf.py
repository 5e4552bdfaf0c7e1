"""From a GGUF file to a folder as transformers saves them, with weights in bfloat16."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any


def convert(gguf: Path, folder: Path, eos_token: str) -> None:
    """Writes the file's model and tokenizer; texts end with `eos_token`."""
    os.environ["TQDM_DISABLE"] = "1"
    import gguf as gguf_library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # transformers reads the file for the configuration, the weights and the tokenizer anew, and
    # its vocabulary makes each reading take long.
    gguf_library.GGUFReader = functools.cache(gguf_library.GGUFReader)  # type: ignore[assignment,misc]
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    config = loaded.config
    # Converted to plain weights on loading; one still marked as quantised could not be saved.
    vars(config).pop("quantization_config", None)
    config.eos_token_id = tokenizer.convert_tokens_to_ids(eos_token)
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    # safetensors makes files that only their owner can read; servers often run as someone else.
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
    tokenizer.save_pretrained(folder)


def check(folder: Path, prompt: str, answer: str, eos_token: str) -> None:
    """Loads the model and lets it answer: a text, or a question where it has a chat template.

    Raises:
        RuntimeError: it doesn't give the answer, or would not know where to stop.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if not text.startswith(answer):
        raise RuntimeError(f"the converted model is broken: to {prompt!r} it wrote {text!r}")
    stops = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    eos_token_id = tokenizer.convert_tokens_to_ids(eos_token)
    if stops != (eos_token_id, eos_token_id):
        raise RuntimeError(f"the converted model stops at {stops}, not at {eos_token_id}")
