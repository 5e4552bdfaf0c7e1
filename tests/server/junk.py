"""Requests of which most are wrong in some way, for each door: tensors, HTTP, and the gateway.

They hold what the tables of names below say, so most get far before they are refused, and some are
right. Texts are short and answers too: what is long is the work of others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from tandem_gateway.schema import ChatCompletionRequest, CompletionRequest
from tandem_options import ALIASES, NAMES, OPTIONS, Fate, Option
from tensors import KINDS

Values = st.SearchStrategy[Any]


@dataclass(frozen=True)
class Letter:
    """A request as it goes over the wire.

    Attributes:
        door: "grpc", a verb of Triton's HTTP, or a path of the gateway.
        is_spoilt: whether its bytes were changed after it was made.
    """

    door: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    is_spoilt: bool = False


# --- values

TEXTS = st.text(max_size=12)
PROMPTS = TEXTS.map("a".__add__)
TOKENS = st.integers(0, 383)
JSON_VALUES: Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
_ODD = [-1, 0, 65, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e300, float("nan"), float("-inf")]
_ODD_TEXTS = [
    "",
    "\x00",
    "\ud800",
    "[",
    "[" * 2000,
    "{" * 2000,
    "NaN",
    "1e999",
    "-0",
    "true",
    " 7 ",
]
JUNK: Values = st.one_of(
    st.sampled_from(_ODD),
    st.sampled_from([*_ODD_TEXTS, "x" * 20_000, "\N{GRINNING FACE}" * 400]),
    st.sampled_from([None, [], {}, [None], [[]], [[1, 2], [3]], {"": {}}, ["x"] * 2000]),
    JSON_VALUES,
)

# --- guides

_SCHEMAS: Values = st.recursive(
    st.sampled_from(
        [
            {"type": "string", "maxLength": 3},
            {"type": "integer", "minimum": 5, "maximum": 4},
            {"const": "a"},
            {"enum": []},
            {"$ref": "#"},
            {"$ref": "#/$defs/nowhere"},
            {"pattern": "("},
            {"type": 7},
            True,
            False,
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda schema: {"type": "array", "items": schema, "maxItems": 2}),
        st.lists(inner, max_size=3).map(lambda schemas: {"anyOf": schemas}),
        st.lists(inner, max_size=2).map(lambda schemas: {"allOf": schemas}),
        st.dictionaries(TEXTS, inner, max_size=2).map(
            lambda schemas: {"type": "object", "properties": schemas, "required": list(schemas)}
        ),
    ),
    max_leaves=5,
)
GUIDES: Values = st.one_of(
    st.sampled_from(
        [
            {"json_object": True},
            {"regex": "[a-f]{4}"},
            {"choice": ["yes", "no"]},
            {"grammar": 'start: "a" start | "b"\n'},
            {"grammar": 'root ::= "a" root | "b"\n'},
            {"json": {"type": "object"}, "regex": "a"},
        ]
    ),
    _SCHEMAS.map(lambda schema: {"json": schema}),
    st.text("()[]{}|*+?.^$\\ab1-,", max_size=12).map(lambda text: {"regex": text}),
    st.text('ab"|:=~ \n()[]*+?/startT0', max_size=30).map(lambda text: {"grammar": text}),
    st.lists(TEXTS, max_size=3).map(lambda texts: {"choice": texts}),
    st.dictionaries(st.sampled_from(["json", "regex", "grammar", "choice", "a"]), JUNK, max_size=2),
)

# --- options by name, with values that are allowed, most of them

_COUNTS = st.integers(1, 6)
_DRAFTS = st.integers(0, 4)
_SHARES = st.floats(0.05, 1.0)
_PENALTIES = st.floats(-2.0, 2.0)
_WORDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3)
_SEEDS = st.integers(0, 2**64 - 1)
_OPTIONS: dict[str, Values] = {
    "max_tokens": _COUNTS,
    "min_tokens": st.integers(0, 3),
    "min_length": st.integers(0, 3),
    "temperature": st.floats(0.0, 3.0),
    "top_k": st.integers(-1, 400),
    "top_p": _SHARES,
    "min_p": _SHARES,
    "repetition_penalty": st.floats(0.5, 2.0),
    "presence_penalty": _PENALTIES,
    "frequency_penalty": _PENALTIES,
    "logit_bias": st.dictionaries(TOKENS.map(str), st.floats(-100, 100), max_size=4),
    "bad_words": _WORDS,
    "stop": _WORDS,
    "stop_words": _WORDS,
    "stop_token_ids": st.lists(TOKENS, min_size=1, max_size=4),
    "end_id": st.integers(-1, 383),
    "seed": _SEEDS,
    "random_seed": _SEEDS,
    "logprobs": st.integers(0, 20),
    "n": st.integers(1, 3),
    "num_return_sequences": st.integers(1, 3),
    "drafter": st.sampled_from(["none", "ngram"]),
    "num_speculative_tokens": _DRAFTS,
    "num_draft_tokens": _DRAFTS,
    "cache_salt": TEXTS,
    "embedding_bias_words": _WORDS,
    "embedding_bias_weights": st.lists(_PENALTIES, min_size=1, max_size=3),
    "structured_outputs": GUIDES,
    "guided_decoding": GUIDES,
    "guided_json": _SCHEMAS,
    "guided_decoding_guide_type": st.sampled_from(["json", "json_schema", "regex", "ebnf_grammar"]),
    "guided_decoding_guide": st.sampled_from(["[a-c]{3}", "{}", "(", 'root ::= "a"']),
    "length_penalty": _PENALTIES,
    "best_of": _COUNTS,
    "pad_id": TOKENS,
}
_BY_KIND: dict[str, Values] = {
    "any": JSON_VALUES,
    "bool": st.booleans(),
    "int": _COUNTS,
    "str": TEXTS,
    "strings": _WORDS,
    "ints": st.lists(TOKENS, min_size=1, max_size=4),
    "object": st.dictionaries(TEXTS, JSON_VALUES, max_size=2),
}


def _values(option: Option) -> Values:
    if option.fate is Fate.NOTHING and option.nothing:
        return st.sampled_from(option.nothing)
    return _BY_KIND.get(option.kind, JSON_VALUES)


_OPTIONS |= {
    name: _values(OPTIONS[canonical]) for name, canonical in ALIASES.items() if name not in _OPTIONS
}


def _pairs(table: Mapping[str, Values]) -> Values:
    """(name, value) of the table."""
    return st.one_of(
        *(values.map(lambda value, name=name: (name, value)) for name, values in table.items())
    )


def _mixed(table: Mapping[str, Values]) -> Values:
    """Objects of a few values that are allowed, and perhaps one of another kind or name."""
    junk = st.tuples(st.sampled_from(sorted(table)) | TEXTS, JUNK)
    few = st.lists(_pairs(table), max_size=4)
    with_junk = st.tuples(few, junk).map(lambda each: [*each[0], each[1]])
    return st.one_of(few, few, with_junk).map(dict)


OPTIONS = _mixed(_OPTIONS)
MESSAGES: Values = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "wizard"]), "content": TEXTS},
        optional={"name": JUNK},
    )
    | st.dictionaries(st.sampled_from(["role", "content", "type"]), JUNK, max_size=3),
    max_size=3,
)


@st.composite
def _spoilt(draw: st.DrawFn, body: bytes) -> bytes:
    """The body, with a piece of it replaced, or left out."""
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 8)))
    return body[:start] + draw(st.binary(max_size=4)) + body[end:]


_HEADERS: Values = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["text/plain", "application/json", "x"]),
        "Content-Encoding": st.sampled_from(["gzip", "deflate", "x"]),
        "Inference-Header-Content-Length": st.sampled_from(["-1", "7", "99999", "x"]),
    },
)


@st.composite
def _letters(draw: st.DrawFn, doors: Sequence[str], bodies: st.SearchStrategy[bytes]) -> Letter:
    """For any of the doors; most are as they were made."""
    door = draw(st.sampled_from(doors))
    match draw(st.integers(0, 19)):
        case 0 | 1:
            return Letter(door, draw(_spoilt(draw(bodies))), is_spoilt=True)
        case 2:
            return Letter(door, draw(st.binary(max_size=60)), is_spoilt=True)
        case 3:
            return Letter(door, draw(bodies), draw(_HEADERS), is_spoilt=True)
        case 4:
            return Letter(door, _to_json(draw(JSON_VALUES)))
        case _:
            return Letter(door, draw(bodies))


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- Triton, HTTP

_SAMPLING = st.one_of(OPTIONS.map(json.dumps), OPTIONS.map(json.dumps), JUNK)
_PROMPTS = st.one_of(
    st.fixed_dictionaries({"text_input": PROMPTS}),
    st.fixed_dictionaries({"text_input": PROMPTS}),
    st.fixed_dictionaries({"input_ids": st.lists(TOKENS, min_size=1, max_size=9)}),
    st.fixed_dictionaries({"messages": MESSAGES.map(json.dumps)}, optional={"tools": JUNK}),
    st.dictionaries(st.sampled_from(["text_input", "input_ids", "messages"]), JUNK, max_size=2),
)
_BODIES = st.one_of(
    st.tuples(_PROMPTS, OPTIONS).map(lambda each: each[0] | each[1]),
    st.tuples(_PROMPTS, _SAMPLING).map(lambda each: each[0] | {"sampling_parameters": each[1]}),
    st.tuples(_PROMPTS, st.fixed_dictionaries({}, optional={"id": JUNK, "timeout": JUNK})).map(
        lambda each: each[0] | each[1]
    ),
).map(_to_json)
_INFER = st.fixed_dictionaries(
    {
        "inputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from([*KINDS, "nope"]), "shape": JUNK | st.just([1, 1])},
                optional={
                    "datatype": st.sampled_from(["BYTES", "INT32", "FP32", "BOOL"]) | JUNK,
                    "data": JUNK,
                    "parameters": JSON_VALUES,
                },
            ),
            max_size=3,
        )
    },
    optional={"id": JUNK, "parameters": JUNK, "outputs": JUNK},
).map(_to_json)

# --- Triton, gRPC

_SHAPES = st.one_of(
    st.sampled_from([[], [0], [1], [1, 0], [1, 1], [2, 2], [9, 1], [1, 1, 1], [-1], [1, -1]]),
    st.sampled_from([[1, 2**31], [2**62, 4], [1] * 40]),
)
_KINDS_OF_DATA = ["BOOL", "BYTES", "INT32", "INT64", "UINT64", "FP32", "FP16", "BF16", "", "JUNK"]
_PARAMETERS = {
    "bool_param": st.booleans(),
    "int64_param": st.integers(-(2**63), 2**63 - 1),
    "string_param": TEXTS | st.sampled_from(["7", "[1]", '{"a":1}']),
    "double_param": st.floats(),
    "uint64_param": _SEEDS,
}
_TENSOR_VALUES: dict[str, Values] = {
    **{name: values for name, values in _OPTIONS.items() if name in KINDS},
    "text_input": PROMPTS,
    "input_ids": st.lists(TOKENS, min_size=1, max_size=9),
    "messages": MESSAGES.map(json.dumps),
    "tools": JSON_VALUES.map(json.dumps),
    "sampling_parameters": OPTIONS.map(json.dumps),
}


@dataclass
class _Tensor:
    name: str
    datatype: str
    shape: list[int]
    content: bytes


@st.composite
def _tensors(draw: st.DrawFn, name: str, *, is_right: bool) -> _Tensor:
    """An input as it is declared, or with one thing wrong about it."""
    value = draw(_TENSOR_VALUES.get(name, TEXTS))
    items = value if isinstance(value, list) else [value]
    items = [item.encode(errors="replace") if isinstance(item, str) else item for item in items]
    array = np.array([items], dtype=KINDS.get(name, np.object_))
    is_text = array.dtype == np.object_
    content = serialize_byte_tensor(array).item() if is_text else array.tobytes()
    tensor = _Tensor(name, np_to_triton_dtype(array.dtype), list(array.shape), content)
    if is_right:
        return tensor
    match draw(st.sampled_from(["name", "datatype", "shape", "content"])):
        case "name":
            tensor.name = draw(st.sampled_from(["nope", ""]))
        case "datatype":
            tensor.datatype = draw(st.sampled_from(_KINDS_OF_DATA))
        case "shape":
            tensor.shape = draw(_SHAPES)
        case "content":
            tensor.content = draw(st.binary(max_size=24) | _spoilt(content))
    return tensor


@st.composite
def _grpc_bodies(draw: st.DrawFn) -> bytes:
    names = draw(st.lists(st.sampled_from(sorted(_TENSOR_VALUES)), max_size=4, unique=True))
    prompt = draw(st.sampled_from(["text_input", "text_input", "input_ids", "messages"]))
    wrong = draw(st.sampled_from([None, None, *names, prompt]))
    model = draw(st.sampled_from(["tandem"] * 6 + ["vllm_format", "short_queue", "nope"]))
    request = service_pb2.ModelInferRequest(model_name=model)
    request.model_version = draw(st.sampled_from(["", "", "", "1", "7", "x"]))
    request.id = draw(TEXTS)
    for name in dict.fromkeys([prompt, *names]):
        tensor = draw(_tensors(name, is_right=name != wrong))
        if model == "vllm_format":  # without a batch's dimension
            tensor.shape = tensor.shape[1:]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.content)
    if draw(st.integers(0, 9)) == 0:
        request.outputs.add(name=draw(st.sampled_from(["text_output", "nope", ""])))
    parameters = [*NAMES, "timeout", "priority", "sequence_id", "triton_x", "nope"]
    for name in draw(st.lists(st.sampled_from(parameters), max_size=1)):
        kind = draw(st.sampled_from(sorted(_PARAMETERS)))
        setattr(request.parameters[name], kind, draw(_PARAMETERS[kind]))
    return bytes(request.SerializeToString())


# --- the gateway

GATEWAY_MODEL = "short_queue"
_FIELDS: dict[str, Values] = {
    **_OPTIONS,
    "model": st.sampled_from([GATEWAY_MODEL] * 5 + ["gpt"]),
    "prompt": st.one_of(
        PROMPTS,
        st.lists(PROMPTS, min_size=1, max_size=3),
        st.lists(TOKENS, min_size=1, max_size=5),
        st.lists(st.lists(TOKENS, max_size=3), max_size=3),
    ),
    "messages": MESSAGES,
    "tools": st.lists(st.dictionaries(TEXTS, JSON_VALUES, max_size=2), max_size=2),
    "tool_choice": st.one_of(
        st.sampled_from(["none", "auto", "required"]),
        TEXTS.map(lambda name: {"type": "function", "function": {"name": name}}),
    ),
    "functions": st.lists(st.dictionaries(TEXTS, JSON_VALUES, max_size=2), max_size=2),
    "function_call": st.sampled_from(["none", "auto", {"name": "f"}]),
    "top_logprobs": st.integers(0, 20),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "response_format": st.one_of(
        st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}]),
        _SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}),
    ),
}
_FLAGS = ("stream", "parallel_tool_calls")
_FIELDS |= {name: st.booleans() for name in _FLAGS}
_FIELDS["prompt_cache_key"] = TEXTS


def _gateway_bodies(kind: type[ChatCompletionRequest | CompletionRequest]) -> Values:
    """Bodies with the fields of a kind, all of which have values above."""
    table = _OPTIONS | {name: _FIELDS[name] for name in kind.model_fields}
    if "messages" in table:
        table["logprobs"] = st.booleans()
    needed = {"model": st.just(GATEWAY_MODEL), "max_tokens": _COUNTS}
    needed |= {name: table[name] for name in ("prompt", "messages") if name in table}
    bodies = st.tuples(st.fixed_dictionaries(needed), _mixed(table))
    return bodies.map(lambda each: _bounded(each[0] | each[1]))


def _bounded(body: dict[str, Any]) -> dict[str, Any]:
    """Without nulls that mean "as many tokens as there is room for"."""
    limits = ("max_tokens", "max_completion_tokens")
    return {name: value for name, value in body.items() if value is not None or name not in limits}


# Kind of door -> what is put through it.
LETTERS: dict[str, st.SearchStrategy[Letter]] = {
    "grpc": _letters(["grpc"], _grpc_bodies()),
    "generate": _letters(["generate", "generate_stream"], _BODIES),
    "infer": _letters(["infer"], _INFER),
    "completions": _letters(["completions"], _gateway_bodies(CompletionRequest).map(_to_json)),
    "chat": _letters(["chat/completions"], _gateway_bodies(ChatCompletionRequest).map(_to_json)),
}
