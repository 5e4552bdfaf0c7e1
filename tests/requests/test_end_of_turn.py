"""Where a chat model's turn ends, whatever its configuration says."""

from __future__ import annotations

import pytest

from tandem.requests.end_of_turn import end_of_turn_ids
from tiny_models import byte_tokenizer

LOOP = "{% for message in messages %}"
EOS, TURN, END = 1, 4, 5


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, {EOS}),
        (LOOP + "<turn>{{ message.content }}<end>\n{% endfor %}", {EOS, END}),
        (LOOP + "<turn>{{ message.content }}\n<end>{% endfor %}", {EOS, END}),
        (LOOP + "<turn>{{ message.content }}{% endfor %}", {EOS}),
        (LOOP + "{{ message.content }}###{% endfor %}", {EOS}),
        (LOOP + "<turn>{{ message.content | upper }}<end>{% endfor %}", {EOS}),
        (LOOP + "{{ message.content | trim }}{{ eos_token }}{% endfor %}", {EOS}),
        ("{{ raise_exception('no') }}", {EOS}),
        (LOOP + "{{ message.nothing.content }}{% endfor %}", {EOS}),
        ("{% if", {EOS}),
    ],
)
def test_it_is_the_special_token_behind_an_answer(template: str | None, expected: set[int]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn_ids(tokenizer) == expected
