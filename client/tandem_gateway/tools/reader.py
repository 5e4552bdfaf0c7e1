"""Reads an answer's text, whole or as it comes."""

from __future__ import annotations

from collections.abc import Generator

from tandem_gateway.tools.formats import ReasoningFormat, ToolFormat
from tandem_gateway.tools.json_calls import read_objects
from tandem_gateway.tools.source import Piece, Source, Steps
from tandem_gateway.tools.whole_calls import Schemas

# How calls are written where `tool_choice` makes the model write some: a list in JSON.
FORCED = ToolFormat(
    sign="",
    read=lambda source, tools: read_objects(source, tools, begin="[", between=",]"),
    bare="[",
)


class AnswerReader:
    """Reads the text of one answer into pieces, which are the same however the text is cut.

    What begins like a call and isn't one, broken or of a function that there isn't, is content.
    """

    def __init__(
        self,
        *,
        calls: ToolFormat | None = None,
        schemas: Schemas | None = None,
        max_calls: int | None = None,
        named: str = "",
        reasoning: ReasoningFormat | None = None,
        is_thinking: bool = False,
    ) -> None:
        """Prepares to read.

        Args:
            calls: the notation of tool calls, if any are read.
            schemas: the parameters of the functions that may be called, by name.
            max_calls: calls after so many are left out.
            named: the function whose arguments the whole text is.
            reasoning: the marks around what the model thinks first, if that is told apart.
            is_thinking: whether the prompt ends with the first of these marks.
        """
        self._source = Source()
        self._max_calls = max_calls
        self._num_calls = 0
        if named:
            self._steps = _read_named(self._source, named)
        else:
            self._steps = _read(self._source, calls, schemas or {}, reasoning, is_thinking)

    def feed(self, text: str, *, is_last: bool) -> list[Piece]:
        """What some more text adds.

        Args:
            is_last: whether nothing follows.
        """
        self._source.text += text
        self._source.has_ended = is_last
        pieces = list(self._until_more())
        return [piece for piece in pieces if self._is_allowed(piece)]

    def _until_more(self) -> Generator[Piece]:
        for piece in self._steps:
            if piece is None:
                return
            yield piece

    def _is_allowed(self, piece: Piece) -> bool:
        self._num_calls += piece.kind == "name"
        is_call = piece.kind in ("name", "arguments")
        return not is_call or self._max_calls is None or self._num_calls <= self._max_calls


def _read_named(source: Source, name: str) -> Steps[None]:
    yield Piece("name", name)
    while not source.has_ended or source.text:
        if source.text:
            yield Piece("arguments", source.take(len(source.text)))
        if not source.has_ended:
            yield None


def _read(
    source: Source,
    calls: ToolFormat | None,
    schemas: Schemas,
    reasoning: ReasoningFormat | None,
    is_thinking: bool,
) -> Steps[None]:
    if reasoning is not None:
        yield from _read_reasoning(source, reasoning, is_thinking)
    yield from _read_answer(source, calls or _NO_CALLS, schemas)


def _read_reasoning(source: Source, marks: ReasoningFormat, is_thinking: bool) -> Steps[None]:
    yield from source.skip("")
    begins = yield from source.meets(marks.begin)
    if not begins and not is_thinking:
        source.go_back()
        return
    yield from source.skip("")
    source.accept()
    if (yield from source.upto((marks.end,), "reasoning")) is None:
        source.take(len(source.text))
        return
    source.take(source.text.index(marks.end) + len(marks.end))
    yield from source.skip("")
    source.accept()


def _read_answer(source: Source, calls: ToolFormat, schemas: Schemas) -> Steps[None]:
    has_called = False
    if calls.bare:
        yield from source.skip("")
        if source.ahead.startswith(calls.bare):
            has_called = yield from calls.read(source, schemas)
        source.go_back()
    while mark := (yield from source.upto(calls.marks + calls.hidden, "content")):
        end = source.text.index(mark) + len(mark)
        if mark in calls.hidden:
            source.text = source.text[: end - len(mark)] + source.text[end:]
            continue
        source.move(end)
        if (yield from calls.read(source, schemas)):
            has_called = True
        else:
            yield Piece("content", source.take(end))
    # White space, left from before the end or before a call.
    if source.text and not has_called:
        yield Piece("content", source.take(len(source.text)))


def _no_calls(source: Source, schemas: Schemas) -> Steps[bool]:
    return False
    yield


_NO_CALLS = ToolFormat(sign="", read=_no_calls)
