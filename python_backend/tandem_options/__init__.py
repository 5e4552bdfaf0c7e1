"""What a request may ask for: one table for every door, and how its values are read."""

from tandem_options.errors import OptionError
from tandem_options.reading import Reading, read
from tandem_options.table import ALIASES, NAMES, OPTIONS, Fate, Option
from tandem_options.unknown import UnknownNames
from tandem_options.values import parse_json

__all__ = [
    "ALIASES",
    "NAMES",
    "OPTIONS",
    "Fate",
    "Option",
    "OptionError",
    "Reading",
    "UnknownNames",
    "parse_json",
    "read",
]
