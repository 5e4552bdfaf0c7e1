"""No guide, however made, harms the process that compiles it or keeps it busy."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from transformers import AutoTokenizer

from tandem import Guide, InvalidRequestError
from tandem.requests import guide_checker
from tandem.requests.grammar import GrammarCompiler
from tandem.requests.params import _MAX_GUIDE
from tiny_engines import TinyModels


@pytest.fixture(scope="module")
def compiler(tiny: TinyModels) -> GrammarCompiler:
    tokenizer = AutoTokenizer.from_pretrained(tiny.verifier("llama"))
    return GrammarCompiler(tokenizer, 384, [tokenizer.eos_token_id])


Chain = Callable[[int], str]


def json_chain(link: Callable[[str], object]) -> Chain:
    def make(count: int) -> str:
        rules: dict[str, object] = {f"{n}": link(f"#/$defs/{n + 1}") for n in range(count)}
        rules[f"{count}"] = {"type": "string"}
        schema = {"$defs": rules, "$ref": "#/$defs/0"}
        return json.dumps(schema, separators=(",", ":"))

    return make


def rule_chain(first: str, rule: str, last: str) -> Chain:
    def make(count: int) -> str:
        rules = [rule.format(n, n + 1) for n in range(count)]
        return "\n".join([first, *rules, last.format(count), ""])

    return make


CHAINS: dict[str, tuple[str, Chain]] = {
    "$ref": ("json", json_chain(lambda to: {"$ref": to})),
    "items": ("json", json_chain(lambda to: {"items": {"$ref": to}})),
    "allOf": ("json", json_chain(lambda to: {"allOf": [{"$ref": to}]})),
    "allOf twice": ("json", json_chain(lambda to: {"allOf": [{"$ref": to}] * 2})),
    "anyOf twice": ("json", json_chain(lambda to: {"anyOf": [{"$ref": to}] * 2})),
    "properties": ("json", json_chain(lambda to: {"properties": {"a": {"$ref": to}}})),
    "lark rules": ("grammar", rule_chain("start: r0", "r{}: r{}", 'r{}: "a"')),
    "lark terminals": ("grammar", rule_chain("start: T0", "T{}: T{}", 'T{}: "a"')),
    "brackets": ("grammar", lambda n: "start: " + "(" * n + '"a"' + ")" * n),
    "groups": ("regex", lambda n: "(" * n + "a" + ")" * n),
    "nested arrays": ("json", lambda n: '{"items":' * n + "{}" + "}" * n),
}


# Where the library has a limit of its own.
REFUSED = {
    "anyOf twice": "max is 2000",
    "brackets": "too deeply nested",
    "groups": "invalid regex",
    "nested arrays": "recursion limit exceeded",
}


def longest(chain: Chain) -> str:
    """The longest that may be sent."""
    low, high = 1, _MAX_GUIDE
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if len(chain(middle)) <= _MAX_GUIDE else (low, middle)
    return chain(low)


@pytest.mark.parametrize("name", CHAINS)
def test_the_deepest_chain_that_may_be_sent_harms_nobody(
    compiler: GrammarCompiler, name: str
) -> None:
    """Compiled on the stack that is meant to suffice, walked and dropped on a usual one."""
    kind, chain = CHAINS[name]
    guide = Guide(kind, longest(chain))
    if name in REFUSED:
        with pytest.raises(InvalidRequestError, match=REFUSED[name]):
            compiler.compile(guide)
        return
    grammar = compiler.compile(guide)
    for _ in range(8):
        allowed = int.from_bytes(grammar.masks([])[0], "little")
        grammar.forced()
        if error := grammar.push((allowed & -allowed).bit_length() - 1):
            pytest.fail(error)


def test_chains_of_the_length_that_killed_are_compiled(compiler: GrammarCompiler) -> None:
    guides = [(kind, chain(3000)) for name, (kind, chain) in CHAINS.items() if name not in REFUSED]
    gbnf = rule_chain("root ::= r0", "r{} ::= r{}", 'r{} ::= "a"')
    for kind, text in (("grammar", gbnf(3000)), *guides):
        if len(text) <= _MAX_GUIDE:
            compiler.compile(Guide(kind, text))


def test_a_guide_that_takes_long_is_given_up(compiler: GrammarCompiler) -> None:
    """And others are compiled beside it."""
    text = rule_chain("start: T0", "T{0}: T{1} T{1}", 'T{}: "a"')(3000)
    messages = []

    def compile_it() -> None:
        with pytest.raises(InvalidRequestError) as error:
            compiler.compile(Guide("grammar", text))
        messages.append(str(error.value))

    thread = threading.Thread(target=compile_it)
    thread.start()
    started = time.monotonic()
    compiler.compile(Guide("regex", "beside it"))
    assert time.monotonic() - started < 1.5
    assert not messages
    thread.join(30)
    assert messages == [
        "grammar can't be used as a guide: reading it takes longer than 2 s: make it simpler"
    ]
    compiler.compile(Guide("regex", "behind it"))


def test_a_process_that_ends_is_started_anew(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = guide_checker._start
    monkeypatch.setattr(guide_checker, "_start", lambda: started.append(start()) or started[-1])
    checker = guide_checker.GuideChecker()
    for number in range(2):
        checker.check(Guide("regex", f"a{{{number}}}"))
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
    checker.check(Guide("regex", "b"))
    assert len(started) == 2


def test_a_process_that_ends_in_the_middle_is_one_guides_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = guide_checker.GuideChecker()
    with monkeypatch.context() as patch:
        patch.setattr(guide_checker, "_python", lambda: "false")
        with pytest.raises(InvalidRequestError, match="too deep or too large to be read"):
            checker.check(Guide("regex", "a"))
    checker.check(Guide("regex", "a"))


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (Guide("json", '{"$ref": "#"}'), "no text matches it"),
        (Guide("json", "false"), "Unsatisfiable schema"),
        (Guide("json", '{"enum": []}'), "Unsatisfiable schema"),
        (Guide("regex", r"[^\s\S]"), "no text matches it"),
        (Guide("regex", r"a[^\s\S]"), "no text matches it"),
        (Guide("regex", "()"), "only the empty text matches it"),
        (Guide("grammar", "start: \n"), "only the empty text matches it"),
        (Guide("grammar", "root ::="), "only the empty text matches it"),
        (Guide("grammar", "root ::= a\na ::="), "only the empty text matches it"),
        (Guide("grammar", 'start: a\na: a "b"\n'), "no text matches it"),
        (Guide("grammar", "start: " + " | ".join(f'"w{n}"' for n in range(9_000))), "max is 2000"),
    ],
)
def test_what_nothing_can_match_is_refused_with_the_reason(
    compiler: GrammarCompiler, guide: Guide, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        compiler.compile(guide)


@pytest.mark.parametrize(
    ("space", "run", "num_valid"),
    [
        (None, " \n" * 40, 64),
        ("", "  ", 0),
        ("[ ]?", "    ", 1),
        (r"\n {0,2}", "\n    ", 3),
    ],
)
def test_white_space_in_json_is_bounded(
    compiler: GrammarCompiler, tiny: TinyModels, space: str | None, run: str, num_valid: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.verifier("llama"))
    for guide in (Guide("json_object", space=space), Guide("json", "{}", space=space)):
        grammar = compiler.compile(guide)
        for token_id in tokenizer('{"a":')["input_ids"]:
            assert grammar.push(token_id) == ""
        assert grammar.num_valid(tokenizer(run)["input_ids"]) == num_valid
        rest = tokenizer('7,"b":true}')["input_ids"]
        assert grammar.num_valid(rest) == len(rest)


def test_white_space_that_is_no_expression_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match="json can't be used as a guide: regex parse"):
        compiler.compile(Guide("json", "{}", space="("))


def test_what_is_compiled_once_serves_all(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.compile(Guide("regex", "(ab|cd)+"))
    monkeypatch.setattr(compiler, "_compile", None)
    second = compiler.compile(Guide("regex", "(ab|cd)+"))
    start = first.masks([])
    token_id = next(n for n in range(384) if first.num_valid([n]))
    assert first.push(token_id) == ""
    assert first.masks([]) != start
    assert second.masks([]) == start


def test_compiled_guides_are_not_kept_for_ever(compiler: GrammarCompiler) -> None:
    for number in range(8):
        compiler.compile(Guide("choice", choices=(f"{number}", *["x" * 1000] * 100)))
    assert 0 < sum(guide.size for guide in compiler._kept) <= 2**19
