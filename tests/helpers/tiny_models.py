"""Tiny random-weight models, one for each architecture, shaped after the real ones in miniature.

Each is saved like a published checkpoint, so that tests load it the way a user would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 384
EOS, BOS = 1, 2
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 8, "sliding_window": WINDOW}
_GEMMA_4: dict[str, Any] = {**_GEMMA, "global_head_dim": 16, "final_logit_softcapping": 30.0}
# The 12B, 26B-A4B and 31B models: K = V on full layers, no per-layer embeddings, nothing shared.
_GEMMA_4_LARGE: dict[str, Any] = {
    **_GEMMA_4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
_PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": VOCAB_SIZE}


def _layer_types(num_layers: int, period: int) -> list[str]:
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return [kinds[i % period] for i in range(num_layers)]


def _gemma_4_e2b() -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **_GEMMA_4,
        **_PER_LAYER,
        num_hidden_layers=10,
        num_key_value_heads=1,
        layer_types=_layer_types(10, 5),
        num_kv_shared_layers=5,
        hidden_size_per_layer_input=8,
        use_double_wide_mlp=True,
    )


def _gemma_4_e4b() -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **_GEMMA_4,
        **_PER_LAYER,
        num_hidden_layers=12,
        num_key_value_heads=2,
        num_kv_shared_layers=6,
        hidden_size_per_layer_input=8,
    )


def _gemma_4_26b() -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **_GEMMA_4_LARGE,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    )


def _gemma_4_31b() -> Gemma4TextConfig:
    return Gemma4TextConfig(**_GEMMA_4_LARGE, hidden_size_per_layer_input=0)


def _gemma_4_12b() -> Gemma4UnifiedTextConfig:
    return Gemma4UnifiedTextConfig(**_GEMMA_4_LARGE)


def _gemma_3() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **_GEMMA, num_hidden_layers=6, num_key_value_heads=1, query_pre_attn_scalar=8
    )


def _llama() -> LlamaConfig:
    return LlamaConfig(**_COMMON, num_hidden_layers=3, num_key_value_heads=2)


def _qwen_3() -> Qwen3Config:
    return Qwen3Config(**_COMMON, head_dim=8, num_hidden_layers=3, num_key_value_heads=2)


_VERIFIERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma-3": lambda: Gemma3ForCausalLM(_gemma_3()),
    "gemma-4-E2B": lambda: Gemma4ForCausalLM(_gemma_4_e2b()),
    "gemma-4-E4B": lambda: Gemma4ForCausalLM(_gemma_4_e4b()),
    "gemma-4-26B-A4B": lambda: Gemma4ForCausalLM(_gemma_4_26b()),
    "gemma-4-31B": lambda: Gemma4ForCausalLM(_gemma_4_31b()),
    "gemma-4-E2B-multimodal": lambda: Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=_gemma_4_e2b(), vision_config=None, audio_config=None)
    ),
    "gemma-4-12B-unified": lambda: Gemma4UnifiedForConditionalGeneration(
        Gemma4UnifiedConfig(text_config=_gemma_4_12b(), vision_config=None, audio_config=None)
    ),
    "llama": lambda: LlamaForCausalLM(_llama()),
    "qwen-3": lambda: Qwen3ForCausalLM(_qwen_3()),
}
VERIFIERS = tuple(_VERIFIERS)

# Verifier -> whether its assistant's head goes by centroids.
ASSISTANTS = {
    "gemma-4-E2B": True,
    "gemma-4-E4B": True,
    "gemma-4-26B-A4B": False,
    "gemma-4-31B": False,
    "gemma-4-12B-unified": False,
}


def _scramble(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights wide enough that greedy text neither stands still nor hangs on rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1 if "embed_tokens" in name else 0.3, generator=generator)
    return model.float().eval()


def save_verifier(name: str, directory: Path, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Path:
    """Saves the tiny verifier `name` with its tokenizer; returns its directory."""
    model = _VERIFIERS[name]()
    if vocab_size != VOCAB_SIZE:
        model.resize_token_embeddings(vocab_size)
    return save_model(model, directory / name, seed)


def save_model(model: PreTrainedModel, path: Path, seed: int = 0) -> Path:
    """Saves any causal LM with random weights and the byte tokenizer; returns its directory."""
    model = _scramble(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, 5], bos_token_id=BOS)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def save_assistant(
    verifier: str,
    directory: Path,
    seed: int = 1,
    *,
    backbone_hidden_size: int | None = None,
    **changes: Any,
) -> Path:
    """Saves a tiny MTP assistant; returns its directory.

    It fits the tiny verifier, unless `changes` to its text part say otherwise.
    """
    target = _VERIFIERS[verifier]().config.get_text_config()
    unified = verifier.endswith("unified")
    text_class = Gemma4UnifiedTextConfig if unified else Gemma4TextConfig
    sizes = {
        **_GEMMA_4,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "layer_types": _layer_types(4, 4),
        "num_kv_shared_layers": 4,
        "num_key_value_heads": target.per_layer_config[0].num_key_value_heads,
        "attention_k_eq_v": target.attention_k_eq_v,
        "final_logit_softcapping": None,
    }
    if target.attention_k_eq_v:
        sizes["num_global_key_value_heads"] = 1
    if not unified:
        sizes |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    sizes |= changes
    config_class = Gemma4UnifiedAssistantConfig if unified else Gemma4AssistantConfig
    model_class = Gemma4UnifiedAssistantForCausalLM if unified else Gemma4AssistantForCausalLM
    config = config_class(
        text_config=text_class(**sizes),
        backbone_hidden_size=backbone_hidden_size or target.hidden_size,
        use_ordered_embeddings=ASSISTANTS[verifier],
        num_centroids=24,
        centroid_intermediate_top_k=6,
    )
    model = _scramble(model_class(config), seed)
    if model.masked_embedding is not None:
        order = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
        model.masked_embedding.token_ordering.copy_(order)
    path = directory / f"{verifier}-assistant"
    model.save_pretrained(path)
    return path


def load_reference(path: Path) -> PreTrainedModel:
    """The checkpoint as transformers alone loads it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<end>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>", "<end>"],
    )
