"""Greedy text through the engine is what transformers' own `generate` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tandem import ConfigError, Engine, SamplingParams
from tiny_engines import TinyModels, config_of
from tiny_models import VERIFIERS, WINDOW, load_reference, save_model

NUM_TOKENS = 64
CHUNK = 16
# Shorter than the window, longer, and longer than a prefill chunk.
PROMPT_LENGTHS = (1, 5, WINDOW + 3, CHUNK + 9, 3 * CHUNK + 1)
PROMPTS = [
    [(i * 31 + j * 17) % 370 + 6 for j in range(length)] for i, length in enumerate(PROMPT_LENGTHS)
]


def hf_greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    # The checkpoint's own would fill in its end-of-sequence ids.
    model.generation_config = config = GenerationConfig(max_new_tokens=NUM_TOKENS, pad_token_id=0)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", VERIFIERS)
def test_greedy_equals_transformers(
    name: str, tiny: TinyModels, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(name, max_num_seqs=4, max_num_batched_tokens=CHUNK)
    model = tiny.reference(name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        assert output.token_ids == hf_greedy(model, prompt)
        assert output.finish_reason == "length"
        assert output.num_verify_steps == NUM_TOKENS


SCALED = {
    "yarn": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_scaled_positions_are_those_of_transformers(
    rope_type: str, tiny: TinyModels, tmp_path: Path
) -> None:
    """Far beyond the length that the scaling starts from, but where that changes all positions."""
    config = LlamaConfig.from_pretrained(tiny.verifier("llama"))
    start = 128 if rope_type == "longrope" else 32
    config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": start,
        **SCALED[rope_type],
    }
    path = save_model(LlamaForCausalLM(config), tmp_path / "scaled")
    engine = Engine(config_of(path, max_model_len=128, max_num_batched_tokens=CHUNK))
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    model = load_reference(path)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        assert output.token_ids == hf_greedy(model, prompt)
    if rope_type == "longrope":
        with pytest.raises(ConfigError, match=r"max_model_len 129 is beyond .* limit of 128"):
            Engine(config_of(path, max_model_len=129))


@pytest.mark.parametrize("which", [0, 1])
def test_each_end_of_sequence_id_stops(
    which: int, tiny: TinyModels, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine("llama")
    written = hf_greedy(tiny.reference("llama"), PROMPTS[1])
    eos = [written[9], written[20]][which]
    # Either id of the list stops; the other must not be met before.
    engine.eos_token_ids = frozenset([eos, 383])
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    (output,) = engine.generate([PROMPTS[1]], params)
    assert output.token_ids == written[: written.index(eos) + 1]
    assert output.finish_reason == "stop"


def test_the_checkpoints_end_of_sequence_ids_are_all_known(
    make_engine: Callable[..., Engine],
) -> None:
    assert make_engine("llama").eos_token_ids == {1, 5}


def test_the_context_limit_ends_a_sequence(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama", max_model_len=40)
    params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    (output,) = engine.generate([PROMPTS[3]], params)
    assert len(output.token_ids) == 40 - len(PROMPTS[3])
    assert output.finish_reason == "length"
