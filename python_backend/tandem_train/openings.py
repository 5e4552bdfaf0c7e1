"""Built-in openings: the first words of texts of many kinds on many subjects.

What the verifier makes of them is the training data, so they only have to be varied. None of the
held-out prompts in `prompts/` is among them.
"""

from __future__ import annotations

import random

_SUBJECTS = (
    """
apples|astronomy|bakeries|bees|bicycles|birds|bread|bridges|butterflies|cameras|canals|carpets
castles|cats|cheese|chess|clocks|coal|coffee|comets|copper|cotton|dams|dance|deserts|diamonds|dogs
dolphins|drums|earthquakes|eclipses|electricity|elephants|engines|fashion|ferries|fishing|flowers
football|forests|fossils|foxes|furniture|games|gardens|geometry|ghosts|glaciers|glass|gold|grammar
gravity|guitars|harbours|hats|history|honey|horses|hospitals|hotels|insects|islands|jazz|kings|kites
lakes|languages|libraries|lightning|lions|maps|markets|medicine|memory|mines|mirrors|money|mountains
museums|music|newspapers|oceans|onions|opera|owls|painting|paper|penguins|philosophy|planets|poetry
pottery|prisons|rain|restaurants|rice|rivers|roads|robots|salt|satellites|schools|shadows|sheep
ships|shoes|silk|snow|soap|spices|stars|statistics|submarines|sugar|taxes|tea|telephones|tennis
theatre|trade|trains|trees|tunnels|universities|vaccines|villages|violins|volcanoes|water|weather
whales|wheat|wind|wine|winter|wolves|wool|writing
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_NAMES = (
    """
Alice|Amir|Anna|Boris|Carla|Chen|Clara|Daniel|Elena|Emma|Farid|George|Grace|Hana|Henry|Ines|Ivan
Jack|Julia|Kofi|Laura|Lena|Leo|Lucas|Maria|Mina|Nadia|Noah|Oscar|Paul|Priya|Rosa|Sam|Sofia|Tom|Yuki
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_WORDS = (
    """
account|address|amount|area|average|balance|buffer|cache|cell|channel|child|city|client|color|column
counter|customer|date|delay|depth|digit|distance|edge|email|employee|event|factor|field|file|flag
graph|group|height|image|index|item|key|length|letter|level|line|list|matrix|message|minute|name
node|number|offset|order|page|parent|path|pixel|point|price|product|queue|rate|record|result|row
score|second|signal|size|speed|stack|state|string|student|sum|table|task|temperature|text|ticket
time|token|total|tree|user|value|vector|vertex|volume|weight|width|word|year
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_TEMPLATES = (
    # prose
    "{name} had never cared much for {a}, but",
    "The morning after the storm, {name} and {other} walked down to",
    "It was the year when {a} came to our village.",
    "Chapter {n}\n\n{name} looked at the {a} and",
    "Once upon a time there was a girl called {name} who loved {a}.",
    '"I don\'t believe a word of it," said {name}.',
    "We reached the house at night.",
    "Dear {name},\n\nThank you for your letter about {a}.",
    "The old man sat by the window and thought of {a}.",
    # facts
    "The history of {a} begins",
    "{A} are",
    "The most important thing to know about {a} is",
    "There are three reasons why {a} matter:",
    "In {year}, the first",
    "Scientists have found that {a}",
    "{A} and {b} have much in common.",
    "The difference between {a} and {b} is",
    "Q: What are {a} used for?\nA:",
    "How do {a} work?\n\n",
    "{A} (from Latin",
    "According to a new report on {a},",
    "# {A}\n\n## Introduction\n\n",
    "The city is known for its {a}. It was founded in {year}",
    # lists
    "Ten facts about {a}:\n1.",
    "A shopping list for {name}:\n-",
    "How to learn about {a} in {n} steps:\n\n1.",
    "Things to bring:\n- {a}\n- {b}\n-",
    "Synonyms:\nbig: large\nfast:",
    "Recipe: {a} with {b}\n\nIngredients:\n",
    "| Name | Subject | Score |\n|---|---|---|\n| {name} | {a} | {n} |\n|",
    # code
    "def get_{w}({v}):\n",
    'def {w}_{v}(items, {w}=None):\n    """',
    "class {W}:\n    def __init__(self, {v}, {u}):\n",
    "import os\nimport sys\n\n\ndef read_{w}(path):\n",
    "# Compute the {w} of each {v}\nfor {v} in",
    "function {w}{V}({u}) {{\n  const",
    "#include <stdio.h>\n\nint main() {{\n    int {w} = {n};\n",
    "SELECT {w}, {v} FROM {u}s WHERE",
    "public class {W}{V} {{\n    private int {u};\n",
    '<div class="{w}">\n  <h1>{A}</h1>\n',
    "{W}:\n  {v}: {n}\n  {u}:",
    "import unittest\n\nclass Test{W}(unittest.TestCase):\n",
    # dialogue
    "{name}: Have you heard about the {a}?\n{other}:",
    "Customer: Hello, I have a question about my {w}.\nAgent:",
    "Interviewer: What made you choose {a}?\n{name}:",
    "User: Tell me about {a}.\nAssistant:",
    "{name}: Where were you yesterday?\n{other}: I was at the {b} museum.\n{name}:",
    # a text and its summary
    "{A} were important to the town. {name} sold {b} there for {n} years, and {other} helped on "
    "Sundays. In {year} the shop closed.\n\nSummary:",
    "Text: {name} studied {a} and later {b}. In {year} a book followed, which few people read.\n"
    "In short,",
    # data
    '{{"name": "{name}", "{w}": {n}, "{v}": "{a}"}}\n{{"name": "{other}",',
    '{{\n  "{w}": [\n    {{"id": 1, "{v}": "{a}"}},\n    {{"id": 2,',
    "{w},{v},{u}\n1,{a},{n}\n2,{b},",
    "<{w}>\n  <{v}>{a}</{v}>\n  <{v}>{b}</{v}>\n",
    "[settings]\n{w} = {n}\n{v} =",
    "{year}-01-{n} 10:00:01 INFO {w} started\n{year}-01-{n} 10:00:02",
    # translation
    "English: I like {a}.\nFrench: J'aime",
    "English: Where is the station?\nSpanish: ¿Dónde está la estación?\nEnglish: We have {a}.\n"
    "Spanish:",
    "Translate to German.\n{name} is here. -> {name} ist hier.\nThe {a} are old. ->",
    "Le village est connu pour",
    "Die Geschichte der Stadt beginnt",
    "En el año {year},",
)


def opening(rng: random.Random) -> str:
    """One opening; two in five are empty, for the verifier to begin as it likes."""
    if rng.random() < 2 / 5:
        return ""
    a, b = rng.sample(_SUBJECTS, 2)
    name, other = rng.sample(_NAMES, 2)
    w, v, u = rng.sample(_WORDS, 3)
    return rng.choice(_TEMPLATES).format(
        a=a,
        b=b,
        A=a.capitalize(),
        name=name,
        other=other,
        w=w,
        v=v,
        u=u,
        W=w.capitalize(),
        V=v.capitalize(),
        n=rng.randint(2, 60),
        year=rng.randint(1700, 2024),
    )
