"""Every input and parameter of a request, through the real server."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from typing import Any

import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from stream import TIMEOUT, metric, wait_until
from tandem import Engine, Guide
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer
from tensors import COMMON, PROMPT, ask, declared, offline, tensors, text_of

LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM")


# Input -> its value, and the same for the engine; both change the text of the common request.
SAME_AS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "min_tokens": (
        {"min_tokens": 9, "stop_token_ids": list(range(6, 260, 2))},
        {"min_tokens": 9, "stop_token_ids": tuple(range(6, 260, 2))},
    ),
    "min_length": (
        {"min_length": 9, "stop_token_ids": list(range(6, 260, 2))},
        {"min_tokens": 9, "stop_token_ids": tuple(range(6, 260, 2))},
    ),
    "temperature": ({"temperature": 0.0}, {"temperature": 0.0}),
    "top_k": ({"top_k": 3}, {"top_k": 3}),
    "top_p": ({"top_p": 0.25}, {"top_p": 0.25}),
    "min_p": ({"min_p": 0.5}, {"min_p": 0.5}),
    "repetition_penalty": ({"repetition_penalty": 2.0}, {"repetition_penalty": 2.0}),
    "presence_penalty": ({"presence_penalty": 2.0}, {"presence_penalty": 2.0}),
    "frequency_penalty": ({"frequency_penalty": -2.0}, {"frequency_penalty": -2.0}),
    "stop_words": ({"stop_words": LETTERS}, {"stop": tuple(LETTERS)}),
    "bad_words": ({"bad_words": LETTERS}, {"bad_words": tuple(LETTERS)}),
    "stop_token_ids": (
        {"stop_token_ids": list(range(6, 384, 3))},
        {"stop_token_ids": tuple(range(6, 384, 3))},
    ),
    "end_id": (
        {"end_id": 38, "embedding_bias_words": ["A"], "embedding_bias_weights": [6.0]},
        {"stop_token_ids": (38,), "logit_bias": {38: 6.0}},
    ),
    "embedding_bias_words": (
        {"embedding_bias_words": ["A", "bA"], "embedding_bias_weights": [2.0, 4.0]},
        {"logit_bias": {38: 6.0, 71: 4.0}},
    ),
    "seed": ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
    "random_seed": ({"seed": None, "random_seed": 8}, {"seed": 8}),
    "sampling_parameters": (
        {"sampling_parameters": json.dumps({"top_k": "2", "stop": ["A", "B"]})},
        {"top_k": 2, "stop": ("A", "B")},
    ),
    "guided_decoding_guide": (
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "[a-f]{4}"},
        {"guide": Guide("regex", "[a-f]{4}")},
    ),
    "ignore_eos": (
        {"ignore_eos": True, "sampling_parameters": '{"logit_bias": {"1": 9}}'},
        {"ignore_eos": True, "logit_bias": {1: 9.0}},
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SAME_AS)
def test_an_input_does_what_the_engine_does(
    server: TritonServer, engine: Engine, name: str, stream: bool
) -> None:
    sent, options = SAME_AS[name]
    responses = ask(server, **{**COMMON, "stream": stream, **sent})
    assert text_of(responses) == offline(engine, **options)
    assert text_of(responses) != offline(engine)


def test_the_prompt_may_be_token_ids(server: TritonServer, engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT)["input_ids"]
    responses = ask(server, text_input=None, input_ids=ids, **COMMON)
    assert text_of(responses) == offline(engine)


def test_a_conversation_needs_a_template(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="no chat template; send text_input"):
        ask(server, text_input=None, messages='[{"role": "user", "content": "hi"}]')


def deep(levels: int) -> Any:
    """A list in a list, so many times."""
    return json.loads("[" * levels + "]" * levels)


def test_a_conversation_goes_through_the_template(server: TritonServer, engine: Engine) -> None:
    """Tools are there for it, and what it refuses is a client error."""
    messages = [{"role": "user", "content": "hi"}]
    responses = ask(server, "vllm_format", text_input=None, messages=json.dumps(messages), **COMMON)
    assert text_of(responses) == offline(engine, "<turn>user:hi<end><turn>assistant:")
    tools = json.dumps([{"name": "clock"}])
    responses = ask(
        server, "vllm_format", text_input=None, messages=json.dumps(messages), tools=tools, **COMMON
    )
    expected = offline(engine, "tools: clock<turn>user:hi<end><turn>assistant:")
    assert text_of(responses) == expected
    for wrong, message in (
        ([{"role": "wizard", "content": "hi"}], "refuses these messages: no such role: wizard"),
        ([{"content": "hi"}], "messages must be a list of one or more objects"),
        ({"role": "user"}, "messages must be a list of one or more objects"),
        ([{"role": "user", "content": "\ud800"}], "messages are not valid UTF-8"),
        ([{"role": "user", "content": deep(700)}], "refuses these messages: maximum recursion"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask(server, "vllm_format", text_input=None, messages=json.dumps(wrong))
    with pytest.raises(InferenceServerException, match="messages is not valid JSON"):
        ask(server, "vllm_format", text_input=None, messages="[")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            {"text_input": None, "top_k": 1},
            "exactly one of text_input, input_ids, messages, got none",
        ),
        ({"input_ids": [7, 8]}, "got text_input and input_ids"),
        ({"text_input": None, "input_ids": [7, 999]}, "below 384, got 999"),
        ({"beam_width": 4}, "beam_width must be 1, got 4"),
        ({"return_context_logits": True}, "return_context_logits must be False, got True"),
        ({"return_generation_logits": True}, "return_generation_logits must be False"),
        ({"use_draft_logits": True}, "use_draft_logits must be False"),
        ({"n": 65}, "n must be a whole number from 1 to 64, got 65"),
        ({"embedding_bias_words": ["a"]}, "must have the same length, got 1 and 0"),
        ({"guided_decoding_guide_type": "yaml"}, "guided_decoding_guide_type must be one of json"),
        ({"stop_words": ["a"] * 10000}, "stop may hold at most 128 elements, got 10000"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, got 21"),
    ],
)
def test_what_cannot_be_done_is_refused(
    server: TritonServer, sent: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as refusal:
        ask(server, **sent)
    assert "INTERNAL" not in str(refusal.value)


def test_what_means_nothing_here_changes_nothing(server: TritonServer, engine: Engine) -> None:
    ignored = {
        "pad_id": 0,
        "beam_width": 1,
        "length_penalty": 1.5,
        "early_stopping": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "sampling_parameters": '{"use_beam_search": false, "best_of": 1}',
        "return_context_logits": False,
        "return_generation_logits": False,
        "use_draft_logits": False,
    }
    assert text_of(ask(server, **COMMON, **ignored)) == offline(engine)


def test_drafting_is_up_to_the_request(server: TritonServer, engine: Engine) -> None:
    common = {**COMMON, "temperature": 0.0, "ignore_eos": True}
    expected = offline(engine, temperature=0.0, ignore_eos=True)
    drafted = []
    for options in (
        {"drafter": "none"},
        {"num_speculative_tokens": 0},
        {"num_draft_tokens": 1},
        {"num_speculative_tokens": 4},
    ):
        responses = ask(server, **common, **options)
        assert text_of(responses) == expected
        drafted.append(responses[-1]["total_draft_tokens"][0][0])
    assert drafted[:2] == [0, 0]
    assert 0 < drafted[2] < drafted[3]


@pytest.mark.parametrize("timeout", [400_000])
def test_a_timeout_ends_what_runs(server: TritonServer, timeout: int) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        values = {"text_input": PROMPT, "max_tokens": 15000, "ignore_eos": True}
        started = time.monotonic()
        client.async_stream_infer("tandem", tensors(values), timeout=timeout)
        answer = answers.get(timeout=TIMEOUT)
        assert isinstance(answer, InferenceServerException)
        assert "timeout passed" in str(answer)
        assert time.monotonic() - started < 2
    wait_until(lambda: metric(server, "kv_cache_blocks_used") == 0)


def test_clients_that_send_different_inputs_share_steps(server: TritonServer) -> None:
    """An optional input that only some send must not split the continuous batch."""
    wait_until(lambda: metric(server, "num_requests_running") == 0)
    steps = metric(server, "engine_steps_total")
    extras = [{}, {"top_k": 5}, {"top_p": 0.9}, {"stop_words": ["@@@"]}, {"seed": 1}, {"n": 1}]
    # Long enough that the first is not done before the last has started.
    tokens = 1500
    sent = {"max_tokens": tokens, "ignore_eos": True, "drafter": "none"}
    threads = [
        threading.Thread(target=ask, args=(server,), kwargs={**sent, **extra}) for extra in extras
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metric(server, "engine_steps_total") - steps < len(extras) * tokens / 2


def test_the_vllm_backends_shapes_work_without_a_batch_dimension(
    server: TritonServer, engine: Engine
) -> None:
    """As its sample client sends them: `[1]`, to a model with `max_batch_size: 0`."""
    sampling = json.dumps({"temperature": "1.0", "max_tokens": "24", "seed": "5"})
    responses = ask(server, "vllm_format", stream=True, sampling_parameters=sampling)
    assert text_of(responses) == offline(engine)


def test_guides_over_http(server: TritonServer) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    for guide, pattern in (
        ({"json": schema}, r'\{\s*"ok"\s*:\s*(true|false)\s*\}'),
        ({"regex": "[0-9]{3}"}, r"\d{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "x" | "y"'}, "x|y"),
    ):
        sampling = {"max_tokens": 200, "seed": 1, "structured_outputs": guide}
        body = {"text_input": PROMPT, "sampling_parameters": json.dumps(sampling)}
        url = f"{server.http_url}/v2/models/tandem/generate"
        answer = requests.post(url, json=body, timeout=TIMEOUT).json()
        assert re.fullmatch(pattern, answer["text_output"]), answer


# Options of other servers -> the same for the engine.
OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_completion_tokens": "7"}, {"max_tokens": 7}),
    ({"nvext": {"top_k": 3, "annotations": []}}, {"top_k": 3}),
    ({"greed_sampling": True}, {"temperature": 0.0}),
    ({"guided_regex": "[a-f]{4}"}, {"guide": Guide("regex", "[a-f]{4}")}),
    ({"guided_choice": ["left", "right"]}, {"guide": Guide("choice", choices=("left", "right"))}),
    ({"seed": -1}, {"seed": 2**64 - 1}),
    ({"top_p": 0, "random_seed": 0, "stop": "", "bad_words": [""], "n": None}, {}),
    ({"allowed_token_ids": [38, 39, "40"]}, {"allowed_token_ids": (38, 39, 40)}),
    ({"logit_bias": {"4": 6}, "stop": "<turn>"}, {"logit_bias": {4: 6.0}, "stop": ("<turn>",)}),
    (
        {"logit_bias": {"4": 9}, "skip_special_tokens": False},
        {"logit_bias": {4: 9.0}, "skip_special_tokens": False},
    ),
]


@pytest.mark.parametrize(("sent", "options"), OTHERS)
def test_others_words_mean_the_same(
    server: TritonServer, engine: Engine, sent: dict[str, Any], options: dict[str, Any]
) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 24, "seed": 5} | sent
    if "max_completion_tokens" in sent:
        del sampling["max_tokens"]
    responses = ask(server, sampling_parameters=json.dumps(sampling))
    assert text_of(responses) == offline(engine, **options)


def test_a_prompt_may_be_cut_and_read_as_it_is(server: TritonServer, engine: Engine) -> None:
    """Of "one two three", the last five characters."""
    sampling = json.dumps({"truncate_prompt_tokens": 5, "add_special_tokens": False})
    for prompt in ({}, {"text_input": None, "input_ids": engine.tokenizer(PROMPT)["input_ids"]}):
        responses = ask(server, sampling_parameters=sampling, **prompt, **COMMON)
        assert text_of(responses) == offline(engine, "three")
        assert responses[0]["num_input_tokens"][0] == [5] or responses[0]["num_input_tokens"] == [5]


def test_a_conversation_may_go_on(server: TritonServer, engine: Engine) -> None:
    """Its last message is continued, or no answer is begun."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hel"}]
    for sampling, prompt in (
        ({"continue_final_message": True}, "<turn>user:hi<end><turn>assistant:hel"),
        ({"add_generation_prompt": False}, "<turn>user:hi<end><turn>assistant:hel<end>"),
    ):
        responses = ask(
            server,
            "vllm_format",
            text_input=None,
            messages=json.dumps(messages),
            sampling_parameters=json.dumps(sampling),
            **COMMON,
        )
        assert text_of(responses) == offline(engine, prompt)


