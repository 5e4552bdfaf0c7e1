"""Checkpoints from disk or hub: models, and the tokenizers beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tandem.errors import ConfigError

logger = logging.getLogger("tandem")

# Where multimodal checkpoints keep the weights of their text part -> where the text class does.
_TEXT_PART = {
    r"^(model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, *, key: str = "model"
) -> PreTrainedModel:
    """Loads a causal LM or an assistant; of a multimodal checkpoint, its text part.

    Args:
        key: the configuration's, for what errors say.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        loader: Any = AutoModelForCausalLM
        arguments: dict[str, Any] = {"config": config}
        text_config = config.get_text_config()
        # An assistant has a text part too, but is no multimodal model; Tandem's is no causal LM.
        if hasattr(config, "source_layers"):
            loader = AutoModel
        elif text_config is not config and not hasattr(config, "backbone_hidden_size"):
            loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
            arguments = {"config": text_config, "key_mapping": _TEXT_PART}
        model, info = loader.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **arguments
        )
        loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    except SafetensorError as error:
        raise ConfigError(
            f"{key}: {_damaged_file(path)} is damaged ({error}): download or copy it again"
        ) from error
    # Whatever there is in a checkpoint, some library stumbles over it in its own way.
    except Exception as error:
        hint = "" if _exists(path) else " (neither a directory here nor loadable by hub id)"
        raise ConfigError(f"{key}: can't load the model {path!r}{hint}: {_said(error)}") from error
    if info["missing_keys"]:
        raise ConfigError(
            f"{key}: the checkpoint {path!r} lacks {len(info['missing_keys'])} weights of "
            f"{type(model).__name__}, such as {min(info['missing_keys'])}"
        )
    return loaded


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None, with a warning, if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer in %s, prompts must be token ids: %s", path, _said(error))
        return None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a path
        return False


def _said(error: Exception) -> str:
    """What a library said, in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"


def _damaged_file(path: str) -> str:
    """The first file of weights that can't be opened; where none is found, the checkpoint."""
    folder = path if Path(path).is_dir() else snapshot_download(path, local_files_only=True)
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return str(file)
    return path
