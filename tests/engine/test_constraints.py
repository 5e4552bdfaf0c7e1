"""What a request may ask of its text, and that drafts change nothing about it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from doubles import HalfDrafter, OracleDrafter, WrongDrafter, finish, plain, prompt_of, run
from tandem import Engine, FinishReason, Guide, InvalidRequestError, SamplingParams, Sequence
from tiny_engines import DEVICE, MAX_LOOKAHEAD, Engines, TinyModels

pytestmark = pytest.mark.both_wings
NUM_TOKENS = 32
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "ready": {"type": "boolean"}},
        "required": ["name", "ready"],
        "additionalProperties": False,
    }
)
GUIDES = [
    Guide("json", SCHEMA),
    Guide("json_object"),
    Guide("regex", "[a-c]{3}-[0-9]{1,4}!"),
    Guide("choice", choices=("left", "right", "straight on")),
    Guide("grammar", 'start: "sum=" NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/'),
    Guide("grammar", 'root ::= ("ab" | "cd")+ "."'),
]
CONSTRAINTS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.5, "presence_penalty": 2, "repetition_penalty": 1.1},
    {"logit_bias": {40: 3.0, 41: -100.0, 300: 2.5}},
    {"bad_words": (*"abcdefghijklmnopqrstuvwxyz", "XY")},
    {"min_tokens": 20, "stop_token_ids": tuple(range(6, 200, 3))},
    {"stop_token_ids": tuple(range(6, 384, 17))},
    {"stop": (*"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", "ab"), "include_stop_str_in_output": True},
    {"stop": tuple("qwrtplkjhgfdscvbnm"), "min_tokens": 10},
    {"logprobs": 3, "logit_bias": {50: 5.0}},
    {"allowed_token_ids": tuple(range(6, 384, 11)), "presence_penalty": 0.5},
    {"logit_bias": {4: 6.0}, "stop": ("<turn>",)},
    *({"guide": guide} for guide in GUIDES),
    {"guide": GUIDES[1], "frequency_penalty": 0.8, "bad_words": ("\\",), "logprobs": 0},
]
REQUESTS = [
    (
        prompt_of(5 + index),
        SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, seed=index, **constraint),
    )
    for index, (temperature, constraint) in enumerate(
        (temperature, constraint) for temperature in (0.0, 1.0) for constraint in CONSTRAINTS
    )
]
WIDE = {"max_num_seqs": 64, "max_num_batched_tokens": 1024}


@pytest.mark.parametrize("drafter", ["ngram", "oracle", "wrong", "half", "mtp"])
def test_tokens_equal_plain_decoding(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """All constraints in one batch, with reasons, log probabilities and errors."""
    engine = engines("gemma-4-E2B", mtp=True, **WIDE)
    expected = [engine.make_sequence(*request, drafter="none") for request in REQUESTS]
    run(engine, expected)
    outputs = {sequence.seed: sequence.output_ids for sequence in expected}
    doubles = {"oracle": OracleDrafter, "wrong": WrongDrafter, "half": HalfDrafter}
    name = drafter
    if drafter in doubles:
        name = "ngram"
        monkeypatch.setitem(engine.drafters, name, doubles[drafter](outputs))
    sequences = [
        engine.make_sequence(
            *request, drafter=name, num_speculative_tokens=1 + index % MAX_LOOKAHEAD
        )
        for index, request in enumerate(REQUESTS)
    ]
    run(engine, sequences)
    for sequence, other in zip(sequences, expected, strict=True):
        assert sequence.output_ids == other.output_ids, sequence.params
        assert sequence.finish_reason == other.finish_reason
        assert sequence.stop_reason == other.stop_reason
    assert sum(sequence.num_draft_tokens for sequence in sequences) > 0
    if drafter == "oracle":
        assert all(s.num_accepted_tokens >= s.num_draft_tokens - 8 for s in sequences)


def test_the_constraints_matter(engines: Engines) -> None:
    """Each changes what would be generated without it, so the test above tests something."""
    engine = engines("gemma-4-E2B", mtp=True, **WIDE)
    free = [
        (prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=p.temperature, seed=p.seed))
        for prompt, p in REQUESTS
    ]
    outputs = zip(plain(engine, REQUESTS), plain(engine, free), strict=True)
    differs = [output != other for output, other in outputs]
    for index, constraint in enumerate(CONSTRAINTS):
        greedy, sampled = differs[index], differs[index + len(CONSTRAINTS)]
        assert greedy or sampled, constraint


def generate(engine: Engine, params: SamplingParams, prompt: list[int] | None = None) -> Sequence:
    sequence = engine.make_sequence(prompt or prompt_of(9), params)
    run(engine, [sequence])
    return sequence


def text_of(engine: Engine, params: SamplingParams) -> str:
    output = next(iter(engine.generate([prompt_of(9)], params)))
    assert output.text is not None
    return output.text


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(
    engines: Engines, tiny: TinyModels, penalty: float
) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, repetition_penalty=penalty)
    model = tiny.reference("llama")
    ids = torch.tensor([prompt_of(9)], device=DEVICE)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    while ids.shape[1] < 9 + NUM_TOKENS:
        with torch.inference_mode():
            scores = processor(ids, model(ids).logits[:, -1])
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    output = generate(engine, replace(params, ignore_eos=True)).output_ids
    assert output == ids[0, 9:].tolist()


def test_presence_and_frequency_count_the_output(engines: Engines, tiny: TinyModels) -> None:
    engine = engines("llama", **WIDE)
    model = tiny.reference("llama")
    ids = prompt_of(9)
    while len(ids) < 9 + NUM_TOKENS:
        with torch.inference_mode():
            scores = model(torch.tensor([ids], device=DEVICE)).logits[0, -1].tolist()
        for token in range(len(scores)):
            count = ids[9:].count(token)
            scores[token] -= 0.7 * (count > 0) + 0.4 * count
        ids.append(scores.index(max(scores)))
    params = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=0,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        ignore_eos=True,
    )
    assert generate(engine, params).output_ids == ids[9:]


def test_bias_forces_and_forbids(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=8, temperature=1, seed=1, ignore_eos=True)
    forced = generate(engine, replace(params, logit_bias={77: 100.0}))
    assert forced.output_ids == [77] * 8
    free = generate(engine, params).output_ids
    without = generate(engine, replace(params, logit_bias=dict.fromkeys(free, -100.0)))
    assert not set(free) & set(without.output_ids)


def test_only_allowed_tokens_come(engines: Engines) -> None:
    """Not even an end of sequence, which isn't one of them."""
    allowed = (50, 60, 70)
    params = SamplingParams(max_tokens=30, seed=1, allowed_token_ids=allowed, logit_bias={1: 100.0})
    sequence = generate(engines("llama", **WIDE), params)
    assert set(sequence.output_ids) == set(allowed)
    assert sequence.finish_reason is FinishReason.LENGTH


