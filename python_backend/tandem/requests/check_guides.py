"""A program that reads guides and says of each what is wrong with it; see `guide_checker`.

It runs as a process of its own, which a guide may crash or keep busy. On its standard input comes a
JSON object a line, `{"kind": ..., "text": ...}`, and for each goes one out: `{"source": ...}`, the
guide as llguidance's matcher takes it, or `{"error": ...}`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING

from llguidance import GrammarFormat, LLMatcher, grammar_from

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Of one guide, in seconds of CPU time; of the process, in bytes of memory.
MAX_SECONDS = 2.0
MAX_BYTES = 2**30
# The library's parsers call themselves for each rule that leads to another: up to 7 kB a rule, and
# the shortest rule has 9 characters. `tandem.requests.grammar` gives them twice as much.
STACK_BYTES = 2**27

# Between the parts of JSON; without a bound a model may go on with it until its last token.
_SPACE = r"[ \t\r\n]{1,64}"
_FORMATS: dict[str, GrammarFormat] = {
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def answer(kind: str, text: str, space: str | None = None) -> dict[str, str]:
    """What is said of one guide; see `tandem.requests.params.Guide`."""
    try:
        if kind in ("json", "json_object"):
            source = _json_source(text, space)
        else:
            source = grammar_from(_FORMATS[kind], text)
        error = LLMatcher.validate_grammar(source)
    except (ValueError, RecursionError) as caught:
        error = str(caught)
    return {"error": error} if error else {"source": source}


def _json_source(text: str, space: str | None) -> str:
    """A request's own white space wins over the schema's, and that over the usual one."""
    text = {"true": "{}", "false": '{"enum": []}'}.get(text.strip(), text)
    if space == "":
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
    own: JsonCompileOptions | None = {"whitespace_pattern": space} if space else None
    return LLMatcher.grammar_from_json_schema(
        text, defaults={"whitespace_pattern": _SPACE}, overrides=own
    )


def _serve() -> None:
    for line in sys.stdin.buffer:
        # Behind it the kernel ends the process.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        result = answer(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """Answers until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
