"""An assistant of Tandem's own: serving computes what training computed, for every verifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from doubles import plain, prompt_of, run
from tandem import DrafterMismatchError, SamplingParams
from tandem.drafters.assistant import Assistant
from tandem.drafters.drafter import DraftRequest, GoesOn, always
from tandem.models.checkpoint import load_model
from tandem.requests.sequence import Draft
from tandem_train.corpus import TrainingText
from tandem_train.features import FeatureStore
from tandem_train.start import default_source_layers
from tandem_train.train import save
from tandem_train.unroll import unroll
from tiny_assistants import DRAFT_TOKENS, LOOKAHEAD, engine_with, make_assistant
from tiny_engines import DEVICE, TinyModels
from tiny_models import VERIFIERS, VOCAB_SIZE, WINDOW

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


@torch.inference_mode()
def guesses_in_training(
    assistant: Assistant, store: FeatureStore, token_ids: list[int], draft_ids: list[int]
) -> list[int]:
    """What the unrolled assistant guesses behind `token_ids`, where the guesses are the text."""
    text = TrainingText(hash((*token_ids, *draft_ids)), [*token_ids, *draft_ids], 1, None)
    features, last = store.batch([text]), len(token_ids) - 1
    return [
        int(assistant.draft_token_ids[result.logits[0, last - 1].argmax()])
        for result in unroll(assistant, features, LOOKAHEAD)
    ]


@pytest.mark.parametrize("name", VERIFIERS)
def test_serving_guesses_what_training_guesses(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In rounds after accepted and rejected drafts, and in contexts far beyond the window."""
    assistant, store = make_assistant(tiny.verifier(name))
    save(assistant, tmp_path / "drafter", dtype=torch.float32)
    engine = engine_with(tiny.verifier(name), tmp_path / "drafter")
    prompts = [prompt_of(3), prompt_of(WINDOW + 7), prompt_of(40)]
    expected = plain(engine, [(prompt, GREEDY) for prompt in prompts])
    propose = engine.drafters["mtp"].propose
    rounds: list[tuple[list[int], list[int]]] = []

    def keep(requests: Sequence[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = propose(requests, goes_on)
        rounds.extend(
            (list(request.sequence.token_ids), draft.token_ids)
            for request, draft in zip(requests, drafts, strict=True)
            if len(draft.token_ids) == LOOKAHEAD
        )
        return drafts

    monkeypatch.setattr(engine.drafters["mtp"], "propose", keep)
    sequences = [engine.make_sequence(prompt, GREEDY, drafter="mtp") for prompt in prompts]
    run(engine, sequences)
    assert [sequence.output_ids for sequence in sequences] == expected
    assert len(rounds) >= 10
    for token_ids, draft_ids in rounds:
        assert draft_ids == guesses_in_training(assistant, store, token_ids, draft_ids)


def test_sampled_text_is_the_plain_text(tiny: TinyModels, tmp_path: Path) -> None:
    """Guesses share the verifier's noise, so most of the draft vocabulary's are right."""
    assistant, _ = make_assistant(tiny.verifier("gemma-3"))
    save(assistant, tmp_path / "drafter", dtype=torch.float32)
    engine = engine_with(tiny.verifier("gemma-3"), tmp_path / "drafter")
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    sequence = engine.make_sequence(prompt_of(9), params, drafter="mtp")
    run(engine, [sequence])
    assert sequence.output_ids == plain(engine, [(prompt_of(9), params)])[0]
    assert sequence.num_accepted_tokens > 0


def test_a_saved_assistant_has_no_embeddings_of_the_verifier(
    tiny: TinyModels, tmp_path: Path
) -> None:
    assistant, _ = make_assistant(tiny.verifier("llama"))
    save(assistant, tmp_path)
    loaded = load_model(str(tmp_path), torch.float32, torch.device(DEVICE))
    assert isinstance(loaded, Assistant)
    assert loaded.draft_token_ids.tolist() == DRAFT_TOKENS
    assert all(weight.shape[0] != VOCAB_SIZE for weight in loaded.state_dict().values())
    assert "head.weight" not in loaded.state_dict()


def test_another_verifier_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    assistant, _ = make_assistant(tiny.verifier("llama"))
    save(assistant, tmp_path)
    with pytest.raises(DrafterMismatchError, match=r"model_type is llama there and qwen3 here"):
        engine_with(tiny.verifier("qwen-3"), tmp_path)


def test_the_verifiers_last_storing_layers_are_read(tiny: TinyModels) -> None:
    found = {}
    for name in VERIFIERS:
        verifier = load_model(str(tiny.verifier(name)), torch.float32, torch.device("cpu"))
        found[name] = default_source_layers(verifier)
    assert found["llama"] == found["qwen-3"] == [1, 2]
    assert found["gemma-3"] == found["gemma-4-31B"] == [4, 5]
    assert found["gemma-4-E2B"] == [3, 4]
