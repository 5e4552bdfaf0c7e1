"""What is taken, and what it means, by the one table of options."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_options import OPTIONS, Fate, OptionError, read


@pytest.mark.parametrize("name", sorted(name for each in OPTIONS.values() for name in each.names))
def test_null_is_not_given(name: str) -> None:
    assert read({name: None, "nvext": None}).values == {}


@pytest.mark.parametrize(
    ("sent", "values"),
    [
        ({"stop": ""}, {"stop": ()}),
        ({"stop": [""]}, {"stop": ()}),
        ({"stop": ["a", ""]}, {"stop": ("a",)}),
        ({"bad_words": ""}, {"bad_words": ()}),
        ({"suffix": ""}, {}),
        ({"max_completion_tokens": "7"}, {"max_tokens": 7}),
        ({"max_tokens": 8, "max_completion_tokens": 7}, {"max_tokens": 8}),
        ({"top_p": 0}, {}),
        ({"top_p": "0.0"}, {}),
        ({"random_seed": 0}, {}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"logit_bias": {"5": "1.5"}}, {"logit_bias": {5: 1.5}}),
        ({"greed_sampling": True, "temperature": 1}, {"temperature": 0.0}),
        ({"echo": True}, {"exclude_input_in_output": False}),
        ({"echo": False}, {}),
        ({"nvext": {"ignore_eos": True, "top_k": "3"}}, {"ignore_eos": True, "top_k": 3}),
        ({"nvext": {"top_k": 3}, "top_k": 4}, {"top_k": 4}),
        ({"nvext": '{"guided_regex": "a"}'}, {"guided_regex": "a"}),
        ({"no_stop_trim": "true"}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ],
)
def test_what_is_sent_means_this(sent: dict[str, Any], values: dict[str, Any]) -> None:
    assert read(sent).values == values


@pytest.mark.parametrize(
    "sent",
    [
        {"best_of": 3, "n": 3},
        {"best_of": "1"},
        {"use_beam_search": False},
        {"beam_width": 1},
        {"length_penalty": 1.0},
        {"skip_special_tokens": True},
        {"echo": False},
        {"detokenize": True},
        {"priority": 0},
        {"modalities": ["text"]},
        {"audio": {}},
        {"verbosity": "medium"},
        {"prediction": {"type": "content", "content": "x"}},
        {"prompt_cache_retention": "24h"},
        {"metadata": {"a": "b"}},
        {"documents": []},
        {"logits_processors": []},
        {"lora_task_id": 0},
        {"no_repeat_ngram_size": 0},
        {"return_tokens_as_token_ids": False},
        {"nvext": {"annotations": [], "use_raw_prompt": False}},
    ],
)
def test_what_asks_for_nothing_is_taken(sent: dict[str, Any]) -> None:
    reading = read(sent)
    assert reading.unknown == ()
    assert set(reading.values) <= {"n", "skip_special_tokens"}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"use_beam_search": True}, "use_beam_search must be False, got True: there is no beam"),
        ({"beam_width": 4}, "beam_width must be 1, got 4: there is no beam search"),
        ({"best_of": 3}, "best_of must be n, which is 1, got 3: ask for n sequences"),
        ({"modalities": ["text", "audio"]}, r"modalities must be .*, got .*: there is only text"),
        ({"audio": {"voice": "x"}}, "audio must be left out, got .*: there is only text"),
        ({"suffix": "x"}, "suffix must be left out, got 'x': text can't be filled in"),
        ({"detokenize": False}, "detokenize must be True, got False: text always comes"),
        ({"web_search_options": {}}, "web_search_options must be left out, got {}"),
        ({"lora_name": "x"}, "lora_name must be left out, got 'x': there are no adapters"),
        ({"nvext": {"use_raw_prompt": True}}, "use_raw_prompt must be False, got True"),
        ({"nvext": 7}, "nvext must be an object, got 7"),
        ({"nvext": '{"\\ud800": 1}'}, "nvext must be a string"),
        ({"max_completion_tokens": "x"}, "max_completion_tokens must be a whole number, got 'x'"),
        ({"bad_words": ["\ud800"]}, "bad_words must be a list of strings"),
        ({"logit_bias": dict.fromkeys(range(2000), 1)}, "logit_bias may hold at most 1024"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    sent: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as refusal:
        read(sent)
    assert refusal.value.name in str(refusal.value)


def test_what_is_in_no_table_is_named() -> None:
    reading = read({"temprature": 1, "top_k": 2, "nvext": {"temp": 1}}, {"x": 1, "y": None})
    assert reading.values == {"top_k": 2}
    assert reading.unknown == ("temprature", "nvext.temp", "x")


def test_the_first_source_wins() -> None:
    sources = ({"top_k": 1}, {"top_k": 2, "max_new_tokens": 3}, {"max_tokens": 4})
    assert read(*sources).values == {"top_k": 1, "max_tokens": 3}


def test_no_name_stands_for_two_options() -> None:
    names = [name for each in OPTIONS.values() for name in each.names]
    assert len(names) == len(set(names))
    assert all(option.cure for option in OPTIONS.values() if option.fate is Fate.NOTHING)