def test_a_conversation_ends_at_its_end_of_turn(server: TritonServer) -> None:
    """Which the template has behind answers, and no configuration names."""
    sampling = json.dumps({"logit_bias": {"5": 100, "2": 90}, "temperature": 0, "max_tokens": 8})
    messages = json.dumps([{"role": "user", "content": "hi"}])
    sent = {"text_input": None, "messages": messages, "sampling_parameters": sampling}
    (response,) = ask(server, "vllm_format", **sent)
    assert (response["finish_reason"], response["num_output_tokens"]) == ([b"stop"], [1])
    (response,) = ask(server, "vllm_format", ignore_eos=True, **sent)
    assert (response["finish_reason"], response["num_output_tokens"]) == ([b"length"], [8])


def test_unknown_options_are_ignored_and_logged_once(server: TritonServer, engine: Engine) -> None:
    sampling = json.dumps({"temprature": 9, "nvext": {"heat": 1}})
    for _ in range(2):
        responses = ask(server, sampling_parameters=sampling, **COMMON)
        assert text_of(responses) == offline(engine)
    log = server.log_file.read_text()
    for name in ("temprature", "nvext.heat"):
        assert log.count(f"the unknown option '{name}'") == 1


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"use_beam_search": True}, "use_beam_search must be False, got True: there is no beam"),
        ({"best_of": 3, "n": 2}, "best_of must be n, which is 2, got 3"),
        ({"suffix": "x"}, "suffix must be left out, got 'x'"),
        ({"allowed_token_ids": [384]}, "allowed_token_ids must be whole numbers below 384"),
        ({"stop_token_ids": [99999999999]}, "stop_token_ids must be a whole number from 0"),
        ({"logit_bias": {"-1": 1}}, "logit_bias must be a whole number from 0"),
        ({"bad_words": ["\ud800"]}, "bad_words must be a list of strings"),
        ({"guided_regex": "a", "guided_json": {}}, "only one guide can hold, got guided_json and"),
        ({"guided_grammar": "root ::="}, "only the empty text matches it"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be a whole number from 1"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message can't both be true",
        ),
    ],
)
def test_what_others_ask_for_and_cannot_be_done_is_refused(
    server: TritonServer, sent: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as refusal:
        ask(server, sampling_parameters=json.dumps(sent))
    assert "INVALID_ARG" in str(refusal.value)


def test_a_prompt_that_is_too_long_is_refused_in_known_words(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="maximum context length is 16000 tokens"):
        ask(server, text_input="x" * 16_000)


def test_the_documentation_lists_every_output() -> None:
    """Inputs are compared in tests/docs."""
    text = (ROOT / "docs/requests.md").read_text()
    section = text[text.index("## Outputs") :]
    section = section[: section.index("\n## ")]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(declared("output"))