def test_something_must_be_allowed_before_the_end(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    for stops in (
        {"allowed_token_ids": (1,)},
        {"allowed_token_ids": (40,), "stop_token_ids": (40,)},
    ):
        engine.make_sequence([5], SamplingParams(**stops))
        with pytest.raises(InvalidRequestError, match="nothing but tokens that end the text"):
            engine.make_sequence([5], SamplingParams(min_tokens=3, **stops))


def test_a_special_token_may_be_a_stop_string(engines: Engines) -> None:
    params = SamplingParams(max_tokens=30, logit_bias={4: 100.0}, stop=("<turn>",), temperature=0)
    sequence = generate(engines("llama", **WIDE), params)
    assert (sequence.output_ids, sequence.stop_reason) == ([4], "<turn>")


def test_bad_words_never_appear(engines: Engines) -> None:
    """Of one token and of several, at the start and behind a space."""
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=200, temperature=1, seed=3, ignore_eos=True)
    free = text_of(engine, params)
    letters, pairs = re.findall("[!-~]", free), re.findall("[!-~]{2}", free)
    words = (letters[0], letters[5], *pairs[:3])
    banned = text_of(engine, replace(params, bad_words=words))
    assert not any(word in banned for word in words)
    assert len(banned) > 50
    assert len(words) == 5


