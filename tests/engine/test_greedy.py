"""Greedy text through the engine is what transformers' own `generate` writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tandem import Engine, SamplingParams
from tiny_engines import TinyModels
from tiny_models import VERIFIERS, WINDOW

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
