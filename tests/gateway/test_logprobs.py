"""Log probabilities in the shapes of OpenAI and vLLM."""

from __future__ import annotations

from typing import Any

from tandem_client import Chunk
from tandem_gateway.responses import Usage, Writer

PROMPT: tuple[dict[str, Any], ...] = (
    {"1": {"logprob": None, "rank": None, "decoded_token": "<bos>", "text_offset": 0}},
    {
        "7": {"logprob": -2.0, "rank": 5, "decoded_token": "one", "text_offset": 0},
        "8": {"logprob": -0.25, "rank": 1, "decoded_token": " two"},
        "9": {"logprob": -1.0, "rank": 2, "decoded_token": "\ufffd", "bytes": [0xF0, 0x9F]},
    },
)
OUTPUT: tuple[dict[str, Any], ...] = (
    {
        "9": {
            "logprob": -0.5,
            "rank": 1,
            "decoded_token": "\ufffd",
            "bytes": [0xF0, 0x9F],
            "text_offset": 3,
        },
        "4": {"logprob": -1.5, "rank": 2, "decoded_token": "\ufffd", "bytes": [0x98]},
    },
    {"4": {"logprob": -0.1, "rank": 1, "decoded_token": "\u00e9", "text_offset": 3}},
)
CHUNK = Chunk(
    "one\u00e9", finish_reason="length", logprobs=OUTPUT, prompt_logprobs=PROMPT, num_input_tokens=2
)


def choice(writer: Writer) -> dict[str, Any]:
    """Of the whole answer; that of a stream says the same."""
    (whole,) = writer.whole({0: [CHUNK]}, Usage())["choices"]
    (streamed,) = writer.chunk(0, CHUNK)["choices"]
    names = ("logprobs", "prompt_logprobs")
    assert [whole.get(name) for name in names] == [streamed.get(name) for name in names]
    assert isinstance(whole, dict)
    return whole


def test_an_echo_begins_with_the_prompts() -> None:
    writer = Writer("text_completion", "tandem", 2, echoes=True)
    assert choice(writer)["logprobs"] == {
        "tokens": ["<bos>", "one", r"bytes:\xf0\x9f", "\u00e9"],
        "token_logprobs": [None, -2.0, -0.5, -0.1],
        "top_logprobs": [
            None,
            {" two": -0.25, r"bytes:\xf0\x9f": -1.0},
            {r"bytes:\xf0\x9f": -0.5, r"bytes:\x98": -1.5},
            {"\u00e9": -0.1},
        ],
        "text_offset": [0, 0, 3, 3],
    }
    assert "prompt_logprobs" not in choice(writer)


def test_those_of_the_prompt_by_themselves() -> None:
    writer = Writer("text_completion", "tandem", None, num_top_of_prompt=1)
    assert choice(writer)["logprobs"] is None
    assert choice(writer)["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -2.0, "rank": 5, "decoded_token": "one"},
            "8": {"logprob": -0.25, "rank": 1, "decoded_token": " two"},
        },
    ]
    without = Writer("text_completion", "tandem", 1)
    assert choice(without)["logprobs"]["token_logprobs"] == [-0.5, -0.1]


def test_a_chat_has_the_bytes() -> None:
    writer = Writer("chat.completion", "tandem", 2, num_top_of_prompt=0)
    content = choice(writer)["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xF0, 0x9F], [0xC3, 0xA9]]
    assert [top["bytes"] for top in content[0]["top_logprobs"]] == [[0xF0, 0x9F], [0x98]]
    assert list(choice(writer)["prompt_logprobs"][1]) == ["7"]
