"""Text comes out as its tokens do, whole characters only, and never changes afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tandem.requests.text import Detokenizer, OutputText
from text_tokenizers import PIECES, TEXT, TOKENIZERS, bytes_of, decode


def check_stream(
    tokenizer: PreTrainedTokenizerFast, token_ids: list[int], splits: list[int]
) -> None:
    """Streams the tokens in groups; what is out is always a beginning of the whole text."""
    whole = decode(tokenizer, token_ids)
    detokenizer = Detokenizer(tokenizer)
    emitted, start = "", 0
    for stop in [*splits, len(token_ids)]:
        piece = detokenizer.push(token_ids[start:stop])
        assert "\ufffd" not in piece
        emitted += piece
        assert whole.startswith(emitted)
        start = stop
    assert emitted + detokenizer.flush() == whole


@given(text=TEXT, data=st.data())
def test_byte_level_stream_equals_decode(text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["bytes"]
    token_ids = tokenizer(text)["input_ids"]
    splits = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6).map(sorted))
    assert decode(tokenizer, token_ids) == text or "<" in text
    check_stream(tokenizer, token_ids, splits)


@pytest.mark.parametrize("name", ["gemma-like", "llama-like"])
@given(pieces=PIECES, text=TEXT, data=st.data())
def test_byte_fallback_stream_equals_decode(
    name: str, pieces: list[str], text: str, data: st.DataObject
) -> None:
    """Words and characters in bytes, side by side."""
    tokenizer = TOKENIZERS[name]
    vocabulary = tokenizer.get_vocab()
    token_ids: list[int] = []
    for piece in pieces:
        if piece in vocabulary:
            token_ids.append(vocabulary[piece])
        else:
            token_ids += bytes_of(tokenizer, piece)
    token_ids += bytes_of(tokenizer, text)
    splits = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6).map(sorted))
    check_stream(tokenizer, token_ids, splits)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_with_its_last_byte(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = (
        tokenizer("\U0001f600")["input_ids"]
        if name == "bytes"
        else bytes_of(tokenizer, "\U0001f600")
    )
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in ids] == ["", "", "", "\U0001f600"]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_a_character_never_comes_out(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    euro = "\u20ac"
    ids = tokenizer(euro)["input_ids"] if name == "bytes" else bytes_of(tokenizer, euro)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == ""
    cut = Detokenizer(tokenizer)
    assert cut.push([*ids, *ids[:2]]) + cut.flush() == euro


def test_bytes_that_are_no_text_come_out_with_what_follows() -> None:
    tokenizer = TOKENIZERS["bytes"]
    vocabulary = tokenizer.get_vocab()
    bad = vocabulary["\u00ff"]  # how the byte 0xFF is written in a byte-level vocabulary
    letter = vocabulary["x"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([letter, bad]) == "x"
    assert detokenizer.push([letter]) == "\ufffdx"


def test_special_tokens_are_not_decoded_again_and_again() -> None:
    """A text of nothing else would take as long as its square."""
    detokenizer = Detokenizer(TOKENIZERS["bytes"])
    for _ in range(100):
        assert detokenizer.push([4]) == ""
    assert detokenizer._token_ids == []


@given(text=TEXT)
def test_special_tokens_are_left_out(text: str) -> None:
    """Wherever they stand, also within a character's bytes."""
    assume("<" not in text)
    tokenizer = TOKENIZERS["bytes"]
    ids: list[int] = []
    for token in tokenizer(text)["input_ids"]:
        ids += [2, token, 4]
    detokenizer = Detokenizer(tokenizer)
    joined = detokenizer.push(ids) + detokenizer.flush()
    assert joined == decode(tokenizer, ids)


def test_nothing_comes_of_nothing() -> None:
    detokenizer = Detokenizer(TOKENIZERS["bytes"])
    assert detokenizer.push([]) == detokenizer.flush() == ""


END, TURN = 5, 4  # <end> and <turn>, special tokens of the byte tokenizer


def ids(text: str) -> list[int]:
    """Of text in which special tokens are written out."""
    return list(TOKENIZERS["bytes"](text)["input_ids"])


def shown(token_ids: list[int], stop: list[str], cut: int = 1, **options: Any) -> tuple[str, Any]:
    """What is shown of tokens that come `cut` at a time, and the stop string that ended it."""
    output = OutputText(TOKENIZERS["bytes"], stop, **options)
    pieces = [output.push(token_ids[at : at + cut]) for at in range(0, len(token_ids), cut)]
    return "".join(pieces) + output.flush(), output.matched


@pytest.mark.parametrize("cut", [1, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "matched"),
    [
        ("ab<end>cd", "<end>", "ab", "<end>"),
        ("a<turn>b<end>cd", "<end>", "ab", "<end>"),
        ("ab<end>cd", "b<end>", "a", "b<end>"),
        ("ab<end>cd", "<end>c", "ab", "<end>c"),
        ("ab<end>xd", "<end>c", "abxd", None),
        ("ab<turn><end>c", "<turn><end>", "ab", "<turn><end>"),
        ("ab<turn>c<end>", "<end>\n", "abc", None),
        ("ab<pad>cd", "<end>", "abcd", None),
    ],
)
def test_a_stop_string_may_hold_special_tokens(
    text: str, stop: str, expected: str, matched: str | None, cut: int
) -> None:
    assert shown(ids(text), [stop, "zz"], cut) == (expected, matched)


def test_a_special_token_may_be_spelled_out() -> None:
    letters = [token for letter in "ab<end>c" for token in ids(letter)]
    assert END not in letters
    assert shown(letters, ["<end>"]) == ("ab", "<end>")


def test_a_stop_string_of_a_special_token_is_shown_on_request() -> None:
    token_ids = ids("a<turn>b<end>c")
    assert shown(token_ids, ["<end>"], include_stop=True) == ("ab<end>", "<end>")
    assert shown(token_ids, ["b<end>"], include_stop=True) == ("ab<end>", "b<end>")


def test_special_tokens_are_shown_on_request() -> None:
    token_ids = ids("a<turn>b<end>c")
    assert shown(token_ids, [], skip_special_tokens=False) == ("a<turn>b<end>c", None)
    assert shown(token_ids, ["<end>"], skip_special_tokens=False) == ("a<turn>b", "<end>")


@pytest.mark.parametrize("cut", [1, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "expected", "matched"),
    [
        ("xab!cd", ["ab!"], 4, "x", "ab!"),  # begins before, ends with the fourth token
        ("xab!cd", ["ab!"], 5, "xab!cd", None),  # ends before
        ("abcabc", ["abc"], 4, "abc", "abc"),
        ("aaaa", ["aa"], 3, "a", "aa"),
        ("abx", ["b", "abc"], 3, "abx", None),  # the first ended too early, the second nowhere
        ("abc", ["b", "abc"], 3, "", "abc"),
        ("a<end>b<end>", ["<end>"], 3, "ab", "<end>"),
    ],
)
def test_a_stop_string_counts_when_it_ends(
    text: str,
    stop: list[str],
    min_tokens: int,
    expected: str,
    matched: str | None,
    cut: int,
) -> None:
    assert shown(ids(text), stop, cut, min_tokens=min_tokens) == (expected, matched)
