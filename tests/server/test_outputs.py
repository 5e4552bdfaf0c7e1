"""Every output of a request, through the real server."""

from __future__ import annotations

import json
import re

import pytest

from stream import TIMEOUT, metric, wait_until
from tandem import Engine, SamplingParams
from tandem_runtime.server import TritonServer
from tensors import COMMON, PROMPT, ask, declared, offline, text_of


def test_the_prompt_comes_back_on_request(server: TritonServer, engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT)["input_ids"]
    expected = PROMPT + offline(engine)
    for prompt in ({}, {"text_input": None, "input_ids": ids}):
        for stream in (False, True):
            responses = ask(
                server, exclude_input_in_output=False, stream=stream, **prompt, **COMMON
            )
            assert text_of(responses) == expected


@pytest.mark.parametrize("name", ["n", "num_return_sequences"])
@pytest.mark.parametrize("stream", [False, True])
def test_several_sequences(server: TritonServer, engine: Engine, name: str, stream: bool) -> None:
    """Sequence i is that of the seed `seed + i`."""
    responses = ask(server, stream=stream, **{name: 3}, **{**COMMON, "seed": 2**64 - 1})
    texts = {0: "", 1: "", 2: ""}
    seeds = {}
    for response in responses:
        for place, (index,) in enumerate(response["sequence_index"]):
            texts[index] += response["text_output"][place].decode()
            if response["finish_reason"][place]:
                seeds[index] = response["seed"][place]
    assert seeds == {0: 2**64 - 1, 1: 0, 2: 1}
    assert texts == {index: offline(engine, seed=seed) for index, seed in seeds.items()}
    assert len(responses) == 1 or stream


@pytest.mark.parametrize("stream", [False, True])
def test_the_outputs_agree_with_each_other(
    server: TritonServer, engine: Engine, stream: bool
) -> None:
    sent = {**COMMON, "temperature": 0.0, "ignore_eos": True, "max_tokens": 40}
    responses = ask(server, stream=stream, logprobs=2, return_token_ids=True, **sent)
    last = responses[-1]
    ids = [token for response in responses for token in response["output_ids"][0]]
    drafts = [flag for response in responses for flag in response["is_accepted_draft"][0]]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
    output = next(engine.generate([PROMPT], params, drafter="none"))
    assert ids == output.token_ids
    assert sum(drafts) == last["total_accepted_draft_tokens"][0][0] > 0
    rate = last["total_accepted_draft_tokens"][0][0] / last["total_draft_tokens"][0][0]
    assert last["acceptance_rate"][0][0] == pytest.approx(rate)
    sums = {
        name: sum(response[name][0] for response in responses)
        for name in ("num_output_tokens", "num_draft_tokens", "num_accepted_tokens", "num_drafts")
    }
    assert sums["num_output_tokens"] == 40
    assert sums["num_draft_tokens"] == last["total_draft_tokens"][0][0]
    assert sums["num_accepted_tokens"] == sum(drafts)
    assert 0 < sums["num_drafts"] < 40
    (histogram,) = last["acceptance_histogram"]
    assert len(histogram) == 1 + 4  # as many as the drafter guesses, and none
    assert sum(histogram) == sums["num_drafts"]
    accepted = sum(number * count for number, count in enumerate(histogram))
    assert accepted == sums["num_accepted_tokens"]
    assert last["num_input_tokens"] == [len(PROMPT)]
    assert last["finish_reason"] == [b"length"]
    assert last["stop_reason"] == [b""]
    assert 0 < last["time_to_first_token"][0] < last["total_time"][0] < TIMEOUT
    entries = [entry for response in responses for entry in json.loads(response["logprobs"][0])]
    for entry, found in zip(entries, output.logprobs, strict=True):
        (token_id, chosen), *_ = entry.items()
        assert int(token_id) == found.token_id
        assert chosen["logprob"] == pytest.approx(found.logprob, abs=1e-4)
        assert chosen["rank"] == found.rank
        assert chosen["decoded_token"] == engine.tokenizer.decode([found.token_id])
        assert {int(token) for token in entry} == {token_id for token_id, _ in found.top}
    values = [value for response in responses for value in response["output_log_probs"][0]]
    assert values == pytest.approx([found.logprob for found in output.logprobs], abs=1e-4)
    assert last["cumulative_logprob"][0] == pytest.approx(sum(values), abs=1e-3)
    assert last["cum_log_probs"] == last["cumulative_logprob"]


