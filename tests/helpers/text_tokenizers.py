"""Tokenizers of both kinds, byte-level BPE and pieces with byte tokens, and texts for them."""

from __future__ import annotations

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import byte_tokenizer

WORDS = ["\u2581", "\u2581the", "\u2581a", "th", "e", "a", "n", "\u2581n", "an", ".", "\u00e9"]


def sentencepiece_tokenizer(strips_first_space: bool) -> PreTrainedTokenizerFast:
    """Words with a visible space, and bytes for all else; Llama strips the first space."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "gemma-like": sentencepiece_tokenizer(strips_first_space=False),
    "llama-like": sentencepiece_tokenizer(strips_first_space=True),
}
# What a byte-level model can say: any Unicode text but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12)
PIECES = st.lists(
    st.sampled_from([*WORDS, "\u00fc", "\u20ac", "\U0001f600", "\u4e2d"]), max_size=12
)


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def bytes_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Each piece of the vocabulary as one token, anything else byte by byte."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for character in text:
        if character in vocabulary:
            ids.append(vocabulary[character])
        else:
            ids += [vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]
    return ids