def test_min_tokens_hold_back_every_kind_of_end(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=30, temperature=0)
    free = generate(engine, replace(params, ignore_eos=True)).output_ids
    ends = {"stop_token_ids": (free[2],)}
    assert generate(engine, replace(params, **ends)).output_ids == free[:3]
    later = generate(engine, replace(params, min_tokens=12, **ends))
    assert later.num_output_tokens > 12
    assert free[2] not in later.output_ids[:12]
    text = text_of(engine, replace(params, ignore_eos=True))
    stop = next(char for char in text if text.count(char) > 1)
    short = text_of(engine, replace(params, ignore_eos=True, stop=(stop,)))
    long = text_of(engine, replace(params, ignore_eos=True, stop=(stop,), min_tokens=12))
    assert short == text[: text.index(stop)]
    assert len(short) < len(long)
    assert text.startswith(long)


def test_stops_say_what_they_were(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=60, temperature=1, seed=5, ignore_eos=True)
    whole = next(iter(engine.generate([prompt_of(9)], params)))
    assert whole.text is not None
    stop = whole.text[20:23]
    by_text = next(iter(engine.generate([prompt_of(9)], replace(params, stop=("@@@", stop)))))
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", stop)
    assert by_text.text == whole.text[: whole.text.index(stop)]
    shown = replace(params, stop=(stop,), include_stop_str_in_output=True)
    assert text_of(engine, shown) == by_text.text + stop
    token = whole.token_ids[20]
    by_token = next(iter(engine.generate([prompt_of(9)], replace(params, stop_token_ids=(token,)))))
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    assert by_token.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert whole.text.startswith(by_token.text or "?")
    assert len(by_token.text or "") < len(by_token.token_ids)


def test_logprobs_are_the_verifiers_own(engines: Engines, tiny: TinyModels) -> None:
    """Not those after temperature, bias and filters; accepted drafts have theirs too."""
    engine = engines("llama", **WIDE)
    params = SamplingParams(
        max_tokens=24, temperature=0.7, top_k=5, seed=2, logit_bias={30: 4.0}, logprobs=4
    )
    params = replace(params, ignore_eos=True)
    for drafter in ("none", "ngram"):
        output = next(iter(engine.generate([prompt_of(9)], params, drafter=drafter)))
        ids = torch.tensor([[*prompt_of(9), *output.token_ids]], device=DEVICE)
        with torch.inference_mode():
            rows = tiny.reference("llama")(ids).logits[0, 8:-1].log_softmax(dim=-1)
        assert len(output.logprobs) == 24
        for row, token_id, found in zip(rows, output.token_ids, output.logprobs, strict=True):
            assert found.token_id == token_id
            assert found.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
            assert found.rank == 1 + int((row > row[token_id]).sum())
            top = row.topk(4)
            assert [token for token, _ in found.top] == top.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_text_matches(engines: Engines, guide: Guide, temperature: float) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=4, guide=guide)
    output = next(iter(engine.generate([prompt_of(9)], params)))
    assert output.text is not None
    assert output.error is None
    if output.finish_reason == "length":
        assert guide.kind in ("json_object", "grammar")
        return
    if guide.kind == "json":
        assert set(json.loads(output.text)) == {"name", "ready"}
    elif guide.kind == "json_object":
        assert isinstance(json.loads(output.text), dict)
    elif guide.kind == "choice":
        assert output.text in guide.choices
    else:
        patterns = [r"[a-c]{3}-\d{1,4}!", r"sum=\d{1,3}(\+\d{1,3})*", r"(ab|cd)+\."]
        assert any(re.fullmatch(pattern, output.text) for pattern in patterns)


