"""The output head, in the model's pass and out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from doubles import plain, prompt_of
from tandem import Engine, EngineConfig, SamplingParams
from tiny_engines import DEVICE, TinyModels
from tiny_models import save_model

IDS = prompt_of(12)


@torch.inference_mode()
def last_logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([IDS], device=DEVICE)).logits[0, -1]


def first_row(engine: Engine, monkeypatch: pytest.MonkeyPatch, **params: float) -> torch.Tensor:
    """The logits behind a prompt, as the engine would sample from them."""
    found = []
    verify = engine.verify
    monkeypatch.setattr(engine, "verify", lambda batch: found.append(verify(batch)) or found[-1])
    plain(engine, [(IDS, SamplingParams(max_tokens=1, **params))])
    return found[0].logits([0])[0]


@pytest.mark.parametrize("name", ["gemma-3", "gemma-4-E2B", "llama"])
def test_a_deferred_head_makes_the_models_logits(
    tiny: TinyModels, engines, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Gemma 4's soft cap included."""
    engine = engines(name)
    assert engine.verifier.head.is_deferred
    cap = engine.verifier.model.config.get_text_config()
    assert (getattr(cap, "final_logit_softcapping", None) is not None) == (name == "gemma-4-E2B")
    expected = last_logits(tiny.reference(name))
    torch.testing.assert_close(first_row(engine, monkeypatch), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_changes_its_logits_keeps_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite divides them: what is sampled must be what transformers would sample from."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=384, logits_scaling=3.0, max_position_embeddings=64, **sizes, **heads
        )
    )
    path = save_model(model, tmp_path / "granite")
    config = EngineConfig(str(path), dtype="float32", max_num_seqs=2, enforce_eager=True)
    engine = Engine(config)
    assert not engine.verifier.head.is_deferred
    reference = GraniteForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE).eval()
    expected = last_logits(reference)
    for temperature in (0.0, 1.0):
        found = first_row(engine, monkeypatch, temperature=temperature)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    [greedy] = plain(engine, [(IDS, SamplingParams(max_tokens=1, temperature=0.0))])
    assert greedy == [int(expected.argmax())]