def test_times_and_blocks_on_request(server: TritonServer) -> None:
    names = [name for name in declared("output") if name.endswith("_time_ns")]
    values = {**COMMON, "text_input": 4 * PROMPT, "max_tokens": 600, "ignore_eos": True}
    (response,) = ask(server, **values)
    assert not set(names) & set(response)
    *others, response = ask(server, return_perf_metrics=True, stream=True, **values)
    assert others
    assert all(set(names) <= set(other) for other in others)
    times = [response[name][0][0] for name in names]
    assert len(times) == 4
    assert times == sorted(times)
    num_tokens = response["num_input_tokens"][0]
    num_tokens += sum(each["num_output_tokens"][0] for each in (*others, response))
    assert response["kv_cache_alloc_total_blocks"] == [[-(-num_tokens // 16)]]
    # The same prompt has been asked before.
    num_reused = (response["num_input_tokens"][0] - 1) // 16
    assert response["kv_cache_reused_blocks"] == [[num_reused]]
    assert response["num_cached_tokens"] == [16 * num_reused]
    (total,) = response["kv_cache_alloc_total_blocks"][0]
    assert response["kv_cache_alloc_new_blocks"] == [[total - num_reused]]


def test_the_prefix_cache_is_counted_and_kept_apart_by_salt(server: TritonServer) -> None:
    values = {**COMMON, "text_input": "a prefix that nobody else has, in 52 characters ...."}
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    before = [metric(server, name) for name in names]
    found = [
        ask(server, sampling_parameters=json.dumps(salt), **values)[0]["num_cached_tokens"]
        for salt in ({}, {"cache_salt": "mine"}, {"cache_salt": "mine"}, {})
    ]
    assert found == [[0], [0], [48], [48]]
    expected = [before[0] + 4 * 52, before[1] + 2 * 48]
    wait_until(lambda: [metric(server, name) for name in names] == expected)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored(server: TritonServer, engine: Engine, stream: bool) -> None:
    """The log probabilities of its tokens, without any of an answer; with the first response."""
    ids = engine.tokenizer(PROMPT)["input_ids"]
    sent = {"sampling_parameters": json.dumps({"prompt_logprobs": 2}), "stream": stream}
    (output,) = engine.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=2))
    for limit in (0, 12):
        responses = ask(server, **{**COMMON, "max_tokens": limit}, **sent)
        assert sum(response["num_output_tokens"][0] for response in responses) == limit
        assert responses[-1]["finish_reason"] == [b"length"]
        assert text_of(responses) == (offline(engine, max_tokens=limit) if limit else "")
        assert ["prompt_logprobs" in each for each in responses] == [
            number == 0 for number, _ in enumerate(responses)
        ]
        first, *others = json.loads(responses[0]["prompt_logprobs"][0])
        assert next(iter(first.values()))["logprob"] is None
        for entry, found in zip(others, output.prompt_logprobs, strict=True):
            (token_id, chosen), *_ = entry.items()
            assert int(token_id) == found.token_id
            assert chosen["logprob"] == pytest.approx(found.logprob, abs=1e-4)
            assert {int(each) for each in entry} == {found.token_id, *dict(found.top)}


def test_logprobs_by_their_other_names(server: TritonServer) -> None:
    for name in ("return_logprobs", "return_log_probs", "return_cumulative_logprob"):
        (response,) = ask(server, **{name: True}, **COMMON)
        entries = json.loads(response["logprobs"][0])
        assert len(entries) == response["num_output_tokens"][0]
        assert all(len(entry) == 1 for entry in entries)


def test_a_seed_is_drawn_and_can_be_used_again(server: TritonServer) -> None:
    sent = {"temperature": 1.0, "max_tokens": 24}
    first = ask(server, **sent)
    again = ask(server, seed=first[-1]["seed"][0], **sent)
    assert text_of(again) == text_of(first)
    assert ask(server, **sent)[-1]["seed"] != first[-1]["seed"]


def test_a_stop_says_what_it_was(server: TritonServer, engine: Engine) -> None:
    text = offline(engine, max_tokens=40)
    stop = re.findall("[!-~]", text)[2]
    for stream in (False, True):
        responses = ask(
            server, stream=stream, **{**COMMON, "max_tokens": 40, "stop_words": ["@@", stop]}
        )
        assert responses[-1]["stop_reason"] == [stop.encode()]
        assert responses[-1]["finish_reason"] == [b"stop"]
        assert text_of(responses) == text[: text.index(stop)]