def test_forced_tokens_are_drafted_without_a_drafter(engines: Engines) -> None:
    """A choice of one text: every token but the first pass's is a draft, and all are accepted."""
    engine = engines("llama", **WIDE)
    guide = Guide("choice", choices=("the only possible answer",))
    params = SamplingParams(max_tokens=60, temperature=1, seed=0, guide=guide)
    sequence = engine.make_sequence(prompt_of(9), params, drafter="ngram")
    run(engine, [sequence])
    assert sequence.num_accepted_tokens == sequence.num_draft_tokens > 0
    assert sequence.num_verify_steps <= 2 + 24 // (MAX_LOOKAHEAD + 1)
    assert sequence.finish_reason is FinishReason.STOP
    off = engine.make_sequence(prompt_of(9), params, num_speculative_tokens=0)
    run(engine, [off])
    assert off.output_ids == sequence.output_ids
    assert off.num_draft_tokens == 0


def test_a_dead_end_ends_that_request_only(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=20, temperature=1, seed=1)
    impossible = replace(params, guide=Guide("regex", "a{5}"), bad_words=("a",))
    sequences = [engine.make_sequence(prompt_of(9), each) for each in (params, impossible)]
    for sequence in sequences:
        engine.add(sequence)
    finish(engine)
    assert sequences[0].error is None
    assert isinstance(sequences[1].error, InvalidRequestError)
    assert "leave no token" in str(sequences[1].error)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('start: ("a"|"b") b\nb: b "c"', "no text that matches the guide begins like this one"),
        ('start: ("a"|"b") b\nb: "c" b', "Too many items"),
        ('start: ("a"|"b") b\nb: "c" b | "d"', None),
    ],
)
def test_a_guide_that_comes_to_nothing_later_ends_that_request_only(
    engines: Engines, grammar: str, reason: str | None
) -> None:
    engine = engines("llama", **WIDE)
    params = SamplingParams(max_tokens=12, temperature=1, seed=1)
    [expected] = engine.generate([prompt_of(9)], params)
    guided = replace(params, guide=Guide("grammar", grammar))
    sequences = [engine.make_sequence(prompt_of(9), each) for each in (params, guided)]
    for sequence in sequences:
        engine.add(sequence)
    finish(engine)
    assert sequences[0].output_ids == expected.token_ids
    if reason is None:
        assert sequences[1].error is None
    else:
        assert isinstance(sequences[1].error, InvalidRequestError)
        assert reason in str(sequences[1].error)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Guide("json", "{"), "json can't be used as a guide: "),
        (Guide("json", '{"type": "nothing"}'), "json can't be used as a guide: "),
        (Guide("regex", "(a"), "regex can't be used as a guide: "),
        (Guide("grammar", "start: undefined_rule"), "grammar can't be used as a guide: "),
    ],
)
def test_a_guide_that_is_none_is_refused(engines: Engines, guide: Guide, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engines("llama", **WIDE).make_sequence(prompt_of(9), SamplingParams(guide=guide))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens, 16, got 17"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100, got 0"),
        ({"presence_penalty": 2.1}, r"presence_penalty .* got 2\.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty .* got nan"),
        ({"logit_bias": {3: 101}}, "logit_bias .* got 101"),
        ({"logit_bias": {-3: 1}}, "a token id .* got -3"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias .* 1024 elements, got 1025"),
        ({"stop": ("x",) * 129}, "stop may hold at most 128 elements, got 129"),
        ({"stop": ("",)}, "stop must hold strings of 1 to 1024 characters, got ''"),
        ({"bad_words": ("x" * 1025,)}, "bad_words must hold strings of 1 to 1024 characters"),
        ({"stop_token_ids": (True,)}, "a token id .* got True"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, got 21"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be true or false"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yaml", "a: b"), "unknown kind of guide 'yaml'; known: json, "),
        (("regex", ""), "regex must have from 1 to 131072 characters, got 0"),
        (("choice", "", ()), "choice must hold at least one string"),
    ],
)
def test_bad_guides_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Guide(*arguments)


def test_token_ids_beyond_the_vocabulary_are_refused(engines: Engines) -> None:
    engine = engines("llama", **WIDE)
    for params in (
        SamplingParams(stop_token_ids=(384,)),
        SamplingParams(logit_bias={384: 1.0}),
        SamplingParams(allowed_token_ids=(384,)),
    ):
        with pytest.raises(InvalidRequestError, match="must be whole numbers below 384, got 384"):
            engine.make_sequence(prompt_of(9), params)
