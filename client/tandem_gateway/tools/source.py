"""Text that comes in pieces, and what it is read into."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeVar

Kind = Literal["reasoning", "content", "name", "arguments"]


@dataclass(frozen=True)
class Piece:
    """Some text of one kind. A `name` begins a call; the `arguments` after it are that call's."""

    kind: Kind
    text: str


_T = TypeVar("_T")
# How all readers read: they yield pieces, and None where they can't go on without more text.
Steps = Generator[Piece | None, None, _T]


class Source:
    """The text that is there and not yet read, with a place up to which it was looked at.

    A reader decides only on what more text can't change, so that it reads the same however the text
    is cut.
    """

    def __init__(self) -> None:
        self.text = ""
        self.has_ended = False
        self._place = 0

    @property
    def ahead(self) -> str:
        """What was not looked at yet."""
        return self.text[self._place :]

    def move(self, count: int) -> None:
        """Looks at some characters."""
        self._place += count

    def go_back(self) -> None:
        """As if nothing had been looked at."""
        self._place = 0

    def accept(self) -> None:
        """Has read what was looked at."""
        self.text, self._place = self.ahead, 0

    def take(self, count: int) -> str:
        """Reads some characters from the beginning."""
        taken, self.text, self._place = self.text[:count], self.text[count:], 0
        return taken

    def skip(self, characters: str) -> Steps[None]:
        """Moves over white space and these characters."""
        while True:
            self.move(len(self.ahead) - len(self.ahead.lstrip(_SPACES + characters)))
            if self.ahead or self.has_ended:
                return
            yield None

    def meets(self, mark: str) -> Steps[bool]:
        """Whether the mark comes next; moves over it."""
        while len(self.ahead) < len(mark) and mark.startswith(self.ahead) and not self.has_ended:
            yield None
        found = self.ahead.startswith(mark)
        self.move(len(mark) if found else 0)
        return found

    def upto(self, marks: tuple[str, ...], kind: Kind) -> Steps[str | None]:
        """Gives the text up to the first of the marks, which it returns; None at the end.

        White space before a mark, or at the end, is left unread.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark)) >= 0]
            at, mark = min(found, default=(len(self.text) - self._held_back(marks), None))
            if text := self.take(len(self.text[:at].rstrip(_SPACES))):
                yield Piece(kind, text)
            if mark is not None or self.has_ended:
                return mark
            yield None

    def _held_back(self, marks: tuple[str, ...]) -> int:
        """How many characters at the end may be the beginning of a mark."""
        longest = 0 if self.has_ended else max(map(len, marks), default=1) - 1
        for count in range(min(longest, len(self.text)), 0, -1):
            if any(mark.startswith(self.text[-count:]) for mark in marks):
                return count
        return 0


_SPACES = " \t\r\n"


class Nesting:
    """Finds where a value in brackets ends, in a text that grows.

    Attributes:
        place: up to where the text was searched.
    """

    def __init__(self, quotes: str = '"', depth: int = 0) -> None:
        self.place = 0
        self._quotes = quotes
        self._quote = ""
        self._depth = depth

    def find_end(self, text: str) -> int | None:
        """The index behind the bracket that closes the first one."""
        for match in _STRUCTURE.finditer(text, self.place):
            self.place = match.end()
            mark = match[0]
            if self._quote:
                self._quote = "" if mark == self._quote else self._quote
            elif mark in self._quotes:
                self._quote = mark
            elif mark in "{[(":
                self._depth += 1
            elif mark in "}])":
                self._depth -= 1
                if self._depth <= 0:
                    return self.place
        # A backslash at the end goes with what follows.
        self.place = max(self.place, len(text) - text.endswith("\\"))
        return None


_STRUCTURE = re.compile(r"\\.|[\"'{}\[\]()]", re.DOTALL)
