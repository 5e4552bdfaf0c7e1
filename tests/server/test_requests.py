"""Every input, parameter and output of a request, through the real server."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
from stream import TIMEOUT, metric, wait_until
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from tandem import Engine, Guide, SamplingParams
from tandem.options import NAMES
from triton_runtime import ROOT
from triton_server import TritonServer

pytestmark = pytest.mark.server

PROMPT = "one two three"
COMMON: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "seed": 5}
README = ROOT / "README.md"


def tensors(values: dict[str, Any], *, batch: bool = True) -> list[Any]:
    """Values as the tensors that the model's configuration declares, `[1, n]` or `[n]`."""
    made = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(items[0], str):
            items = [item.encode() for item in items]
        array = np.array(items, dtype=KINDS[name])
        array = array[np.newaxis] if batch else array
        tensor = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def declared(section: str) -> dict[str, Any]:
    """Name -> numpy type of the inputs or outputs in config.pbtxt."""
    text = (ROOT / "model_repository/tandem/config.pbtxt").read_text()
    block = re.search(rf"^{section} \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    found = re.findall(r'name: "(\w+)", data_type: TYPE_(\w+)', block[1])
    return {name: triton_to_np_dtype("BYTES" if kind == "STRING" else kind) for name, kind in found}


KINDS = declared("input")


def ask(server: TritonServer, model: str = "tandem", **values: Any) -> list[dict[str, Any]]:
    """All responses to a request of tensors, each as name -> list of values."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        values = {"text_input": PROMPT, **values} if "text_input" not in values else values
        values = {name: value for name, value in values.items() if value is not None}
        batch = model != "vllm_format"
        client.async_stream_infer(
            model, tensors(values, batch=batch), enable_empty_final_response=True
        )
        responses = []
        while True:
            answer = answers.get(timeout=TIMEOUT)
            if isinstance(answer, InferenceServerException):
                raise answer
            message = answer.get_response()
            if message.outputs:
                names = [output.name for output in message.outputs]
                responses.append({name: answer.as_numpy(name).tolist() for name in names})
            if message.parameters["triton_final_response"].bool_param:
                return responses


def text_of(responses: list[dict[str, Any]]) -> str:
    return b"".join(response["text_output"][0] for response in responses).decode()


def offline(engine: Engine, prompt: str | list[int] = PROMPT, **options: Any) -> str:
    params = SamplingParams(**{**COMMON, **options})
    output = next(engine.generate([prompt], params, drafter="none"))
    assert output.text is not None
    return output.text


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
        ([{"content": "hi"}], "messages must be a list of objects"),
        ({"role": "user"}, "messages must be a list of objects"),
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


def documented() -> Iterator[str]:
    """The names in the first column of the README's tables of a request."""
    text = README.read_text()
    section = text[text.index("## Requests") : text.index("## Metrics")]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`(\w+)`", line.split("|")[1])


def test_the_readme_lists_what_there_is() -> None:
    expected = {*KINDS, *declared("output"), *NAMES}
    assert sorted(set(documented())) == sorted(expected)


def test_the_readme_lists_the_metrics(server: TritonServer) -> None:
    ask(server, **{**COMMON, "ignore_eos": True, "temperature": 0.0, "max_tokens": 60})
    with pytest.raises(InferenceServerException):
        ask(server, top_p=2.0)
    text = README.read_text()
    section = text[text.index("## Metrics") : text.index("## Configuration")]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    expected = {
        name: set(re.findall(r"`(\w+)`", labels))
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }

    def shown() -> dict[str, set[str]]:
        page = requests.get(server.metrics_url, timeout=TIMEOUT).text
        found: dict[str, set[str]] = {}
        for name, labels in re.findall(r"^tandem:(\w+){(.*)}", page, re.MULTILINE):
            if 'model="tandem"' in labels:
                name = re.sub("_(bucket|sum|count)$", "", name)
                others = set(re.findall(r'(\w+)="', labels)) - {"model", "version", "le"}
                found[name] = others
        return found

    # There once a minute has shown that speculation gains little.
    wait_until(
        lambda: {n: v for n, v in shown().items() if n != "spec_decode_low_gain"} == expected
    )


def test_latencies_are_counted_by_request(server: TritonServer) -> None:
    names = ("time_to_first_token", "request_queue_time", "e2e_request_latency")

    def counts() -> list[float]:
        return [metric(server, f"{name}_seconds_count") for name in names]

    before = counts()
    ask(server, n=2, **COMMON)
    # Those of requests before it may still come in.
    wait_until(lambda: all(n >= old + 2 for n, old in zip(counts(), before, strict=True)))
    wait_until(lambda: metric(server, "step_seconds_total") > 0)
    page = requests.get(server.metrics_url, timeout=TIMEOUT).text
    phases = re.findall(r'^tandem:step_seconds_total{model="tandem",phase="(\w+)"', page, re.M)
    assert set(phases) == {"schedule", "draft", "verify", "accept", "commit"}
