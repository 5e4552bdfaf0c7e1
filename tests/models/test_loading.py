"""What is loaded, and what is refused with a reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from doubles import prompt_of, run
from tandem import (
    ConfigError,
    Engine,
    InvalidRequestError,
    SamplingParams,
    UnsupportedModelError,
    VerifierOutputError,
)
from tandem.models.attention import PackedBatch
from tiny_engines import TinyModels, config_of
from tiny_models import save_assistant, save_model, save_verifier

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def edit_weights(path: Path, edit: Any) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=r"nowhere.*neither a directory here nor loadable"):
        Engine(config_of(missing))


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and only warn."""
    path = save_verifier("llama", tmp_path)
    lost = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(path, lambda weights: weights.pop(lost))
    with pytest.raises(ConfigError, match=f"lacks 1 weights of LlamaForCausalLM, such as {lost}"):
        Engine(config_of(path))


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    """Mamba keeps a state, no keys and values."""
    model = MambaForCausalLM(
        MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    path = save_model(model, tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        Engine(config_of(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_with_soft_capping_is_refused(tmp_path: Path, dtype: str) -> None:
    """By name: the published cap moves a short probe's logits by less than bfloat16 rounds."""
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=512,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=50.0,
        )
    )
    path = save_model(model, tmp_path / "gemma-2")
    with pytest.raises(UnsupportedModelError, match=r"Gemma2ForCausalLM .* has no softcap"):
        Engine(config_of(path, dtype=dtype))


@pytest.mark.parametrize("name", ["llama", "gemma-3", "gemma-4-E2B"])
def test_other_logits_on_the_paged_cache_are_refused(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the reason: here each pass's K/V go to one another's slots."""
    slots = PackedBatch.slots
    monkeypatch.setattr(PackedBatch, "slots", lambda self: [each.roll(1) for each in slots(self)])
    with pytest.raises(UnsupportedModelError, match="differ by"):
        Engine(config_of(tiny.verifier(name)))


def test_a_cache_too_small_for_one_sequence_says_what_to_change(tiny: TinyModels) -> None:
    config = config_of(tiny.verifier("llama"), kv_cache_tokens=63)
    with pytest.raises(ConfigError, match=r"60 tokens.* 64: raise kv_cache_tokens or lower"):
        Engine(config)


def test_a_cache_that_just_fits_one_sequence_works(tiny: TinyModels) -> None:
    engine = Engine(config_of(tiny.verifier("llama"), kv_cache_tokens=64))
    sequence = engine.make_sequence(prompt_of(50), SamplingParams(max_tokens=20, ignore_eos=True))
    run(engine, [sequence])
    assert sequence.num_tokens == 64


def test_a_cache_larger_than_the_memory_is_refused(tiny: TinyModels) -> None:
    config = config_of(tiny.verifier("llama"), kv_cache_tokens=2**40)
    with pytest.raises(ConfigError, match=r"kv_cache_tokens 1099511627776 need .* GiB are free"):
        Engine(config)


@pytest.mark.slow
def test_the_largest_batch_loads_in_seconds(tiny: TinyModels) -> None:
    """Costs are measured with no more sequences than the measurement is about."""
    changes = {"kv_cache_tokens": 2**20, "max_num_seqs": 2**16, "max_num_batched_tokens": 2**16}
    config = config_of(tiny.verifier("llama"), drafters={"ngram": {}}, **changes)
    started = time.monotonic()
    engine = Engine(config)
    assert time.monotonic() - started < 30
    assert engine.load.num_blocks_used == 0


def test_a_length_beyond_the_models_own_is_refused(tiny: TinyModels) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 513 is beyond .* 512"):
        Engine(config_of(tiny.verifier("llama"), max_model_len=513, kv_cache_tokens=None))


def test_an_unknown_device_is_refused(tiny: TinyModels) -> None:
    with pytest.raises(ConfigError, match="'abacus' is not a torch device"):
        Engine(config_of(tiny.verifier("llama"), device="abacus"))


def test_a_drafter_of_another_kind_is_refused(tiny: TinyModels) -> None:
    drafters = {"mtp": {"model": str(tiny.verifier("qwen-3"))}}
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM; type 'mtp' needs a Gemma 4 assistant"):
        Engine(config_of(tiny.verifier("llama"), drafters=drafters))


def test_an_assistant_with_missing_weights_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    path = save_assistant("gemma-4-31B", tmp_path)
    edit_weights(path, lambda weights: weights.pop("pre_projection.weight"))
    config = config_of(tiny.verifier("gemma-4-31B"), drafters={"mtp": {"model": str(path)}})
    with pytest.raises(ConfigError, match=r"such as pre_projection\.weight"):
        Engine(config)


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_logits_that_are_not_numbers_end_one_request_alone(tmp_path: Path, drafter: str) -> None:
    """The embedding of token 300 is NaN: whoever reads it fails, and the others don't notice."""
    sound = save_verifier("llama", tmp_path / "sound")
    broken = save_verifier("llama", tmp_path / "broken")

    def break_token(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][300] = float("nan")

    edit_weights(broken, break_token)
    drafters = {"ngram": {"min_ngram_size": 1}}
    prompts = [[token for token in prompt_of(n) if token != 300] for n in (5, 9, 20)]
    expected = [
        output.token_ids
        for output in Engine(config_of(sound)).generate(prompts, GREEDY, drafter="none")
    ]
    assert not any(300 in output for output in expected)
    engine = Engine(config_of(broken, drafters=drafters))
    bad = engine.make_sequence([7, 300, 8], GREEDY, drafter=drafter)
    good = [engine.make_sequence(prompt, GREEDY, drafter=drafter) for prompt in prompts]
    run(engine, [good[0], bad, *good[1:]])
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, VerifierOutputError)
    assert bad.output_ids == []
    assert [sequence.output_ids for sequence in good] == expected
    assert all(sequence.finish_reason == "length" for sequence in good)
    # The blocks that held NaN are clean for whoever gets them next.
    (again,) = engine.generate([prompts[0]], GREEDY, drafter=drafter)
    assert again.token_ids == expected[0]
    engine.check_integrity()
    assert engine.load.num_blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([384], "whole numbers below 384, got 384"),
        ([-1], "whole numbers below 384, got -1"),
        ([True], "got True"),
        ([1.0], r"got 1\.0"),
        ("", "the prompt is empty"),
        ([9] * 256, "length is 256 tokens .* resulted in 256 tokens; at most 255 leave room"),
    ],
)
def test_a_bad_prompt_is_refused(engines: Any, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engines("llama").make_sequence(prompt)


def test_a_bad_drafter_or_lookahead_is_refused(engines: Any) -> None:
    engine = engines("llama")
    with pytest.raises(InvalidRequestError, match="unknown drafter 'mtp'; loaded: none, ngram"):
        engine.make_sequence([9], drafter="mtp")
    for lookahead in (-1, True, 1.5):
        with pytest.raises(InvalidRequestError, match="num_speculative_tokens"):
            engine.make_sequence([9], num_speculative_tokens=lookahead)
    assert engine.make_sequence([9], num_speculative_tokens=99).max_lookahead == 8
    assert engine.make_sequence([9], drafter="none").max_lookahead == 0


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    """Token ids work without one, and no text comes back."""
    path = save_verifier("llama", tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    engine = Engine(config_of(path))
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        engine.make_sequence("hello")
    (output,) = engine.generate([[9, 10]], GREEDY)
    assert output.text is None
    assert len(output.token_ids) == 12


def test_text_goes_in_and_out(engines: Any) -> None:
    engine = engines("llama")
    (output,) = engine.generate(["abc"], GREEDY, drafter="none")
    (same,) = engine.generate([engine.tokenizer("abc")["input_ids"]], GREEDY, drafter="none")
    assert output.token_ids == same.token_ids
    assert output.text == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)
