"""A token's bytes are those of its text; its place is where its character begins."""

from __future__ import annotations

import pytest
from hypothesis import given

from tandem.requests.token_bytes import Offsets, TokenBytes, offsets_in
from text_tokenizers import PIECES, TEXT, TOKENIZERS, bytes_of, decode
from tiny_models import byte_tokenizer

EMOJI = "\U0001f600"


def ids_of(name: str, text: str) -> list[int]:
    tokenizer = TOKENIZERS[name]
    ids: list[int] = tokenizer(text)["input_ids"] if name == "bytes" else bytes_of(tokenizer, text)
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, pieces=PIECES)
def test_the_bytes_of_all_tokens_are_those_of_the_text(
    name: str, text: str, pieces: list[str]
) -> None:
    tokens = TokenBytes(TOKENIZERS[name])
    if name == "bytes":
        ids = ids_of(name, text)
    else:
        vocabulary = TOKENIZERS[name].get_vocab()
        ids = [vocabulary[piece] for piece in pieces if piece in vocabulary] + ids_of(name, text)
    found = b"".join(tokens.of(each) for each in ids).decode()
    whole = decode(TOKENIZERS[name], ids) if "<" not in text else text
    assert found in (whole, f" {whole}" if tokens.strips_space else whole)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_part_of_a_character(name: str) -> None:
    tokens = TokenBytes(TOKENIZERS[name])
    ids = ids_of(name, f"a{EMOJI}b")
    assert [tokens.of(each) for each in ids] == [
        b"a",
        b"\xf0",
        b"\x9f",
        b"\x98",
        b"\x80",
        b"b" if name == "bytes" else tokens.of(ids[-1]),
    ]
    offsets = Offsets(tokens, 10)
    assert [offsets.place(each) for each in ids] == [10, 11, 11, 11, 11, 12]
    assert offsets.next == 13


def test_special_tokens_and_those_that_there_are_not() -> None:
    tokenizer = byte_tokenizer()
    tokens = TokenBytes(tokenizer)
    token_id, text = next(iter(tokens.special.items()))
    assert tokens.of(token_id) == text.encode()
    assert tokens.of(len(tokenizer) + 5) == b""


def test_special_tokens_have_a_place_only_where_they_are_shown() -> None:
    tokens = TokenBytes(byte_tokenizer())
    special, text = next(iter(tokens.special.items()))
    ids = [special, *ids_of("bytes", "ab")]
    assert offsets_in(f"{text}ab", ids, tokens) == [0, len(text), len(text) + 1]
    assert offsets_in("ab", ids, tokens) == [0, 0, 1]
    # Never behind the text.
    assert offsets_in("a", ids, tokens) == [0, 0, 1]
    assert offsets_in("", ids, tokens) == [0, 0, 0]


def test_a_text_begins_without_the_space_that_is_stripped() -> None:
    tokenizer = TOKENIZERS["llama-like"]
    tokens = TokenBytes(tokenizer)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary["\u2581the"], vocabulary["\u2581a"]]
    assert decode(tokenizer, ids) == "the a"
    assert [tokens.of(each) for each in ids] == [b" the", b" a"]
    assert offsets_in("the a", ids, tokens) == [0, 3]
