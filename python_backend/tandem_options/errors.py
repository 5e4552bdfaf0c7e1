"""What is wrong with an option."""

from __future__ import annotations


class OptionError(ValueError):
    """An option's value can't be read, or asks for what can't be done; the message names it.

    Attributes:
        name: the option, as the client called it.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name} {message}")
        self.name = name


def shorten(value: object) -> str:
    """How messages show a value that a client sent."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
