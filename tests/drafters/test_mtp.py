"""The MTP drafter guesses what transformers' own modules guess; errors here don't show in text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from doubles import plain, prompt_of, run
from tandem import DrafterMismatchError, Engine, EngineConfig, SamplingParams
from tandem.drafters.drafter import DraftRequest, GoesOn, always
from tandem.requests.sequence import Draft
from tandem.sampling.sample import Draw, sample
from tiny_engines import TinyModels
from tiny_models import ASSISTANTS, WINDOW, save_assistant

LOOKAHEAD = 4
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


class Round:
    """One round of drafting as it happened in the engine."""

    def __init__(self, token_ids: list[int], draft_ids: list[int], rejected_before: bool) -> None:
        self.token_ids = token_ids  # the last of them is not computed yet
        self.draft_ids = draft_ids
        self.rejected_before = rejected_before


def record(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Generates greedily for a few prompts and keeps every round of the MTP drafter."""
    rounds: list[Round] = []
    accepted: dict[int, int] = {}
    propose = engine.drafters["mtp"].propose

    def keep(requests: Sequence[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = propose(requests, goes_on)
        for (sequence, num_tokens), (draft_ids, *_) in zip(requests, drafts, strict=True):
            all_accepted = sequence.num_draft_tokens == sequence.num_accepted_tokens
            previous = accepted.get(sequence.id, 0)
            rejected = not all_accepted and sequence.num_draft_tokens > previous
            accepted[sequence.id] = sequence.num_draft_tokens
            if num_tokens == LOOKAHEAD:
                rounds.append(Round(list(sequence.token_ids), draft_ids, rejected))
        return drafts

    monkeypatch.setattr(engine.drafters["mtp"], "propose", keep)
    prompts = [prompt_of(3), prompt_of(WINDOW + 7), prompt_of(40)]
    list(engine.generate(prompts, GREEDY, drafter="mtp", num_speculative_tokens=LOOKAHEAD))
    return rounds


@torch.no_grad()
def guesses_on_committed(
    verifier: PreTrainedModel,
    assistant: PreTrainedModel,
    token_ids: list[int],
    choose: Callable[[torch.Tensor, int], torch.Tensor] = lambda logits, _: logits.argmax(dim=-1),
    num_guesses: int = LOOKAHEAD,
) -> list[int]:
    """The assistant's guesses when it is fed the states of the committed tokens alone."""
    ids = torch.tensor([token_ids], device=verifier.device)
    output = verifier(
        input_ids=ids[:, :-1],
        use_cache=False,
        output_hidden_states=True,
        return_shared_kv_states=True,
    )
    shared = dict(output.shared_kv_states)
    assert all(keys.shape[2] == len(token_ids) - 1 for keys, _ in shared.values())
    hidden, token = output.hidden_states[-1][:, -1:], ids[:, -1:]
    drafts = []
    for step in range(num_guesses):
        embedding = verifier.get_input_embeddings()(token)
        guess = assistant(
            inputs_embeds=torch.cat([embedding, hidden], dim=-1),
            position_ids=torch.tensor([[len(token_ids) - 1]], device=verifier.device),
            shared_kv_states=shared,
        )
        token, hidden = choose(guess.logits, step), guess.last_hidden_state
        drafts.append(int(token))
    return drafts


@torch.no_grad()
def guesses_of_generator(
    verifier: PreTrainedModel, assistant: PreTrainedModel, token_ids: list[int]
) -> list[int]:
    """HF's candidate generator, after a pass in which all of `LOOKAHEAD` drafts were accepted."""
    generator = SinglePositionMultiTokenCandidateGenerator(
        assistant, verifier.get_input_embeddings(), verifier.generation_config
    )
    generator.num_assistant_tokens = LOOKAHEAD
    generator.main_model_max_length = 10_000
    generator.is_main_model_prefill = False
    ids = torch.tensor([token_ids], device=verifier.device)
    split = len(token_ids) - 1 - (LOOKAHEAD + 1)
    cache = DynamicCache(config=verifier.config)
    verifier(input_ids=ids[:, :split], past_key_values=cache)
    output = verifier(
        input_ids=ids[:, split:-1],
        past_key_values=cache,
        output_hidden_states=True,
        return_shared_kv_states=True,
    )
    candidates, _ = generator.get_candidates(
        ids, {}, output, is_first_iteration=False, n_last_matches=LOOKAHEAD
    )
    drafts: list[int] = candidates[0, len(token_ids) :].tolist()
    return drafts


def load(tiny: TinyModels, name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    verifier = tiny.reference(name)
    assistant = AutoModelForCausalLM.from_pretrained(tiny.assistant(name), dtype=torch.float32)
    return verifier, assistant.to(verifier.device).eval()


@pytest.mark.parametrize("name", ASSISTANTS)
def test_guesses_equal_those_of_transformers(
    engines: Any, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In every round against the assistant on committed states, dense and centroid heads."""
    rounds = record(engines(name, mtp=True), monkeypatch)
    verifier, assistant = load(tiny, name)
    assert len(rounds) >= 10
    assert sum(one.rejected_before for one in rounds) >= 10
    for one in rounds:
        assert one.draft_ids == guesses_on_committed(verifier, assistant, one.token_ids)


@pytest.mark.parametrize("name", ASSISTANTS)
def test_guesses_equal_those_of_the_candidate_generator(
    engines: Any, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where nothing was rejected before; contexts reach far beyond the window."""
    rounds = record(engines(name, mtp=True), monkeypatch)
    verifier, assistant = load(tiny, name)
    long_enough = [one for one in rounds if len(one.token_ids) > LOOKAHEAD + 3]
    assert len(long_enough) >= 10
    for one in long_enough:
        assert one.draft_ids == guesses_of_generator(verifier, assistant, one.token_ids)


@pytest.mark.parametrize("num_right", [2, LOOKAHEAD])
@pytest.mark.parametrize("name", ASSISTANTS)
def test_guesses_start_from_the_last_accepted_token(
    engines: Any, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str, num_right: int
) -> None:
    """Two drafts or all accepted, which those of a random assistant hardly ever are."""
    engine = engines(name, mtp=True)
    verifier, assistant = load(tiny, name)
    prompts = [prompt_of(WINDOW - 5), prompt_of(WINDOW + 4)]
    texts = dict(enumerate(plain(engine, [(p, GREEDY) for p in prompts])))
    propose = engine.drafters["mtp"].propose
    rounds: list[tuple[list[int], list[int]]] = []

    def replace_drafts(requests: Sequence[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = []
        for (sequence, num_tokens), guesses in zip(requests, propose(requests), strict=True):
            if num_tokens == LOOKAHEAD:
                rounds.append((list(sequence.token_ids), guesses.token_ids))
            start = sequence.num_output_tokens
            right = texts[sequence.seed][start : start + num_tokens]
            wrong = [token ^ 1 for token in right[num_right:]]
            drafts.append(Draft(right[:num_right] + wrong))
        return drafts

    monkeypatch.setattr(engine.drafters["mtp"], "propose", replace_drafts)
    sequences = [
        engine.make_sequence(
            prompt, replace(GREEDY, seed=i), drafter="mtp", num_speculative_tokens=LOOKAHEAD
        )
        for i, prompt in enumerate(prompts)
    ]
    run(engine, sequences)
    assert [sequence.output_ids for sequence in sequences] == list(texts.values())
    assert len(rounds) >= 10
    for token_ids, guesses in rounds:
        assert guesses == guesses_on_committed(verifier, assistant, token_ids)


def test_guesses_share_the_verifiers_noise(
    engines: Any, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first guess is the assistant's logits under the noise of the position it stands for."""
    name = "gemma-4-31B"
    engine = engines(name, mtp=True)
    verifier, assistant = load(tiny, name)
    params = replace(GREEDY, temperature=1.3, seed=5)
    propose = engine.drafters["mtp"].propose
    rounds: list[tuple[list[int], list[int]]] = []

    def keep(requests: Sequence[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = propose(requests, goes_on)
        rounds.append((list(requests[0].sequence.token_ids), drafts[0].token_ids))
        return drafts

    monkeypatch.setattr(engine.drafters["mtp"], "propose", keep)
    run(engine, [engine.make_sequence(prompt_of(9), params, drafter="mtp")])
    assert len(rounds) >= 10
    for token_ids, guesses in rounds:

        def choose(logits: torch.Tensor, step: int, first: int = len(token_ids)) -> torch.Tensor:
            return sample(logits[0], [Draw(params, 5, first + step)])[None]

        expected = guesses_on_committed(verifier, assistant, token_ids, choose, len(guesses))
        assert guesses == expected


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is not a view of what was there before."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__()
        self._pool = pool.untyped_storage().data_ptr()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {None, self._pool, *map(_storage, args)}
        for tensor in output if isinstance(output, tuple) else (output,):
            if _storage(tensor) not in known:
                self.numel = max(self.numel, tensor.numel())
        return output


def _storage(tensor: object) -> int | None:
    """None for what isn't a plain tensor, such as a packed weight."""
    if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
        return tensor.untyped_storage().data_ptr()
    return None


def test_the_pool_is_read_in_place(engines: Any) -> None:
    """The drafter holds the pool's own tensors, and a round makes nothing as large as a context."""
    engine = engines("gemma-4-31B", mtp=True, max_model_len=512)
    drafter = engine.drafters["mtp"]
    cache = engine.verifier.cache
    pool = cache.layer(0)[0].untyped_storage().data_ptr()
    for keys, values in drafter.shared_kv_states.values():
        assert keys.untyped_storage().data_ptr() == pool
        assert values.untyped_storage().data_ptr() == pool
    sequence = engine.make_sequence(prompt_of(440), GREEDY, drafter="mtp")
    engine.add(sequence)
    while not sequence.is_decoding:
        engine.step()
    keys, _ = drafter.shared_kv_states["full_attention"]
    with torch.inference_mode(), _Largest(keys) as largest:
        drafter.propose([DraftRequest(sequence, LOOKAHEAD)])
    assert 0 < largest.numel < 440 * keys.shape[1] * keys.shape[2]
    engine.cancel(sequence)
    engine.step()


@pytest.fixture
def refuse(tiny: TinyModels, tmp_path: Path) -> Any:
    def check(match: str, verifier: str = "gemma-4-31B", **changes: Any) -> None:
        path = save_assistant("gemma-4-31B", tmp_path, **changes)
        config = EngineConfig(
            verifier=str(tiny.verifier(verifier)),
            dtype="float32",
            max_model_len=64,
            drafters={"mtp": {"model": str(path)}},
            enforce_eager=True,
        )
        with pytest.raises(DrafterMismatchError, match=match):
            Engine(config)

    return check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 400}, "vocab_size is 400 in the drafter and 384 in the verifier"),
        ({"backbone_hidden_size": 40}, "hidden size is 40 in the drafter and 32 in the verifier"),
        ({"num_key_value_heads": 4}, "KV heads of sliding_attention is 4 .* and 2"),
        ({"num_global_key_value_heads": 2}, "KV heads of full_attention is 2 .* and 1"),
        ({"head_dim": 16}, "head size of sliding_attention is 16 .* and 8"),
        ({"global_head_dim": 32}, "head size of full_attention is 32 .* and 16"),
        ({"sliding_window": 16}, "sliding window is 16 .* and 8"),
    ],
)
def test_an_assistant_that_does_not_fit_is_refused(
    refuse: Any, changes: dict[str, Any], message: str
) -> None:
    refuse(message, **changes)


def test_a_verifier_without_layer_types_is_refused(refuse: Any) -> None:
    refuse("type sliding_attention; the verifier has", verifier="llama")
